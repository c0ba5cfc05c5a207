"""Masks: of lengths, of random spans; statistics that count only where one holds."""

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


def random_spans(
    rng: jax.Array, lengths: jax.Array, size: int, fraction: float, span: int, minimum: int = 2
) -> jax.Array:
    """Bool [B, size]: spans of `span` positions, each inside its row's length; they may overlap.

    A row of length L gets fraction * L / span spans, rounded at random up or down (the same way
    for all rows), at least `minimum`, at distinct starts drawn uniformly; none where L < span.
    """
    rounding_rng, start_rng = jax.random.split(rng)
    starts = jnp.maximum(lengths - (span - 1), 0)
    wanted = fraction * lengths.astype(jnp.float32) / span + jax.random.uniform(rounding_rng)
    count = jnp.minimum(jnp.maximum(wanted.astype(lengths.dtype), minimum), starts)
    order = jax.random.uniform(start_rng, (lengths.shape[0], size))
    order = jnp.where(length_mask(starts, size), order, -1.0)
    rank = jnp.argsort(jnp.argsort(-order, axis=1), axis=1)
    begun = jnp.cumsum(rank < count[:, None], axis=1, dtype=jnp.int32)
    ended = jnp.pad(begun, ((0, 0), (span, 0)))[:, :size]
    return begun > ended
