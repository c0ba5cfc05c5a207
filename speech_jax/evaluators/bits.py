"""How well each sample of a waveform was foretold: bits a sample, summed over a split."""

import math
from typing import Any, ClassVar

from speech_jax.data.sources import Utterance
from speech_jax.evaluators import Row


class Bits:
    """Adds up the rows {'nats', 'samples'} of what a model of the next sample predicts."""

    rates: ClassVar = ("bits_per_sample",)

    def __init__(self):
        self._nats = self._samples = 0.0

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Counts one utterance; its line has the same figures of it alone."""
        del utterance, example
        nats, samples = float(prediction["nats"]), float(prediction["samples"])
        self._nats += nats
        self._samples += samples
        return _figures(nats, samples)

    def results(self) -> dict[str, float | None]:
        """Bits a sample, and the samples that they are the mean of."""
        return _figures(self._nats, self._samples)

    def line(self) -> str:
        """Bits a sample."""
        if not self._samples:
            return "no samples"
        return f"{self.results()['bits_per_sample']:.3f} bits a sample"


def _figures(nats: float, samples: float) -> dict[str, float | None]:
    bits = nats / math.log(2) / samples if samples else None
    return {"bits_per_sample": bits, "samples": samples}
