"""How well masked frames were told apart, as sums over them: the measure of pretraining."""

from collections.abc import Mapping
from typing import Any, ClassVar

from speech_jax.data.sources import Utterance
from speech_jax.evaluators import Row


class Masked:
    """Adds up the rows {'nats', 'correct', 'masked'} of what a pretraining task predicts."""

    rates: ClassVar = ("error_rate", "accuracy", "loss_per_frame")

    def __init__(self):
        self._nats = self._correct = self._masked = 0.0

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Counts one utterance; its line has the same figures of it alone."""
        del utterance, example
        nats, correct, masked = (float(prediction[name]) for name in ("nats", "correct", "masked"))
        self._nats += nats
        self._correct += correct
        self._masked += masked
        return _figures(nats, correct, masked)

    def results(self) -> dict[str, float | None]:
        """Accuracy over masked frames, 1 - accuracy as `error_rate`, and the loss in nats."""
        return _figures(self._nats, self._correct, self._masked)

    def tallies(self, line: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """Masked frames that were taken for another, and all of them, in one utterance."""
        masked = line["masked_frames"]
        return {"error_rate": ((line["error_rate"] or 0.0) * masked, masked)}

    def line(self) -> str:
        """Accuracy and loss."""
        if not self._masked:
            return "no masked frames"
        results = self.results()
        return f"accuracy {results['accuracy']:.4f}  loss {results['loss_per_frame']:.3f}"


def _figures(nats: float, correct: float, masked: float) -> dict[str, float | None]:
    accuracy = correct / masked if masked else None
    return {
        "error_rate": None if accuracy is None else 1 - accuracy,
        "accuracy": accuracy,
        "loss_per_frame": nats / masked if masked else None,
        "masked_frames": masked,
    }
