"""Word and character error rates of transcripts, as sums of edits over a split."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rapidfuzz.distance import Levenshtein

from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.sources import Utterance
from speech_jax.decoding.decoder import Decoder
from speech_jax.evaluators import Row, words
from speech_jax.evaluators.page import Section


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Word and character errors of any number of utterances; adding two merges their corpora.

    Rates are of the sums over the corpus, so they depend neither on batches nor on their order.
    """

    words: int = 0
    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    characters: int = 0
    character_errors: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        sums = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return ErrorCounts(*(a + b for a, b in sums))

    @property
    def word_errors(self) -> int:
        """Edits of words, of all three kinds."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float | None:
        """Word error rate; None without a reference word."""
        return self.word_errors / self.words if self.words else None

    @property
    def cer(self) -> float | None:
        """Character error rate, spaces counted; None without a reference character."""
        return self.character_errors / self.characters if self.characters else None


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Edits of a minimal alignment of two texts; words are what whitespace separates."""
    said, heard = reference.split(), hypothesis.split()
    edits = [tag for tag, _, _ in Levenshtein.editops(said, heard).as_list()]
    characters, heard = " ".join(said), " ".join(heard)
    return ErrorCounts(
        words=len(said),
        insertions=edits.count("insert"),
        deletions=edits.count("delete"),
        substitutions=edits.count("replace"),
        characters=len(characters),
        character_errors=Levenshtein.distance(characters, heard),
    )


class Errors:
    """Compares predicted transcripts with those of the corpus."""

    rates: ClassVar = ("wer", "cer")

    def __init__(self, transcript: Transcript, decoder: Decoder | None = None):
        """`decoder` is what made the predictions, and reads them; without one they are labels."""
        self._transcript, self._decoder = transcript, decoder
        self.counts, self._cut = ErrorCounts(), None

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Counts one utterance; its line has both texts and its own word error rate.

        Of a decoder's prediction also the `words`, [text, start, end, confidence] each with times
        in seconds, and the `score`.
        """
        del example
        reference, found = self._transcript.text(utterance), {}
        if self._decoder:
            decoded = self._decoder.read(prediction)
            hypothesis = decoded.text
            words = [[one.text, *(round(x, 4) for x in one[1:])] for one in decoded.words]
            found = {"words": words, "score": round(decoded.score, 4)}
        else:
            hypothesis = self._transcript.read(prediction)
        counts = count_errors(reference, hypothesis)
        self.counts += counts
        wer = None if counts.wer is None else round(counts.wer, 4)
        if "ended" in prediction:  # of what is written until it ends
            self._cut = (self._cut or 0) + (not prediction["ended"])
        return {"reference": reference, "hypothesis": hypothesis, "wer": wer} | found

    def results(self) -> dict[str, float | None]:
        """Both rates, and the counts that the first one is made of.

        Of texts that are written until they end also `cut`, those that did not and were cut.
        """
        names = ("insertions", "deletions", "substitutions", "words")
        counts = {name: getattr(self.counts, name) for name in names}
        cut = {} if self._cut is None else {"cut": self._cut}
        return {"wer": self.counts.wer, "cer": self.counts.cer} | counts | cut

    def line(self) -> str:
        """Both rates in per cent."""
        if self.counts.wer is None:
            return "no reference words, so no error rate"
        cut = f"  ({self._cut} texts did not end, and were cut)" if self._cut else ""
        return f"WER {100 * self.counts.wer:.2f}%  CER {100 * self.counts.cer:.2f}%{cut}"

    def tallies(self, line: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Errors and what they are of, in one utterance."""
        counts = count_errors(line["reference"], line["hypothesis"])
        return {
            "wer": (counts.word_errors, counts.words),
            "cer": (counts.character_errors, counts.characters),
        }

    def sections(self, lines: Sequence[Mapping[str, Any]]) -> list[Section]:
        """Confusions of words, and the reliability of their confidence."""
        return words.sections(lines)


class Searched(Errors):
    """The errors of a search that takes steps: how many, and frames cut short by its bound."""

    def __init__(self, transcript: Transcript, decoder: Decoder | None = None):
        super().__init__(transcript, decoder)
        self._sums = dict.fromkeys(("steps", "frames", "bounded"), 0)

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """As `Errors`, with the steps of an utterance."""
        for name in self._sums:
            self._sums[name] += int(prediction[name])
        return super().add(utterance, example, prediction) | {"steps": int(prediction["steps"])}

    def results(self) -> dict[str, float | None]:
        """As `Errors`, with the steps of all utterances, a frame, and the frames cut short."""
        steps, frames = self._sums["steps"], self._sums["frames"]
        found = {"steps": steps, "steps_per_frame": round(steps / max(frames, 1), 4)}
        return super().results() | found | {"bounded": self._sums["bounded"]}
