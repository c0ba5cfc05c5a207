"""Samples of a waveform as what a model can predict: mu-law classes, or a mixture of logistics.

Waveforms are floats in [-1, 1).
"""

import math

import jax
import jax.numpy as jnp

from speech_jax.ops import masking

CLASSES = 256  # of mu-law in 8 bits
_MU = CLASSES - 1
# The narrowest logistic, as its log: a few steps of 16 bits.
_NARROWEST = -9.0
_STEP = 2.0**-15  # from one sample of 16 bits to the next

# ---- Mu-law ------------------------------------------------------------------------------------


def compress(x: jax.Array) -> jax.Array:
    """Mu-law (ITU-T G.711, in its continuous form): [-1, 1] to [-1, 1], finer where it is quiet."""
    sign = _sign(x)
    return sign * jnp.log1p(_MU * jnp.minimum(sign * x, 1.0)) / math.log1p(_MU)


def expand(y: jax.Array) -> jax.Array:
    """The inverse of `compress`."""
    sign = _sign(y)
    return sign * jnp.expm1(sign * y * math.log1p(_MU)) / _MU


def _sign(x: jax.Array) -> jax.Array:
    """1 or -1: with a 0, silence would have no gradient."""
    return jnp.where(x < 0, -1.0, 1.0)


def classes(x: jax.Array) -> jax.Array:
    """The mu-law class of each sample, int32 0 to 255."""
    return jnp.round((compress(x) + 1.0) * (_MU / 2)).astype(jnp.int32)


def level(classes: jax.Array) -> jax.Array:
    """What `compress` makes of the samples that classes stand for: float32 in [-1, 1]."""
    return classes.astype(jnp.float32) * (2 / _MU) - 1.0


def class_nats(logits: jax.Array, x: jax.Array) -> jax.Array:
    """Nats [...] of samples x [...] by logits of their classes [..., 256]."""
    chosen = jnp.take_along_axis(logits, classes(x)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def draw_class(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Samples [...] drawn from logits of classes [..., 256], by uniform numbers [..., 2]."""
    total = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    below = total <= uniform[..., :1] * total[..., -1:]
    return expand(level(jnp.minimum(below.sum(axis=-1), _MU)))


# ---- Mixture of logistics ----------------------------------------------------------------------


def logistics_nats(mixture: jax.Array, x: jax.Array) -> jax.Array:
    """Nats [...] of samples of 16 bits by a discretized mixture (Salimans et al. 2017).

    The probability of a sample is that of the interval around it, half a step to each side, and
    the outermost intervals have no end: all 65536 sum to 1.

    Args:
      mixture: float32 [..., 3 K]: K logits of weights, means, logs of scales.
      x: float32 [...], multiples of 2**-15.
    """
    weight, mean, scale = _parts(mixture)
    x = x[..., None]
    above = (x + (_STEP / 2) - mean) / scale
    below = (x - (_STEP / 2) - mean) / scale
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), without a cancellation.
    log_above = jnp.where(x > 1 - 1.5 * _STEP, 0.0, jax.nn.log_sigmoid(above))
    log_below = jnp.where(x < -1 + _STEP / 2, 0.0, jax.nn.log_sigmoid(-below))
    inner = (x <= 1 - 1.5 * _STEP) & (x >= -1 + _STEP / 2)
    log_between = jnp.where(inner, jnp.log(-jnp.expm1(-_STEP / scale)), 0.0)
    return -jax.nn.logsumexp(weight + log_above + log_below + log_between, axis=-1)


def draw_logistic(mixture: jax.Array, uniform: jax.Array) -> jax.Array:
    """Samples [...], multiples of 2**-15, drawn from mixtures [..., 3 K] by uniforms [..., 2]."""
    weight, mean, scale = _parts(mixture)
    total = jnp.cumsum(jnp.exp(weight), axis=-1)
    below = total <= uniform[..., :1] * total[..., -1:]
    chosen = jnp.minimum(below.sum(axis=-1, keepdims=True), weight.shape[-1] - 1)
    mean, scale = (jnp.take_along_axis(each, chosen, axis=-1)[..., 0] for each in (mean, scale))
    inside = jnp.clip(uniform[..., 1], 1e-5, 1 - 1e-5)
    x = mean + scale * (jnp.log(inside) - jnp.log1p(-inside))
    return jnp.clip(jnp.round(x / _STEP) * _STEP, -1.0, 1 - _STEP)


def _parts(mixture: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-weights, means and scales, each [..., K]."""
    weight, mean, log_scale = jnp.split(mixture, 3, axis=-1)
    return jax.nn.log_softmax(weight), mean, jnp.exp(jnp.maximum(log_scale, _NARROWEST))


# ---- Frames of it ------------------------------------------------------------------------------


def interpolate(frames: jax.Array, hop: int, length: int) -> jax.Array:
    """[B, F, C] to [B, length, C]: sample f * hop is frame f, and lines lead to the next one.

    Behind the last frame they lead to 0.
    """
    batch, count, width = frames.shape
    wanted = -(-length // hop)
    frames = jnp.pad(frames, ((0, 0), (0, max(wanted + 1 - count, 0)), (0, 0)))[:, : wanted + 1]
    share = (jnp.arange(hop) / hop).astype(frames.dtype)[None, None, :, None]
    first, second = frames[:, :-1, None], frames[:, 1:, None]
    mixed = first * (1 - share) + second * share  # [B, F, hop, C]
    return mixed.reshape(batch, wanted * hop, width)[:, :length]


def masked_sum(nats: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sums [B] over the valid samples of nats [B, T]."""
    valid = masking.length_mask(lengths, nats.shape[1])
    return jnp.where(valid, nats, 0.0).sum(axis=1)
