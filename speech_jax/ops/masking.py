"""Lengths to masks and back."""

import jax
import jax.numpy as jnp


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Bool [B, size], True where a position lies before its row's length (lengths: int [B])."""
    return jnp.arange(size, dtype=lengths.dtype)[None, :] < lengths[:, None]


def masked_mean_and_variance(
    x: jax.Array, mask: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of `x` over `axes` (kept as size 1), counting only where `mask`.

    `mask` has the rank of `x` and broadcasts against it. Statistics are float32; with nothing to
    count both are 0.
    """
    x = x.astype(jnp.float32)
    weight = jnp.broadcast_to(mask, x.shape).astype(jnp.float32)
    count = jnp.maximum(weight.sum(axes, keepdims=True), 1.0)
    mean = (x * weight).sum(axes, keepdims=True) / count
    variance = (jnp.square(x - mean) * weight).sum(axes, keepdims=True) / count
    return mean, variance


def span_mask(rng: jax.Array, lengths: jax.Array, widths: jax.Array, size: int) -> jax.Array:
    """Bool [B, size]: the union of n spans a row, each inside its row's length.

    widths: int [B, n], the largest width of each span; the width is drawn uniformly from
    [0, width] and the start uniformly from where the span fits (SpecAugment, Park et al. 2019).
    """
    width_rng, start_rng = jax.random.split(rng)
    limit = lengths[:, None]
    width = jnp.minimum(_uniform_up_to(width_rng, widths), limit)
    start = _uniform_up_to(start_rng, limit - width)
    position = jnp.arange(size, dtype=lengths.dtype)[None, None, :]
    inside = (position >= start[:, :, None]) & (position < (start + width)[:, :, None])
    return inside.any(axis=1)


def _uniform_up_to(rng: jax.Array, maximum: jax.Array) -> jax.Array:
    """Integers drawn uniformly from [0, maximum], elementwise."""
    fraction = jax.random.uniform(rng, maximum.shape)
    drawn = jnp.floor(fraction * (maximum.astype(jnp.float32) + 1.0)).astype(maximum.dtype)
    return jnp.minimum(drawn, maximum)
