"""Audio files to int16 samples: decode, resample, change speed, add noise. numpy in, numpy out."""

import io
import math
import os
import re
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from speech_jax.errors import UserError

# Extensions of the formats that soundfile opens from their content alone (no headerless PCM).
EXTENSIONS = frozenset(
    ["aif", "aifc", "aiff", "au", "caf", "flac", "mp3", "nist", "oga", "ogg", "opus", "rf64", "snd"]
    + ["sph", "w64", "wav", "wave", "wavex"]
)

# Encodings whose samples soundfile converts to int16 without a choice of scale; the others are
# floating point (float WAV, Opus, Vorbis, MP3) and full scale is 1.0.
_INTEGER = frozenset({"PCM_16", "PCM_24", "PCM_32", "PCM_S8", "PCM_U8", "ULAW", "ALAW"})

# How libsndfile's log tells that a file ends before the end that its own structure promises.
_CUT_OGG = re.compile(r"lacks an end-of-stream|Junk after the last page|ended unexpectedly")
_CUT_CHUNK = re.compile(r"^\s*(?:data|SSND|riff|Data Size) *: (\d+) \(should be (\d+)\)", re.M)
# Sizes from here up stand for "unknown" in files written to a pipe: not a sign of a cut.
_UNKNOWN_SIZE = 0x7FFF0000
# A decoded file may miss this many seconds of what its header says (MP3 padding).
_SLACK = 0.1


class AudioError(UserError):
    """An audio file that cannot be used; the message names the file and the reason."""


def decode(file: str | BinaryIO, sample_rate: int) -> np.ndarray:
    """Returns the audio of `file` as int16 [T] at `sample_rate` Hz, mono.

    16-bit mono PCM at `sample_rate` comes through unchanged. Raises AudioError for a file that is
    missing, empty, truncated, not audio, or holds NaN or infinite samples.
    """
    samples, native_rate = read(file)
    return resample(samples, native_rate, sample_rate)


def read(file: str | BinaryIO) -> tuple[np.ndarray, int]:
    """Returns (int16 [T], rate in Hz) of `file` at its own rate, channels averaged to mono.

    Quantizing before resampling makes the samples independent of the container: a prepared copy
    of the corpus (16-bit FLAC at the file's own rate) decodes to the same bits as the original.
    """
    with _open(file) as sound:
        integer = sound.subtype in _INTEGER
        try:
            samples = sound.read(dtype="int16" if integer else "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{name_of(file)}: cannot be decoded ({_reason(error)}); it is truncated or damaged"
            ) from error
        rate, promised = sound.samplerate, sound.frames
    if len(samples) == 0:
        raise AudioError(f"{name_of(file)}: holds no samples")
    if promised - len(samples) > _SLACK * rate:
        raise AudioError(
            f"{name_of(file)}: truncated, it holds {len(samples) / rate:.2f} s of the "
            f"{promised / rate:.2f} s in its header"
        )
    if not integer:
        finite = np.isfinite(samples).all(axis=1)
        if not finite.all():
            first = int(np.argmin(finite))
            raise AudioError(
                f"{name_of(file)}: {len(finite) - int(finite.sum())} NaN or infinite samples, the "
                f"first at {first / rate:.3f} s"
            )
        samples = np.clip(samples, -1.0, 1.0) * np.float32(32768)
    if samples.shape[1] == 1:
        return _to_int16(samples[:, 0]), rate
    return _to_int16(samples.mean(axis=1, dtype=np.float32)), rate


def duration(file: str | BinaryIO) -> float:
    """Returns the length of `file` in seconds, from its header. Raises AudioError as `decode`."""
    with _open(file) as sound:
        if sound.frames <= 0:
            raise AudioError(f"{name_of(file)}: holds no samples")
        return sound.frames / sound.samplerate


def resample(samples: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Resamples int16 [T] from `rate` to `new_rate` Hz: int16 [ceil(T * new_rate / rate)]."""
    if rate == new_rate:
        return samples
    length = math.ceil(len(samples) * new_rate / rate)
    # soxr rounds the length to nearest: some silence behind the end leaves enough to cut from.
    padded = np.pad(samples.astype(np.float32), (0, math.ceil(rate / new_rate)))
    return _to_int16(soxr.resample(padded, rate, new_rate, quality="HQ")[:length])


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


def name_of(file: str | BinaryIO) -> str:
    """Returns what to call `file` in a message: its path, or the name of the stream."""
    if isinstance(file, (str, os.PathLike)):
        return os.fspath(file)
    return str(getattr(file, "name", "audio stream"))


def _open(file: str | BinaryIO) -> soundfile.SoundFile:
    """Opens `file`, turning what libsndfile says of a bad one into an AudioError."""
    if isinstance(file, (str, os.PathLike)):
        if not os.path.isfile(file):
            raise AudioError(f"{name_of(file)}: no such file")
        size = os.path.getsize(file)
    else:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    if size == 0:
        raise AudioError(f"{name_of(file)}: the file is empty (0 bytes)")
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:
        # TypeError: soundfile takes an extension like .raw for headerless PCM and asks for a rate.
        raise AudioError(
            f"{name_of(file)}: not audio that soundfile can read ({_reason(error)})"
        ) from error
    log = sound.extra_info
    cut = _CUT_OGG.search(log) is not None or any(
        int(promised) > int(actual) and int(promised) < _UNKNOWN_SIZE
        for promised, actual in _CUT_CHUNK.findall(log)
    )
    if cut:
        sound.close()
        raise AudioError(f"{name_of(file)}: truncated, the file ends before its audio does")
    return sound


def _reason(error: Exception) -> str:
    """Returns what libsndfile says went wrong, without the prefix that soundfile adds."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


def _to_int16(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.int16:
        return np.ascontiguousarray(samples)
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)


def to_flac(file: str) -> tuple[bytes, int, int]:
    """Returns (FLAC file, samples, rate) of the audio at `file`, for `read` the same as `file`.

    A FLAC file comes back byte for byte (after a full decode, which finds damage); anything else
    is stored as 16-bit mono FLAC at its own rate. Raises AudioError as `decode`.
    """
    samples, rate = read(file)
    with open(file, "rb") as stream:
        if stream.read(4) == b"fLaC":
            return b"fLaC" + stream.read(), len(samples), rate
    flac = io.BytesIO()
    soundfile.write(flac, samples, rate, format="FLAC", subtype="PCM_16")
    return flac.getvalue(), len(samples), rate
