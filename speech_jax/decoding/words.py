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


# CTC emits a label at some time within its sound, a frame or two long, and blanks else. Where a
# word ends and the next one begins is estimated from the middle of the label before, that of the
# label after and how long both are spelled: the median of a linear regression (least absolute
# deviation) on the synthetic corpus, see `python -m benchmarks.words`.
_SHARE = 0.52  # of the time between both labels
_LETTER_BEFORE, _LETTER_AFTER = 0.013, -0.032  # seconds a letter of either label
_LATE = -0.049  # seconds
# Seconds that a word lasts at most before its first label and after its last; and does, where
# there is no other word.
_MOST, _USUAL = 0.4, 0.15


def timed(
    labels: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    sure: np.ndarray,
    spellings: Sequence[str],
    frame_seconds: float,
    frames: int,
) -> list[tuple[str, float, float, float]]:
    """(text, start, end, evidence) of each word of aligned labels; the evidence of its worst label.

    Args:
      labels, starts, ends: int [N]: ids, and the frames [start, end) that each is emitted in.
      sure: float [N]: the evidence of each label.
      frames: of all that was decoded.
    """
    middle = (np.asarray(starts) + np.asarray(ends)) / 2 * frame_seconds
    letters = [len(spellings[label].strip()) for label in labels.tolist()]
    spoken = spans(labels.tolist(), spellings)
    found: list[tuple[str, float, float, float]] = []
    begins = 0.0
    for number, (text, first, stop) in enumerate(spoken):
        last = middle[stop - 1]
        if not number:
            begins = max(0.0, middle[first] - _USUAL)
        if number + 1 < len(spoken):
            after = min(stop, spoken[number + 1][1])  # a label that is a space, or the next word's
            bound = last + _SHARE * (middle[after] - last) + _LATE
            bound += _LETTER_BEFORE * letters[stop - 1] + _LETTER_AFTER * letters[after]
            bound = float(np.clip(bound, last, max(last, middle[spoken[number + 1][1]])))
            over = min(bound, last + _MOST)
            following = max(bound, middle[spoken[number + 1][1]] - _MOST)
        else:
            over = following = min(last + _USUAL, max(last, frames * frame_seconds))
        found.append((text, float(begins), float(over), float(sure[first:stop].min())))
        begins = following
    return found
