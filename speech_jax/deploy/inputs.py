"""Recordings as they are given (files, open ones, arrays), and the lengths they are padded to."""

import contextlib
import io
import math
import numbers
import os
import pathlib
from typing import Any

import numpy as np

from speech_jax.data import audio, decoders
from speech_jax.errors import UserError

# What is heard at once is padded to one of a few lengths, a square root of 2 apart, so that few
# programs are compiled; what a model hears does not depend on padding.
_SHORTEST_SECONDS, _STEP = 1.0, 2**0.5

File = str | os.PathLike | io.IOBase


class TranscriptionError(UserError):
    """Audio that cannot be transcribed, or a setting that cannot work; the message says why."""


def padded(length: int, rate: int) -> int:
    """The length that `length` samples are padded to."""
    shortest = _SHORTEST_SECONDS * rate
    steps = max(0, math.ceil(math.log(length / shortest, _STEP) - 1e-9))
    return math.ceil(shortest * _STEP**steps)


def open_recording(
    recording: File | np.ndarray, sample_rate: int | None, own_rate: int
) -> tuple[str, Any]:
    """(a name, a context manager that gives what audio.stream does, at `own_rate`) of a recording.

    A file's errors are raised when that is entered, so that each recording has its own.
    """
    if isinstance(recording, (str, os.PathLike, io.IOBase)):
        if sample_rate is not None:
            raise TranscriptionError("a file says its own sample rate: leave sample_rate out")
        if isinstance(recording, (str, os.PathLike)):
            recording = str(pathlib.Path(recording).expanduser())
        return audio.name_of(recording), audio.stream(recording, own_rate)
    rate = own_rate if sample_rate is None else sample_rate
    low, high = decoders.RATES
    if not isinstance(rate, numbers.Integral) or not low <= rate <= high:
        raise TranscriptionError(
            f"sample_rate={rate!r} must be a whole number of Hz from {low} to {high}"
        )
    samples = audio.resample(_to_int16(recording), int(rate), own_rate)
    opened = iter([samples]), len(samples) / own_rate
    return "the array", contextlib.nullcontext(opened)


def _to_int16(recording: np.ndarray) -> np.ndarray:
    """int16 [T] of samples of any type and number of channels; TranscriptionError for no audio."""
    if recording is None or isinstance(recording, bytes | bytearray):
        raise TranscriptionError(
            f"{type(recording).__name__} is not a recording: give a file, an open one (io.BytesIO "
            "of bytes) or an array of samples"
        )
    several = isinstance(recording, list | tuple)
    if several and any(isinstance(one, str | os.PathLike | io.IOBase) for one in recording):
        raise TranscriptionError("a list of files is not a recording: give it to transcribe_all")
    try:
        samples = np.asarray(recording)
    except (ValueError, TypeError) as error:  # lists of several lengths; what is on no CPU
        raise TranscriptionError(f"this is not an array of samples: {error}") from error
    if samples.ndim in (1, 2) and not samples.size:
        raise TranscriptionError(f"samples of shape {list(samples.shape)}: the recording is empty")
    channels = samples.shape[1] if samples.ndim == 2 else 1
    if samples.ndim not in (1, 2) or channels > len(samples):
        raise TranscriptionError(
            f"samples of shape {list(samples.shape)} are not audio: give [T], or [T, channels] "
            "(transpose what has the channels first)"
        )
    if samples.dtype.newbyteorder("=") != np.int16:
        if not np.issubdtype(samples.dtype, np.floating):
            raise TranscriptionError(
                f"samples of type {samples.dtype} are not audio: give floats within -1 and 1, or "
                "int16"
            )
        if not np.isfinite(samples).all():
            raise TranscriptionError("the samples are not all finite: mend the recording")
        peak = float(np.abs(samples).max())
        if peak > 8:
            raise TranscriptionError(
                f"the samples reach {peak:g}, and floats must be within -1 and 1: divide them by "
                "32768 if they are in units of int16"
            )
        samples = np.clip(np.rint(samples * 32768.0), -32768, 32767)
    if samples.ndim == 2:
        samples = np.rint(samples.astype(np.float32).mean(axis=1))
    return samples.astype(np.int16)
