"""Pruned transducers: a band of the lattice, and the loss of the paths in it.

Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training" (2022): a joint that is a mere
sum (transducer.simple_joint) finds where the paths are, and the real one is computed there alone.

The recursion runs over frames. In the shapes below B are rows, T frames, U labels of a row, U1 =
U + 1, S the positions of a frame that are in the band.
"""

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.ops.transducer import Joint, arcs_gradient, scan
from speech_jax.ops.wide import (
    Wide,
    normalized,
    power_of_two,
    wide_exp,
    wide_indicator,
    wide_nats,
    wide_over,
    wide_sum,
    wide_times,
    wide_zeros,
)


def band(occupancy: jax.Array, frames: jax.Array, labels_length: jax.Array, span: int) -> jax.Array:
    """The first position of each frame's band, int32 [B, T].

    The bands of `span` positions hold the most occupancy (of `loss_and_occupancy`) that they can,
    begin at 0, end with the last label, and each overlaps the next: a path fits in them wherever a
    row has at most (span - 1) labels a frame.
    """
    _, _, T, U1 = occupancy.shape
    # Bands beyond a row's labels hold nothing; the last one ends with its last position.
    final = jnp.maximum(labels_length + 1 - span, 0)[:, None]  # [B, 1]
    held = jnp.cumsum(jnp.pad(occupancy.sum(axis=0), ((0, 0), (0, 0), (1, span - 1))), axis=2)
    held = held[..., span:] - held[..., :U1]  # [B, T, U1], from each start on
    start = jnp.argmax(lax.stop_gradient(held), axis=2).astype(jnp.int32)
    start = lax.cummax(start, axis=1)
    t, most = jnp.arange(T, dtype=jnp.int32)[None], span - 1  # how far a band is from the next
    last = jnp.maximum(frames - 1, 0)[:, None]
    low = jnp.maximum(final - (last - t) * most, 0)
    low = jnp.where(t >= last, final, low)
    start = jnp.clip(start, low, jnp.minimum(t * most, final))
    # No start may be too far from the next: those before are moved up.
    return lax.cummax(start - t * most, axis=1, reverse=True) + t * most


def banded_loss(
    joint: Joint, starts: jax.Array, frames: jax.Array, labels_length: jax.Array
) -> jax.Array:
    """`transducer_loss` of the paths in a band, float32 [B]; +inf where there is none.

    Args:
      joint: of a band, [B, T, S]; its durations are not looked at.
      starts: int32 [B, T], the first position of each frame in the band, as `band` makes them.
      frames, labels_length: int32 [B].
    """
    return _banded(jnp.stack(joint[:2]), starts, frames, labels_length)


