"""Where to cut recordings that are longer than a model or its memory takes."""

import itertools
import math
from typing import BinaryIO

import numpy as np

from speech_jax.data.audio import Segment

# Energy is measured in frames of so many seconds, and averaged over so many frames: a pause between
# words, not the closure of a plosive.
_FRAME = 0.01
_PAUSE = 20


def pieces(
    file: str | BinaryIO, duration: float, longest: float, *, overlap: float = 0.0
) -> list[Segment]:
    """Cuts `duration` seconds into as few pieces of one length as there can be.

    Args:
      file: what the pieces are of.
      duration: its length in seconds.
      longest: the length of a piece, at most, in seconds.
      overlap: how much of a piece is also the beginning of the next one, in seconds.
    """
    if not 0 <= overlap < longest:
        raise ValueError(f"overlap {overlap} must be 0 or more and below longest, {longest}")
    count = max(1, math.ceil(round((duration - overlap) / (longest - overlap), 9)))
    length = (duration + (count - 1) * overlap) / count
    return [Segment(file, index * (length - overlap), length) for index in range(count)]


def quiet_pieces(
    file: str | BinaryIO, samples: np.ndarray, rate: int, longest: float
) -> list[Segment]:
    """Cuts a recording where it is quietest: each piece ends in the second half of what it may be.

    Args:
      file: what the pieces are of.
      samples: int16 [T], all of it.
      rate: of the samples, in Hz.
      longest: the length of a piece, at most, in seconds (0.2 or more).
    """
    if longest < _FRAME * _PAUSE:
        raise ValueError(f"longest is {longest} s; it must be {_FRAME * _PAUSE} s or more")
    hop = max(1, round(_FRAME * rate))
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    energy = np.einsum("nh,nh->n", frames, frames, dtype=np.float64)
    energy = np.convolve(energy, np.ones(_PAUSE), "same")
    most = max(2, int(longest * rate / hop))
    cuts = [0]
    while len(energy) - cuts[-1] > most:
        first = cuts[-1] + most // 2
        last = min(cuts[-1] + most, len(energy) - most // 4)  # the rest is no splinter
        quiet = energy[first:last]
        # In the middle of a pause that is as quiet all along.
        places = np.flatnonzero(quiet <= quiet.min())
        cuts.append(first + int(places[len(places) // 2]))
    ends = [*(cut * hop / rate for cut in cuts), len(samples) / rate]
    return [Segment(file, start, stop - start) for start, stop in itertools.pairwise(ends)]
