"""Greedy decoding of CTC, and the frames of labels that are known, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.ops import masking
from speech_jax.ops.ctc import ctc_align


class Path(NamedTuple):
    """A path through the frames, as labels that are packed left and filled with blanks.

    labels: int32 [B, T]; count: int32 [B], labels in each row; starts, ends: int32 [B, T], the
    frames [start, end) that each label is emitted in, -1 beyond `count`; sure: float32 [B, T], the
    largest probability of each label in its frames, 0 beyond; score: float32 [B], the path's log
    probability.
    """

    labels: jax.Array
    count: jax.Array
    starts: jax.Array
    ends: jax.Array
    sure: jax.Array
    score: jax.Array


def greedy(
    logits: jax.Array, lengths: jax.Array, *, blank_id: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The best label of every frame, repeats merged and blanks removed (Graves et al. 2006).

    Args:
      logits: [B, T, K]; lengths: int32 [B], frames.

    Returns:
      (labels int32 [B, T], packed left and filled with blanks; label counts int32 [B]).
    """
    return best_path(logits, lengths, blank_id=blank_id)[:2]


def best_path(logits: jax.Array, lengths: jax.Array, *, blank_id: int = 0) -> Path:
    """What `greedy` finds, with the frames and the probabilities of its labels."""
    batch, frames, _ = logits.shape
    valid = masking.length_mask(lengths, frames)
    best = first_largest(logits)  # [B, T]
    most = jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
    previous = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=blank_id)
    spoken = (best != blank_id) & valid
    first = spoken & (best != previous)
    # The label that a frame belongs to, `frames` for none: what is written there is dropped.
    place = jnp.where(spoken, jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1, frames)
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], place.shape)
    time = jnp.broadcast_to(jnp.arange(frames, dtype=jnp.int32)[None], place.shape)
    fill = lambda value, dtype: jnp.full((batch, frames), value, dtype).at[rows, place]
    ends = fill(-1, jnp.int32).max(time + 1, mode="drop")
    starts = fill(frames, jnp.int32).min(time, mode="drop")
    return Path(
        labels=fill(blank_id, jnp.int32).set(best, mode="drop"),
        count=first.sum(axis=1, dtype=jnp.int32),
        starts=jnp.where(ends < 0, -1, starts),
        ends=ends,
        sure=fill(0, jnp.float32).max(jnp.exp(most), mode="drop"),
        score=jnp.where(valid, most, 0).sum(axis=1),
    )


def first_largest(x: jax.Array) -> jax.Array:
    """Argmax over the last axis, int32, in two reductions: XLA's own is slow on a CPU."""
    size = x.shape[-1]
    place = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    largest = x == x.max(axis=-1, keepdims=True)  # nowhere, if one is not a number
    return jnp.where(largest, place, size - 1).min(axis=-1)


def aligned(logits: jax.Array, lengths: jax.Array, labels: jax.Array, count: jax.Array) -> Path:
    """The best path of labels int32 [B, T] of which each row has `count` [B]; the blank is 0."""
    frames = logits.shape[1]
    starts, ends, score = ctc_align(logits, lengths, labels, count)
    rows = jnp.broadcast_to(jnp.arange(len(labels))[:, None], labels.shape)
    # The label of each frame: the last one that has begun, if it is not over.
    begun = jnp.zeros(labels.shape, jnp.int32)
    begun = begun.at[rows, jnp.where(starts < 0, frames, starts)].add(1, mode="drop")
    place = jnp.cumsum(begun, axis=1) - 1
    pick = lambda x: jnp.take_along_axis(x, jnp.maximum(place, 0), axis=1)
    inside = (place >= 0) & (jnp.arange(frames)[None] < pick(ends))
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = jnp.take_along_axis(log_probs, pick(labels)[..., None], axis=2)[..., 0]
    sure = jnp.zeros(labels.shape, jnp.float32)
    sure = sure.at[rows, jnp.where(inside, place, frames)].max(jnp.exp(own), mode="drop")
    return Path(labels, count, starts, ends, sure, score)
