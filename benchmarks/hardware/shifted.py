"""The depthwise convolution as a sum of shifted products, to try where it is lax.conv."""

import jax
import jax.numpy as jnp


def depthwise(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Stands for ops.convolution.depthwise: x [B, T, D], weight [K, D], bias [D]."""
    kernel, frames = weight.shape[0], x.shape[1]
    left = (kernel - 1) // 2
    padded = jnp.pad(x, ((0, 0), (left, kernel - 1 - left), (0, 0)))
    total = jnp.zeros((), x.dtype) if bias is None else bias[None, None]
    for tap in range(kernel):
        total = total + padded[:, tap : tap + frames] * weight[tap][None, None]
    return total
