"""The acoustic front end: waveform to normalized log-mel, inside the jitted step.

The filterbank follows Kaldi's conventions (frames that fit entirely in the signal, offset removal
and pre-emphasis per frame, HTK mel scale), so that it can be checked against an independent
implementation; samples are floats in [-1, 1).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.ops import convolution, masking, partition

LOG_FLOOR = float(np.finfo(np.float32).eps)


def to_waveform(audio: jax.Array) -> jax.Array:
    """PCM int16 [B, T] to float32 in [-1, 1); floats (a perturbed waveform) pass unchanged."""
    if jnp.issubdtype(audio.dtype, jnp.integer):
        return audio.astype(jnp.float32) / 32768.0
    return audio


def frame_geometry(sample_rate: int, window_ms: float, hop_ms: float) -> tuple[int, int]:
    """Window and hop in samples."""
    return round(sample_rate * window_ms / 1000), round(sample_rate * hop_ms / 1000)


def frame_count(
    samples: int | np.ndarray | jax.Array, window: int, hop: int
) -> int | np.ndarray | jax.Array:
    """How many whole windows fit in `samples`."""
    return convolution.output_length(samples, window, hop)


def log_mel(
    audio: jax.Array,
    lengths: jax.Array,
    *,
    sample_rate: int = 16_000,
    mels: int = 80,
    low_hz: float = 20.0,
    high_hz: float | None = None,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    preemphasis: float = 0.97,
    floor: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-mel energies of ragged waveforms.

    Args:
      audio: float32 [B, T] in [-1, 1), zero-padded right.
      lengths: int32 [B], samples.
      high_hz: upper edge of the last filter; None is the Nyquist frequency.
      floor: added to the energies before the logarithm, so that quieter sounds hardly show.

    Returns:
      ([B, F, mels] float32, frames int32 [B]). Frames hold valid samples only, so padding never
      reaches them; rows are zero past their frame count.
    """
    window, hop = frame_geometry(sample_rate, window_ms, hop_ms)
    if audio.shape[1] < window:
        raise UserError(f"audio has {audio.shape[1]} samples, shorter than a window of {window}")
    frames = _frame(audio, window, hop)
    frames = frames - frames.mean(axis=-1, keepdims=True)
    previous = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    taper = np.hanning(window).astype(np.float32) ** 0.85  # Kaldi's "povey" window
    frames = (frames - preemphasis * previous) * taper.reshape(1, 1, window)
    fft_size = 1 << (window - 1).bit_length()
    # The compiler does not know that a Fourier transform can be split by rows.
    spectrum = partition.by_rows(lambda x: jnp.fft.rfft(x, n=fft_size))(frames)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = mel_filters(mels, fft_size, sample_rate, low_hz, high_hz or sample_rate / 2)
    energies = jnp.einsum("bfk,km->bfm", power, filters, precision=jax.lax.Precision.HIGHEST)
    features = jnp.log(jnp.maximum(energies, LOG_FLOOR) + floor)
    frame_lengths = frame_count(lengths, window, hop)
    valid = masking.length_mask(frame_lengths, features.shape[1])[:, :, None]
    return jnp.where(valid, features, 0.0), frame_lengths


def _frame(audio: jax.Array, window: int, hop: int) -> jax.Array:
    """[B, T] to overlapping windows [B, F, window], by slices and reshapes (no gather)."""
    batch, samples = audio.shape
    frames = frame_count(samples, window, hop)
    pieces = math.ceil(window / hop)
    audio = convolution.at_length(audio, (frames + pieces - 1) * hop)
    hops = audio.reshape(batch, frames + pieces - 1, hop)
    overlapping = [
        jax.lax.slice_in_dim(hops, piece, piece + frames, axis=1) for piece in range(pieces)
    ]
    return jnp.concatenate(overlapping, axis=-1)[..., :window]


def hz_to_mel(hz: float | np.ndarray) -> np.ndarray:
    """Place on the HTK mel scale, float64."""
    return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)


def mel_to_hz(mel: float | np.ndarray) -> np.ndarray:
    """The inverse of `hz_to_mel`."""
    return 700.0 * np.expm1(np.asarray(mel, np.float64) / 1127.0)


@functools.cache
def mel_filters(
    mels: int, fft_size: int, sample_rate: int, low_hz: float, high_hz: float
) -> np.ndarray:
    """Triangular filters [fft_size // 2 + 1, mels], equally spaced on the HTK mel scale."""
    if not 0 <= low_hz < high_hz <= sample_rate / 2:
        raise UserError(
            f"mel filters need 0 <= low_hz < high_hz <= {sample_rate / 2:g} (half the sample "
            f"rate), got low_hz={low_hz:g}, high_hz={high_hz:g}"
        )

    edges = np.linspace(hz_to_mel(low_hz), hz_to_mel(high_hz), mels + 2)
    bins = hz_to_mel(np.arange(fft_size // 2 + 1) * sample_rate / fft_size)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling))
    filters[-1] = 0.0  # Kaldi leaves the Nyquist bin out
    return filters.astype(np.float32)


def normalize(
    features: jax.Array,
    lengths: jax.Array,
    mean: jax.Array | None = None,
    std: jax.Array | None = None,
) -> jax.Array:
    """Zero mean and unit variance for every feature dimension, over valid frames.

    Args:
      features: float32 [B, F, M]; lengths: int32 [B], frames.
      mean, std: float32 [M] of a corpus ("global" normalization); None takes each utterance's own.
    """
    valid = masking.length_mask(lengths, features.shape[1])[:, :, None]
    if mean is None:
        mean, variance = masking.masked_mean_and_variance(features, valid, axes=(1,))
        scale = jax.lax.rsqrt(variance + 1e-5)
    else:
        mean, scale = mean.reshape(1, 1, -1), 1.0 / std.reshape(1, 1, -1)
    return jnp.where(valid, (features - mean) * scale, 0.0)


def cosine_transform(x: jax.Array, count: int, axis: int) -> jax.Array:
    """The first `count` coefficients of the orthonormal DCT-II along an axis, or all there are.

    Of log-mel over the mels they are cepstra (Davis and Mermelstein 1980): the shape of a spectrum
    in coordinates that are nearly uncorrelated.
    """
    # As a product: the compiler does not know that a Fourier transform can be split by rows.
    matrix = cosines(x.shape[axis])[:, :count].astype(np.float32)
    product = jnp.tensordot(x, matrix, ((axis,), (0,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, -1, axis)


def cosines(size: int) -> np.ndarray:
    """The matrix of the orthonormal DCT-II: float64 [size, coefficients]."""
    index = np.arange(size)
    # In units of an angle of pi / (2 size), reduced to a turn and exact where the cosine is 0.
    angle = np.outer(2 * index + 1, index) % (4 * size)
    matrix = np.cos(np.pi / (2 * size) * angle) * np.sqrt(2 / size)
    matrix[angle % (2 * size) == size] = 0.0
    matrix[:, 0] = np.sqrt(1 / size)
    return matrix
