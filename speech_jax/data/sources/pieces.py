"""Where to cut recordings that are longer than a model or its memory takes."""

import math
from typing import BinaryIO

from speech_jax.data.audio import Segment


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
