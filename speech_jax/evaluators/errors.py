"""Scores as sums that can be merged, and the writers that metrics go to.

Counts of two corpora add up to those of both. `results()` is what results.json holds of a split;
`RATES` names those of its values that are logged while training.
"""

import dataclasses
from typing import ClassVar

from rapidfuzz.distance import Levenshtein


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Word and character errors of any number of utterances; adding two merges their corpora.

    Rates are of the sums over the corpus, so they depend neither on batches nor on their order.
    """

    utterances: int = 0
    words: int = 0
    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    characters: int = 0
    character_errors: int = 0

    RATES: ClassVar = ("wer", "cer")

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return _merge(self, other)

    @property
    def wer(self) -> float:
        """Word error rate; without a reference word, 0 or (if there are insertions) infinity."""
        return _rate(self.insertions + self.deletions + self.substitutions, self.words)

    @property
    def cer(self) -> float:
        """Character error rate, spaces counted."""
        return _rate(self.character_errors, self.characters)

    def results(self) -> dict[str, float | int]:
        """What results.json holds of a split."""
        names = ("insertions", "deletions", "substitutions", "words", "utterances")
        return {"wer": self.wer, "cer": self.cer} | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"WER {100 * self.wer:.2f}%  CER {100 * self.cer:.2f}%"


@dataclasses.dataclass(frozen=True)
class MaskedCounts:
    """How well masked frames were told apart, as sums over them."""

    utterances: int = 0
    nats: float = 0.0
    correct: float = 0.0
    masked: float = 0.0

    RATES: ClassVar = ("error_rate", "accuracy", "loss_per_frame")

    def __add__(self, other: "MaskedCounts") -> "MaskedCounts":
        return _merge(self, other)

    def results(self) -> dict[str, float]:
        """What results.json holds of a split; error_rate is 1 - accuracy."""
        count = max(self.masked, 1.0)
        accuracy = self.correct / count
        return {
            "error_rate": 1 - accuracy,
            "accuracy": accuracy,
            "loss_per_frame": self.nats / count,
            "masked_frames": self.masked,
            "utterances": self.utterances,
        }

    def __str__(self) -> str:
        results = self.results()
        return f"accuracy {results['accuracy']:.4f}  loss {results['loss_per_frame']:.3f}"


def _merge(one, other):
    sums = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return type(one)(*(a + b for a, b in sums))


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Edits of a minimal alignment of two texts; words are what whitespace separates."""
    words, spoken = reference.split(), hypothesis.split()
    edits = [tag for tag, _, _ in Levenshtein.editops(words, spoken).as_list()]
    characters, heard = " ".join(words), " ".join(spoken)
    return ErrorCounts(
        utterances=1,
        words=len(words),
        insertions=edits.count("insert"),
        deletions=edits.count("delete"),
        substitutions=edits.count("replace"),
        characters=len(characters),
        character_errors=Levenshtein.distance(characters, heard),
    )


def _rate(errors: int, total: int) -> float:
    if total:
        return errors / total
    return float("inf") if errors else 0.0
