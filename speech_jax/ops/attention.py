"""Attention over valid keys, as one kernel where the platform has one.

On GPUs, cuDNN's attention writes no scores [B, H, T, S] to memory. It takes lengths in place of a
mask, computes in bfloat16 or float16, and cannot drop weights by our hash (models/layers.py).
Elsewhere, and where any of this does not fit, scores, softmax and sum are separate.

Shapes: B rows, T queries, S keys, H heads of W.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.ops import partition

# Frames that cuDNN's attention is given a whole number of: it refuses odd ones.
_FRAMES = 8


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    divisor: float = 1.0,
) -> jax.Array:
    """The sum [B, T, H, W] of the values, weighted by the softmax of the scores over `divisor`.

    Args:
      query: [B, T, H, W]; key, value: [B, S, H, W].
      mask: bool [B, S], True in front, for the keys that may be attended to; or [B or 1, T, S],
        those of each query.
      drop: what is done to the weights [B, H, T, S], if anything.
    """
    if drop is None and mask.ndim == 2 and _has_kernel(query):
        return _fused(query, key, value, mask, divisor)
    scores = jnp.einsum("bthd,bshd->bhts", query, key)
    return weigh(scores, value, mask, drop, divisor)


def weigh(
    scores: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    divisor: float = 1.0,
) -> jax.Array:
    """`attend`, for scores [B, H, T, S] that were computed before; the softmax is float32."""
    scores = scores.astype(jnp.float32) / np.float32(divisor)
    # Finite, so that a row without a single valid frame stays free of NaN.
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]  # [B, 1, 1 or T, S]
    scores = jnp.where(mask, scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


def _has_kernel(query: jax.Array) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and query.shape[-1] in range(8, 129, 8)
    return fits and partition.platform() == "gpu" and not partition.for_several() and _is_recent()


def _is_recent() -> bool:
    """Whether JAX's own GPU is of NVIDIA and has the kernel: from Ampere on.

    Without a GPU of its own, a program is compiled for another machine, which is taken to have it.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        return True
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return major.isdigit() and int(major) >= 8


def _fused(query, key, value, mask, divisor, implementation="cudnn"):
    frames = query.shape[1]
    queries = jnp.full(len(query), frames, jnp.int32)
    # A row without a valid key attends to its first one: what comes of it is masked later.
    keys = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % _FRAMES), (0, 0), (0, 0)))
        for x in (query, key, value)
    )
    context = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=1 / divisor,
        query_seq_lengths=queries,
        key_value_seq_lengths=keys,
        implementation=implementation,
    )
    return context[:, :frames]
