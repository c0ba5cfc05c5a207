"""What a decoder says of a recording: words with times and confidences, and the other readings."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Word(NamedTuple):
    """A word, its seconds from the start of what was decoded, and how sure it is.

    `confidence` is the probability that the word is right, in [0, 1]; see decoding/confidence.py
    for what it is made of and how it is calibrated.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What was said, as a decoder reads it.

    Attributes:
      text: the words, with single spaces.
      score: natural logarithm of what the decoder maximizes.
      alternatives: (text, score) of the n best readings, the best first; `text` is one of them.
    """

    text: str
    words: tuple[Word, ...]
    score: float
    alternatives: tuple[tuple[str, float], ...]


def spans(labels: Sequence[int], spellings: Sequence[str]) -> list[tuple[str, int, int]]:
    """Words of label ids as (text, first label, label after the last); spaces are in no span.

    Args:
      labels: ids; spellings: what each id writes, a space where one begins or ends a word.
    """
    found: list[tuple[str, int, int]] = []
    open_word = False
    for place, label in enumerate(labels):
        for number, piece in enumerate(spellings[label].split(" ")):
            open_word = open_word and not number  # a space before this piece
            if not piece:
                continue
            if open_word:
                text, first, _ = found[-1]
                found[-1] = (text + piece, first, place + 1)
            else:
                found.append((piece, place, place + 1))
                open_word = True
    return found


def timed(
    labels: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    sure: np.ndarray,
    spellings: Sequence[str],
    frame_seconds: float,
) -> list[tuple[str, float, float, float]]:
    """(text, start, end, evidence) of each word of aligned labels; the evidence of its worst label.

    Args:
      labels, starts, ends: int [N]: ids, and the frames [start, end) that each is emitted in.
      sure: float [N]: the evidence of each label.
    """
    return [
        (
            text,
            float(starts[first]) * frame_seconds,
            float(ends[stop - 1]) * frame_seconds,
            float(sure[first:stop].min()),
        )
        for text, first, stop in spans(labels.tolist(), spellings)
    ]
