"""From logits to words: the one object that evaluation, transcription and export decode with."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from speech_jax.decoding import ctc, words
from speech_jax.decoding.words import Decoded, Word
from speech_jax.errors import UserError

DECODERS = ("greedy",)


class DecoderError(UserError):
    """Settings of a decoder that cannot work; the message names the setting."""


class Tokenizer(Protocol):
    """What a decoder asks of a tokenizer (data/text.py)."""

    @property
    def spellings(self) -> tuple[str, ...]: ...

    def decode(self, ids: Any) -> str: ...


class Transcript(Protocol):
    """What a decoder asks of a transcript (data/parts/transcript.py)."""

    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How logits become words; the section `decoder` of a configuration.

    Attributes:
      name: 'greedy', the best label of each frame.
      calibration: (scale, offset) of the logistic function that makes confidences.
    """

    name: str = "greedy"
    calibration: tuple[float, float] = (1.0, 0.0)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Settings":
        """Those of a section, in which None stands for the default; DecoderError for others."""
        known = [field.name for field in dataclasses.fields(cls)]
        given = {key: value for key, value in section.items() if value is not None}
        for key in given:
            if key not in known:
                raise DecoderError(f"config.decoder has no {key!r}; it has {', '.join(known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        if self.name not in DECODERS:
            raise DecoderError(
                f"config.decoder.name={self.name!r} must be one of {', '.join(DECODERS)}"
            )


class Decoder:
    """Turns logits into words. A call does it all; `search` and `read` are its two halves.

    `search` runs on the device inside somebody's jit, and gives arrays with a row an utterance;
    `read` makes words of such a row on the host.
    """

    def __init__(
        self, settings: Mapping[str, Any], transcript: Transcript, frame_seconds: float
    ) -> None:
        """Prepares a decoder; nothing is compiled yet.

        Args:
          settings: fields of `Settings`; None, or what is left out, is the default.
          transcript: the part whose tokenizer the logits' classes are of; the blank is 0.
          frame_seconds: seconds from one frame of the logits to the next.

        Raises:
          DecoderError: a setting cannot work.
        """
        self.settings = Settings.of(settings)
        self._transcript = transcript
        self._frame_seconds = frame_seconds
        self._compiled = jax.jit(self.search)

    def __call__(self, logits: jax.Array, lengths: jax.Array) -> list[Decoded]:
        """Decodes logits float [B, T, K] of lengths int [B] frames.

        They are padded to one of few shapes, so that few programs are compiled.
        """
        logits, lengths = np.asarray(logits), np.asarray(lengths, np.int32)
        rows, frames = (_rounded(size) for size in logits.shape[:2])
        widths = ((0, rows - logits.shape[0]), (0, frames - logits.shape[1]), (0, 0))
        lengths_widths = (0, rows - len(lengths))
        found = jax.device_get(
            self._compiled(np.pad(logits, widths), np.pad(lengths, lengths_widths))
        )
        return [
            self.read({name: array[row] for name, array in found.items()})
            for row in range(logits.shape[0])
        ]

    def search(self, logits: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        """The decoding on the device: arrays by name, [B, ...] each.

        Args:
          logits: [B, T, K], not normalized; lengths: int32 [B], frames.
        """
        path = ctc.best_path(logits, lengths)
        return {
            "labels": path.labels,
            "labels_length": path.count,
            "starts": path.starts,
            "ends": path.ends,
            "sure": path.sure,
            "score": path.score,
        }

    def read(self, row: Mapping[str, np.ndarray]) -> Decoded:
        """The words of a row of what `search` gave."""
        count = int(row["labels_length"])
        labels, starts, ends, sure = (
            row[name][:count] for name in ("labels", "starts", "ends", "sure")
        )
        found = words.timed(labels, starts, ends, sure, self._spellings, self._frame_seconds)
        text = self._transcript.tokenizer.decode(labels.tolist())
        score = float(row["score"])
        return Decoded(
            text=text,
            words=tuple(
                Word(text, start, end, self._confidence(sure)) for text, start, end, sure in found
            ),
            score=score,
            alternatives=((text, score),),
        )

    @functools.cached_property
    def _spellings(self) -> tuple[str, ...]:
        return self._transcript.tokenizer.spellings

    def _confidence(self, sure: float) -> float:
        """The probability that a word is right, of that of its least sure label."""
        scale, offset = self.settings.calibration
        sure = min(max(sure, 1e-6), 1 - 1e-6)
        return 1 / (1 + math.exp(-(scale * math.log(sure / (1 - sure)) + offset)))


def _rounded(size: int) -> int:
    """The next number of which there are few: an eighth of a power of two, times 8 to 16."""
    step = 1 << max(0, max(size, 1).bit_length() - 3)
    return -(-max(size, 1) // step) * step
