"""From logits to label sequences, on the device."""

import jax
import jax.numpy as jnp

from speech_jax.ops import masking


def greedy(
    logits: jax.Array, lengths: jax.Array, *, blank_id: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The best label of every frame, repeats merged and blanks removed (Graves et al. 2006).

    Args:
      logits: [B, T, K]; lengths: int32 [B], frames.

    Returns:
      (labels int32 [B, T], packed left and filled with blanks; label counts int32 [B]).
    """
    batch, frames, _ = logits.shape
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    previous = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=blank_id)
    keep = (best != blank_id) & (best != previous) & masking.length_mask(lengths, frames)
    place = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, frames)  # frames: dropped
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], place.shape)
    labels = jnp.full((batch, frames), blank_id, jnp.int32).at[rows, place].set(best, mode="drop")
    return labels, keep.sum(axis=1, dtype=jnp.int32)