@jax.custom_vjp
def _banded(arcs: jax.Array, starts: jax.Array, frames: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss [B] of arcs whose log probabilities are [2, B, T, S]."""
    return _loss_in_band(arcs, starts, frames, labels)[0]


def _banded_forward(arcs, starts, frames, labels):
    loss, occupancy = _loss_in_band(arcs, starts, frames, labels)
    return loss, (occupancy, jnp.zeros((), arcs.dtype))


def _banded_backward(residuals, cotangent):
    return arcs_gradient(*residuals, cotangent), None, None, None


_banded.defvjp(_banded_forward, _banded_backward)


def _loss_in_band(
    arcs: jax.Array, starts: jax.Array, frames: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss [B], and the occupancy of each arc [2, B, T, S].

    A step goes from frame to frame: it multiplies by a matrix of how the positions of a frame are
    reached from those of the frame before, by a blank there and labels here.
    """
    _, B, T, S = arcs.shape
    t, place = jnp.arange(T)[None, :, None], jnp.arange(S)[None, None]
    frames, labels = frames[:, None, None], labels[:, None, None]
    position = starts[..., None] + place  # [B, T, S]
    inside = (t < frames) & (position <= labels)
    blank, label = jnp.where(inside[None], arcs.astype(jnp.float32), -jnp.inf)
    label = jnp.where(position < labels, label, -jnp.inf)
    final = jnp.where((t + 1 == frames) & (position == labels), blank, -jnp.inf)
    # The frame before the first has one position, and its blank is certain.
    before = jnp.pad(blank[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    before = before.at[:, 0, 0].set(0.0)
    arrives = place - jnp.diff(starts, axis=1, prepend=0)[..., None]  # [B, T, S]
    columns = [jnp.where(arrives == 0, before, -jnp.inf)]
    for s in range(1, S):
        further = columns[-1] + label[..., s - 1, None]
        columns.append(jnp.where(arrives == s, before, further))
    steps = wide_exp(jnp.stack(columns, axis=-1).swapaxes(0, 1))  # [T, B, S from, S to]
    ends, labels_of = (wide_exp(x.swapaxes(0, 1)) for x in (final, label))  # [T, B, S]

    # Alpha, what leads to a position, and what follows it from its blank on, in one loop.
    both = lambda axis, *two: jax.tree.map(lambda *x: jnp.stack(x, axis), *two)
    back = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:0:-1]]).swapaxes(2, 3), steps)
    matrices = both(1, steps, back)  # [T, 2, B, S, S]
    added = both(1, wide_zeros((T, B, S)), jax.tree.map(lambda x: x[::-1], ends))
    begun = both(0, wide_indicator(jnp.broadcast_to(place[0] == 0, (B, S))), wide_zeros((B, S)))

    def step(states, xs):  # states: [2, B, S]
        matrix, more = xs
        ways = wide_times(jax.tree.map(lambda x: x[..., None], states), matrix)
        states = normalized(wide_sum(_summed(ways, 2), more))
        return states, states

    _, found = scan(step, begun, (matrices, added))
    alpha = jax.tree.map(lambda x: x[:, 0], found)  # [T, B, S]
    after = jax.tree.map(lambda x: x[::-1, 1], found)
    first = jax.tree.map(lambda x: x[0, :, 0], steps), jax.tree.map(lambda x: x[0], after)
    total = normalized(_summed(wide_times(*first), 1))  # [B]
    # What follows each position, from the last one back.
    at = lambda x, s: jax.tree.map(lambda v: v[..., s], x)
    onward, rest = [wide_zeros((T, B))], at(after, S - 1)
    for s in range(S - 2, -1, -1):
        onward.append(wide_times(at(labels_of, s), rest))
        rest = normalized(wide_sum(onward[-1], at(after, s)))
    onward = jax.tree.map(lambda *x: jnp.stack(x[::-1], axis=-1), *onward)
    taken = [wide_over(wide_times(alpha, one), total) for one in (after, onward)]
    return wide_nats(total), jnp.stack(taken).swapaxes(1, 2)


def _summed(x: Wide, axis: int) -> Wide:
    """The sum along an axis."""
    exponent = x.exponent.max(axis=axis, keepdims=True)
    mantissa = (x.mantissa * power_of_two(x.exponent - exponent)).sum(axis=axis)
    return Wide(mantissa, exponent.squeeze(axis))


def spread(joint: Joint, starts: jax.Array, U1: int) -> Joint:
    """A joint [B, T, S] in a band as one of all positions [B, T, U1], -inf outside of the band."""
    return jax.tree.map(lambda x: _spread(x, starts, U1), joint)


def _spread(x: jax.Array, starts: jax.Array, U1: int) -> jax.Array:
    """[B, T, S, ...] of a band to [B, T, U1, ...], -inf outside of it."""
    at = jnp.arange(U1, dtype=jnp.int32)[None, None] - starts[..., None]  # [B, T, U1]
    inside = (at >= 0) & (at < x.shape[2])
    at = jnp.clip(at, 0, x.shape[2] - 1)
    tail = (1,) * (x.ndim - 3)
    x = jnp.take_along_axis(x, at.reshape(*at.shape, *tail), axis=2)
    return jnp.where(inside.reshape(*inside.shape, *tail), x, -jnp.inf)
