"""A recording as the pieces that a model hears: cut at its pauses, what is silent left out.

A model has learned from utterances: some seconds of speech between pauses, each normalized by its
own mean and variance. So a recording is cut into such pieces wherever it pauses, whatever memory
would allow: then text does not depend on how much is heard at once, and silence, which would
weigh in the statistics of the features, does not change it either. Pieces come as the file is read,
so that recordings of any length take the memory of two minutes.

- A run of zeros of a second or more is no part of any piece, and neither are zeros at the end of
  the recording: nothing was recorded there.
- A second or more at the level of the background noise is left out but for its edges.
- A recording that is then no longer than an utterance is one piece, as evaluation hears it. A
  longer one is cut where it is quietest; where it has no pause within ten seconds, the piece is
  longer, and `chunks` cuts it for the model, with an overlap.
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
# What a piece has at least, as a share of the longest: short ones have statistics of few sounds.
_LEAST = 0.4
# Silence of so many seconds is left out, but for so many at the sides of what is heard.
_SILENCE, _EDGE = 1.0, 0.25
# Energy is measured in frames of so many seconds. It is averaged over so many to find silence, and
# over so many to find a pause between words rather than the closure of a plosive.
_FRAME, _STEADY, _PAUSE = 0.01, 10, 30
# Energies: of a pause, as a share of that of speech; of silence, as a share of that of speech, and
# as a multiple of the background's.
_PAUSE_SHARE, _SILENCE_SHARE, _BACKGROUND = 1e-2, 1e-3, 4.0


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
    ahead, start, first = np.zeros(0, np.int16), 0, True
    while True:
        while len(ahead) < wanted and (block := next(blocks, None)) is not None:
            ahead = np.concatenate([ahead, block])
        if not len(ahead):
            return
        # Zeros of less than a second at the start stay, as evaluation hears them.
        zeros = int(np.argmax(ahead != 0)) if ahead.any() else len(ahead)
        length, done = 0, zeros
        if not zeros or (start == 0 and zeros < min(len(ahead), _SILENCE * rate)):
            length, done = _next(ahead[:wanted], rate, longest, first)
        if length:
            yield Piece(start, ahead[:length])
            first = False
        ahead, start = ahead[done:], start + done


def _next(ahead: np.ndarray, rate: int, longest: float, first: bool) -> tuple[int, int]:
    """(samples in the next piece, samples that are done with) of what is ahead."""
    hop = max(1, round(_FRAME * rate))
    run, edge = round(_SILENCE / _FRAME), round(_EDGE / _FRAME)
    energy = _energy(ahead, hop)
    zeros = _first_run(energy == 0, run)
    end = len(ahead) if zeros is None else zeros[0] * hop
    end = done = len(np.trim_zeros(ahead[:end], "b"))
    energy = energy[: end // hop]
    if len(energy) <= run:
        return end, done
    steady = _smooth(energy, _STEADY)
    speech, background = np.percentile(steady, 95), np.percentile(steady[steady > 0], 5)
    level = min(_SILENCE_SHARE * speech, _BACKGROUND * background)
    silence = _first_run(steady <= level, run)
    if silence is not None:
        begun, ended = silence
        done = end if ended == len(energy) else (ended - edge) * hop
        if begun == 0:
            return 0, done
        end = (begun + edge) * hop
    if not first:
        longest = min(longest, LONGEST)
    if end <= longest * rate:
        return end, done
    longest = min(longest, LONGEST)
    place = hop * _pause(_smooth(energy[: end // hop], _PAUSE), speech, round(longest / _FRAME))
    return place, place


def _pause(energy: np.ndarray, speech: float, longest: int) -> int:
    """The frame at which to end a piece of which more follows."""
    first = int(_LEAST * longest)
    last = len(energy) - first  # the rest is no splinter
    near = energy[first : min(longest, last)]
    if near.min() > _PAUSE_SHARE * speech:  # a word would be cut in two: on to the next pause
        later = np.flatnonzero(energy[longest:last] <= _PAUSE_SHARE * speech)
        if len(later):
            return longest + int(later[0])
        near = energy[first:last]
    # In the middle of a pause that is as quiet all along.
    places = np.flatnonzero(near <= near.min())
    return first + int(places[len(places) // 2])


def _energy(samples: np.ndarray, hop: int) -> np.ndarray:
    """Of every whole frame: float64 [frames]."""
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    return np.einsum("nh,nh->n", frames, frames, dtype=np.float64)


def _smooth(energy: np.ndarray, frames: int) -> np.ndarray:
    return np.convolve(energy, np.ones(frames) / frames, "same")


def _first_run(holds: np.ndarray, least: int) -> tuple[int, int] | None:
    """(start, stop) of the first run of `least` or more where `holds`, None if there is none."""
    edges = np.flatnonzero(np.diff(holds, prepend=False, append=False))
    runs = edges.reshape(-1, 2)
    long = runs[runs[:, 1] - runs[:, 0] >= least]
    return (int(long[0, 0]), int(long[0, 1])) if len(long) else None


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
