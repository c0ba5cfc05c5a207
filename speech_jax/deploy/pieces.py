"""A recording as the pieces that a model hears: cut at its pauses, what is silent left out.

A model has learned from utterances: some seconds of speech, each normalized by its own mean and
variance. So a long recording is cut into such pieces where it pauses, and not where memory ends:
then the text does not depend on how much is heard at once, and silence, which would weigh in the
statistics of the features, does not change it. Pieces come as the file is read, so that recordings
of any length take the memory of a minute.

- A run of zeros of a second or more is no part of any piece, and neither are zeros at the end of
  the recording: nothing was recorded there.
- A second or more at the level of the background noise is left out but for its edges.
- A recording that is then no longer than an utterance is one piece, as evaluation hears it.
- A longer one is also cut in pauses of 0.3 s or more at the level of the background noise, and
  where it has none for ten seconds, where it is quietest. Where that is no pause either, the piece
  is longer, and `chunks` cuts it for the model, with an overlap.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Pieces of long recordings are no longer than that, in seconds, where there is a pause: no longer
# than what is heard at once, at least, so that how much that is hardly makes a difference.
LONGEST = 10.0
# A piece ends after so many seconds, even if there is no pause.
_MOST = 60.0
# What a piece has at least, in seconds: shorter ones have the statistics of few sounds.
_LEAST = 1.5
# Silence of so many seconds is left out of every recording, pauses of so many are cuts of long
# ones, and so many seconds of either stay on each side.
_SILENCE, _PAUSE, _EDGE = 1.0, 0.3, 0.1
# Energy is measured in frames of so many seconds, and averaged over so many frames: a closure of a
# plosive is no pause.
_FRAME, _STEADY = 0.01, 10
# Pauses have at most such a share of the energy of the loudest tenth of a second until then, and
# such a multiple of the background's.
_SHARE, _BACKGROUND = 1e-2, 4.0


class Piece(NamedTuple):
    """Samples int16 [T] of a recording from sample `start` on."""

    start: int
    samples: np.ndarray


def cut(blocks: Iterator[np.ndarray], rate: int, longest: float) -> Iterator[Piece]:
    """The pieces of a recording, in order; none of digital silence.

    Args:
      blocks: the recording, int16 [n] each; how it is split into blocks makes no difference.
      rate: in Hz.
      longest: of the utterances that the model has learned from, in seconds.
    """
    wanted = round((_MOST + 2 * _SILENCE) * rate)
    silence = round(_SILENCE / _FRAME) * max(1, round(_FRAME * rate))  # whole frames, as in _next
    ahead, start, first, loudest = np.zeros(0, np.int16), 0, True, 0.0
    while True:
        while len(ahead) < wanted and (block := next(blocks, None)) is not None:
            ahead = np.concatenate([ahead, block])
        if not len(ahead):
            return
        # Zeros of less than a second at the start stay, as evaluation hears them.
        zeros = int(np.argmax(ahead != 0)) if ahead.any() else len(ahead)
        length, done = 0, zeros
        if not zeros or (start == 0 and zeros < min(len(ahead), silence)):
            length, done, loudest = _next(ahead[:wanted], rate, longest, first, loudest)
        if length:
            yield Piece(start, ahead[:length])
            first = False
        ahead, start = ahead[done:], start + done


def _next(
    ahead: np.ndarray, rate: int, longest: float, first: bool, loudest: float
) -> tuple[int, int, float]:
    """(samples in the next piece, samples that are done with, the loudest so far)."""
    hop = max(1, round(_FRAME * rate))
    energy = _energy(ahead, hop)
    zeros = next((run for run in _runs(energy == 0) if _lasts(run, _SILENCE)), None)
    end = len(ahead) if zeros is None else zeros[0] * hop
    end = len(np.trim_zeros(ahead[:end], "b"))
    energy = energy[: end // hop]  # [F]
    if len(energy) <= _SILENCE / _FRAME:
        return end, end, loudest
    is_long = not first or end > longest * rate
    steady = np.convolve(energy, np.ones(_STEADY) / _STEADY, "same")
    loudest, background = max(loudest, steady.max()), np.percentile(steady[steady > 0], 5)
    quiet = steady <= min(_SHARE * loudest, _BACKGROUND * background)
    edge = round(_EDGE / _FRAME)
    for begun, ended in _runs(quiet):
        done = end if ended == len(quiet) else (ended - edge) * hop
        if begun == 0:
            if ended > edge and (is_long or _lasts((begun, ended), _SILENCE)):
                return 0, done, loudest
        elif _lasts((begun, ended), _SILENCE) or (
            is_long
            and _lasts((begun, ended), _PAUSE)
            and ended < len(quiet)
            and begun >= _LEAST / _FRAME
            and len(quiet) - ended >= _LEAST / _FRAME
        ):
            end = (begun + edge) * hop
            break
    else:
        done = end
    if end <= (min(longest, LONGEST) if is_long else longest) * rate:
        return end, done, loudest
    most = round(min(longest, LONGEST) / _FRAME)
    place = _quietest(steady[: end // hop], _SHARE * loudest, most) * hop
    return place, place, loudest


def _quietest(energy: np.ndarray, pause: float, longest: int) -> int:
    """The frame at which to end a piece without a clear pause; a short one is below `pause`."""
    first = longest // 2
    last = max(first + 1, len(energy) - round(_LEAST / _FRAME))  # the rest is no splinter
    near = energy[first : min(longest, last)]
    if near.min() > pause:  # a word would be cut in two: on to the next pause
        later = np.flatnonzero(energy[longest:last] <= pause)
        if len(later):
            return longest + int(later[0])
        near = energy[first:last]
    # In the middle of a pause that is as quiet all along.
    places = np.flatnonzero(near <= near.min())
    return first + int(places[len(places) // 2])


def _lasts(run: tuple[int, int], seconds: float) -> bool:
    return run[1] - run[0] >= round(seconds / _FRAME)


def _runs(holds: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the runs of frames in which `holds`."""
    edges = np.flatnonzero(np.diff(holds, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _energy(samples: np.ndarray, hop: int) -> np.ndarray:
    """Of every whole frame: float64 [frames]."""
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    return np.einsum("nh,nh->n", frames, frames, dtype=np.float64)


# ---- Chunks ------------------------------------------------------------------------------------

# What a chunk hears beyond its own frames on each side, in seconds, and at most as its share.
_MARGIN, _MARGIN_SHARE = 2.0, 0.25


class Chunk(NamedTuple):
    """Samples [start, stop) of a piece, of whose frames those from `first` up to `last` count."""

    start: int
    stop: int
    first: int
    last: int | None


def chunks(length: int, longest: float, rate: int, frame: int) -> list[Chunk]:
    """Cuts a piece into overlapping chunks; the frames that count are, in a row, the piece's.

    A model lacks what lies beyond the ends of a chunk: the frames there are left to a neighbour.

    Args:
      length: of the piece, in samples.
      longest: of a chunk, in seconds.
      rate: in Hz.
      frame: samples from one frame of the model to the next.
    """
    if length <= longest * rate:
        return [Chunk(0, length, 0, None)]
    size = int(longest * rate) // frame
    margin = int(min(_MARGIN_SHARE * longest, _MARGIN) * rate) // frame
    stride = size - 2 * margin
    count = math.ceil((length / frame - size) / stride) + 1
    last = count - 1
    return [
        Chunk(
            index * stride * frame,
            length if index == last else (index * stride + size) * frame,
            margin if index else 0,
            None if index == last else margin + stride,
        )
        for index in range(count)
    ]
