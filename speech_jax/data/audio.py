"""Audio files to int16 samples: decode, resample, change speed, add noise. numpy in, numpy out."""

import collections
import contextlib
import dataclasses
import io
import itertools
import math
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from speech_jax.data import decoders
from speech_jax.data.decoders import EXTENSIONS, AudioError, UnsupportedError, name_of

__all__ = ["EXTENSIONS", "AudioError", "Segment", "UnsupportedError", "decode", "duration"]
__all__ += ["add_noise", "change_speed", "name_of", "read", "resample", "stream", "to_flac"]

# Samples of one piece of audio, at most: 1 GiB, or nine hours at 16 kHz.
_MOST = 1 << 29
# Float samples above this are no loud audio (full scale is 1.0) but integers in disguise.
_LOUDEST = 16.0
# Channels whose average has this share of their power, or less, cancel each other.
_CANCELLED = 1e-3
# Samples of whole recordings that are kept for the next segment of a file that cannot seek.
_KEPT = 1 << 27
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Part of a recording: `duration` seconds from `offset` on, cut at the nearest samples."""

    file: str | BinaryIO
    offset: float
    duration: float


File = str | BinaryIO | Segment


def decode(file: File, sample_rate: int) -> np.ndarray:
    """Returns the audio of `file` as int16 [T] at `sample_rate` Hz, mono.

    16-bit mono PCM at `sample_rate` comes through unchanged. Raises AudioError for a file that is
    missing, empty, truncated, not audio, too long for one piece, holds NaN or infinite samples, or
    cannot be speech: samples in the units of integers, channels that cancel.
    """
    with _blocks(file) as (blocks, rate, frames):
        _check_length(file, (frames or 0) * sample_rate / rate, sample_rate)
        return _join(file, _resampled(blocks, rate, sample_rate), sample_rate)


@contextlib.contextmanager
def stream(file: File, sample_rate: int) -> Iterator[tuple[Iterator[np.ndarray], float | None]]:
    """Opens `file` to be decoded block by block, for recordings of any length.

    Gives (blocks int16 [n] at `sample_rate` Hz, mono; its length in seconds, None where only
    decoding tells it). Raises AudioError as `decode`, here and while blocks are taken, but for a
    file without samples, of which there are no blocks.
    """
    with _blocks(file) as (blocks, rate, frames):
        yield _resampled(blocks, rate, sample_rate), frames and frames / rate


def read(file: File) -> tuple[np.ndarray, int]:
    """Returns (int16 [T], rate in Hz) of `file` at its own rate, channels averaged to mono.

    Quantizing before resampling makes the samples independent of the container: a prepared copy
    of the corpus (16-bit FLAC at the file's own rate) decodes to the same bits as the original.
    """
    with _blocks(file) as (blocks, rate, frames):
        _check_length(file, frames or 0, rate)
        return _join(file, blocks, rate), rate


def duration(file: File) -> float:
    """Returns the length of `file` in seconds, from its header or, if need be, by decoding it.

    Raises AudioError as `decode`.
    """
    with _blocks(file) as (blocks, rate, frames):
        if frames is None:
            frames = sum(map(len, blocks))
        if frames <= 0:
            raise AudioError(f"{_name(file)}: holds no samples")
        return frames / rate


def resample(samples: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Resamples int16 [T] from `rate` to `new_rate` Hz: int16 [ceil(T * new_rate / rate)]."""
    pieces = [samples[i : i + _BLOCK] for i in range(0, len(samples), _BLOCK)]
    resampled = list(_resampled(iter(pieces), rate, new_rate))
    return resampled[0] if len(resampled) == 1 else np.concatenate([samples[:0], *resampled])


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Plays int16 [T] `factor` times as fast, tempo and pitch: int16 [ceil(T / factor)].

    Speed perturbation of Ko et al., "Audio augmentation for speech recognition" (2015).
    """
    if not 0.1 <= factor <= 10:
        raise ValueError(
            f"speed factor {factor} is outside 0.1 to 10; usual ones are 0.9, 1.0, 1.1"
        )
    return resample(samples, factor, 1.0)


def add_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float, offset: int = 0) -> np.ndarray:
    """Adds `noise` int16 [M], read from `offset` on and repeated, to int16 [T]: int16 [T].

    The ratio of the mean power of the speech to that of the added noise, over the utterance, is
    `snr_db` decibels. A sum that does not fit int16 is scaled down as a whole, never clipped.
    """
    if len(noise) == 0:
        raise ValueError("the noise has no samples; give a recording that is not empty")
    speech = samples.astype(np.float32)
    segment = np.take(noise, np.arange(offset, offset + len(samples)), mode="wrap")
    segment = segment.astype(np.float32)
    speech_power = np.mean(np.square(speech, dtype=np.float64)) if len(speech) else 0.0
    noise_power = np.mean(np.square(segment, dtype=np.float64)) if len(speech) else 0.0
    if speech_power == 0 or noise_power == 0:  # there is no ratio to silence
        return samples
    gain = math.sqrt(speech_power / noise_power) * 10 ** (-snr_db / 20)
    mixed = speech + np.float32(gain) * segment
    peak = float(np.abs(mixed).max())
    if peak > 32767:
        mixed *= np.float32(32767 / peak)
    return _to_int16(mixed)


def to_flac(file: File) -> tuple[bytes, int, int]:
    """Returns (FLAC file, samples, rate) of the audio at `file`, for `read` the same as `file`.

    A FLAC file comes back byte for byte (after a full decode, which finds damage); anything else
    is stored as 16-bit mono FLAC at its own rate. Raises AudioError as `decode`.
    """
    samples, rate = read(file)
    if not isinstance(file, Segment):
        with contextlib.ExitStack() as stack:
            stream = file
            if isinstance(file, (str, os.PathLike)):
                stream = stack.enter_context(open(file, "rb"))
            stream.seek(0)
            if stream.read(4) == b"fLaC":
                return b"fLaC" + stream.read(), len(samples), rate
    flac = io.BytesIO()
    soundfile.write(flac, samples, rate, format="FLAC", subtype="PCM_16")
    return flac.getvalue(), len(samples), rate


# ---- Blocks ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _blocks(file: File) -> Iterator[tuple[Iterator[np.ndarray], int, int | None]]:
    """Opens `file`: its mono blocks (int16 [n]), its rate in Hz, and its length in frames.

    The length is None where only decoding tells it.
    """
    part = file if isinstance(file, Segment) else None
    with decoders.opened(part.file if part else file) as decoder:
        if part is None:
            yield _mono(decoder.blocks(), decoder, _name(file)), decoder.rate, decoder.frames
            return
        start = round(part.offset * decoder.rate)
        stop = max(start + 1, round((part.offset + part.duration) * decoder.rate))
        if decoder.frames is not None and stop - decoder.frames > decoders.SLACK * decoder.rate:
            raise AudioError(
                f"{_name(file)}: the file ends at {decoder.frames / decoder.rate:.2f} s; correct "
                "the segment"
            )
        if decoder.seeks:
            blocks = _mono(decoder.blocks(start, stop), decoder, _name(file))
        else:
            blocks = _cut(_whole(part.file, decoder), start, stop, _name(file), decoder.rate)
        yield blocks, decoder.rate, stop - start


def _mono(
    blocks: Iterator[np.ndarray], decoder: decoders.Decoder, name: str
) -> Iterator[np.ndarray]:
    """Averages the channels [n, channels] to int16 [n], and judges whether it can be speech."""
    position, power, mixed = 0, 0.0, 0.0
    for block in blocks:
        if decoder.floating:
            _check_float(block, position / decoder.rate, decoder.rate, name)
            block = np.clip(block, -1.0, 1.0) * np.float32(32768)
        if block.shape[1] == 1:
            mono = _to_int16(block[:, 0])
        else:
            mean = block.mean(axis=1, dtype=np.float32)
            mono = _to_int16(mean)
            power += float(np.mean(np.square(block, dtype=np.float32))) * len(block)
            mixed += float(np.vdot(mean, mean))
        position += len(mono)
        yield mono
    if power > position and mixed <= _CANCELLED * power:
        raise AudioError(
            f"{name}: its {decoder.channels} channels cancel when they are averaged; keep one of "
            "them, or turn one around"
        )


def _check_float(block: np.ndarray, seconds: float, rate: int, name: str) -> None:
    peak = max(float(block.max()), -float(block.min()))  # NaN if there is one
    if not math.isfinite(peak):
        finite = np.isfinite(block).all(axis=1)
        first = seconds + int(np.argmin(finite)) / rate
        raise AudioError(
            f"{name}: {len(finite) - int(finite.sum())} NaN or infinite samples, the first at "
            f"{first:.3f} s"
        )
    if peak > _LOUDEST:
        raise AudioError(
            f"{name}: float samples up to {peak:,.0f}, where full scale is 1; they are in "
            "units of integers: write it again as integers, or divided by 32768"
        )


def _resampled(blocks: Iterator[np.ndarray], rate: float, new_rate: float) -> Iterator[np.ndarray]:
    """Resamples int16 blocks to ceil(all * new_rate / rate) int16 samples, whatever the blocks."""
    if rate == new_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, new_rate, 1, dtype="float32", quality="HQ")
    # soxr rounds the length to nearest: some silence behind the end leaves enough to cut from.
    behind = np.zeros(math.ceil(rate / new_rate), np.float32)
    taken = given = 0
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        taken += len(block)
        values = block.astype(np.float32)
        if following is None:
            values = np.concatenate([values, behind])
        resampled = _to_int16(stream.resample_chunk(values, last=following is None))
        length = math.ceil(taken * new_rate / rate)
        yield resampled[: length - given]
        given += len(resampled)
        block = following


def _join(file: File, blocks: Iterator[np.ndarray], rate: int) -> np.ndarray:
    """Joins int16 blocks, up to the length that one piece of audio may have; warns of silence."""
    first = next(blocks, None)
    second = None if first is None else next(blocks, None)
    if first is None or (len(first) == 0 and second is None):
        raise AudioError(f"{_name(file)}: holds no samples")
    if second is None:
        return _not_silent(file, first)
    whole = bytearray(first)
    while second is not None:
        whole += memoryview(second).cast("B")
        _check_length(file, len(whole) // 2, rate)
        second = next(blocks, None)
    return _not_silent(file, np.frombuffer(whole, np.int16))


def _not_silent(file: File, samples: np.ndarray) -> np.ndarray:
    """The samples; a warning where all are 0."""
    if not samples[::101].any() and not samples.any():
        decoders.warn_once(
            f"{_name(file)}: digital silence, every sample is 0; check the recording"
        )
    return samples


def _check_length(file: File, samples: float, rate: int) -> None:
    if samples > _MOST:
        raise AudioError(
            f"{_name(file)}: longer than {_MOST / rate / 3600:.1f} hours; cut it into files or "
            "into segments (offset and duration in a manifest)"
        )


# ---- Segments of files that cannot seek --------------------------------------------------------

_recordings: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
_lock = threading.Lock()


def _whole(file: str | BinaryIO, decoder: decoders.Decoder) -> Iterator[np.ndarray]:
    """Yields the mono blocks of a whole file: decoded once, if it is short enough to be kept."""
    if not isinstance(file, (str, os.PathLike)):
        return _mono(decoder.blocks(), decoder, name_of(file))
    stat = os.stat(file)
    key = (os.fspath(file), stat.st_size, stat.st_mtime_ns)
    with _lock:  # of several threads that want the same file one decodes it
        if key in _recordings:
            _recordings.move_to_end(key)
            return iter([_recordings[key]])
        blocks, size = [], 0
        rest = _mono(decoder.blocks(), decoder, name_of(file))
        for block in rest:
            blocks.append(block)
            size += len(block)
            if size > _KEPT:
                return itertools.chain(blocks, rest)
        _recordings[key] = np.concatenate([np.zeros(0, np.int16), *blocks])
        while sum(map(len, _recordings.values())) > _KEPT:
            _recordings.popitem(last=False)
        return iter([_recordings[key]])


def _cut(
    blocks: Iterator[np.ndarray], start: int, stop: int, name: str, rate: int
) -> Iterator[np.ndarray]:
    position = 0
    for block in blocks:
        piece = block[max(0, start - position) : max(0, stop - position)]
        position += len(block)
        if len(piece):
            yield piece
        if position >= stop:
            return
    if stop - position > decoders.SLACK * rate:
        raise AudioError(f"{name}: the file ends at {position / rate:.2f} s; correct the segment")


def _name(file: File) -> str:
    if isinstance(file, Segment):
        return f"{name_of(file.file)} from {file.offset:g} s for {file.duration:g} s"
    return name_of(file)


def _to_int16(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.int16:
        return np.ascontiguousarray(samples)
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)
