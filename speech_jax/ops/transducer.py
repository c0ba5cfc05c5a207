"""Transducers: the loss, and a joint that is never materialised.

Graves, "Sequence transduction with recurrent neural networks" (2012). A path through the lattice
of T frames and U + 1 positions in the labels takes a frame with a blank, and a position with a
label; the loss is the negative log-likelihood of the labels summed over all paths. Xu et al.,
"Efficient sequence transduction by jointly predicting tokens and durations" (2023): every step of
a path also says how many frames it takes (TDT). The joint may be computed in a band of the lattice
alone (ops/transducer_band.py).

The recursions run over the diagonals of the lattice, with numbers that have an exponent of their
own (ops/wide.py), and the gradient is the occupancy of each arc. In the shapes below B are rows, T
frames, U labels of a row, U1 = U + 1, D the width of the joint, K labels with the blank (0) among
them, N durations, S the positions of a frame that are in the band.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.ops import partition
from speech_jax.ops.wide import (
    Wide,
    normalized,
    wide_exp,
    wide_indicator,
    wide_nats,
    wide_over,
    wide_pad,
    wide_sum,
    wide_times,
    wide_zeros,
)

# Logits that are computed at once: few enough that the rest of a step needs more memory, and many
# enough that the device is busy.
CHUNK = 2**23
_UNROLL = 8  # diagonals, or frames of a band, that are one program on accelerators

# What arcs do: (frames that one takes, labels that it takes), for each of them.
_Moves = tuple[tuple[int, int], ...]
_PLAIN: _Moves = ((1, 0), (0, 1))  # blank, label


class Joint(NamedTuple):
    """Log probabilities in the lattice.

    blank, label: float32 [B, T, U1], the label that follows each position; what is at position U of
    a row counts for nothing. durations: float32 [B, T, U1, N], or None. In a band S stands for U1.
    """

    blank: jax.Array
    label: jax.Array
    durations: jax.Array | None = None


# ---- The lattice -------------------------------------------------------------------------------


def transducer_loss(joint: Joint, frames: jax.Array, labels_length: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats, float32 [B]; +inf, with a gradient of 0, for no frames.

    Args:
      joint: its durations are not looked at.
      frames, labels_length: int32 [B], at most T and U.
    """
    return loss_and_occupancy(joint, frames, labels_length)[0]


def loss_and_occupancy(
    joint: Joint, frames: jax.Array, labels_length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`transducer_loss`, and how probable it is that a path takes each arc.

    That is float32 [2, B, T, U1], of blanks and of labels; no gradient flows through it.
    """
    return _lattice(_PLAIN, jnp.stack(joint[:2]), frames, labels_length)


def duration_loss(
    joint: Joint,
    frames: jax.Array,
    labels_length: jax.Array,
    values: Sequence[int],
    sigma: float = 0.0,
) -> jax.Array:
    """Negative log-likelihood in nats of labels and durations (TDT), float32 [B].

    A label takes any of the durations, a blank any but 0, and the last one, which is a blank, ends
    with the last frame.

    Args:
      values: the frames of each of the N durations, distinct; 0 and 1 must be among them, so that
        all labels fit.
      sigma: nats that every step of a path is made less probable by: the longer the steps, the
        fewer they are.
    """
    if len(set(values)) < len(values) or not {0, 1} <= set(values) or min(values) < 0:
        raise ValueError(f"durations {tuple(values)} must be distinct, with 0 and 1 among them")
    moves = [(value, 0) for value in values if value] + [(value, 1) for value in values]
    arcs = [joint.blank + joint.durations[..., n] for n, value in enumerate(values) if value]
    arcs += [joint.label + joint.durations[..., n] for n in range(len(values))]
    return _lattice(tuple(moves), jnp.stack(arcs) - sigma, frames, labels_length)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lattice(
    moves: _Moves, arcs: jax.Array, frames: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss [B], and the occupancy of arcs whose log probabilities are [A, B, T, U1].

    Where nobody asks for the occupancy, the compiler leaves it out.
    """
    T, U1 = arcs.shape[2:]
    live = _live(moves, frames, labels, T, U1)
    weights = wide_exp(_skewed(jnp.where(live, arcs.astype(jnp.float32), -jnp.inf)))
    alpha = _forward(moves, weights)
    ends = frames + labels  # the diagonal of a row's last node
    total = jax.tree.map(lambda x: _at(x, ends, labels), alpha)
    beta = _backward(moves, weights, ends, labels)
    taken = [_behind(jax.tree.map(lambda x: x[1:], beta), *move) for move in moves]
    taken = jax.tree.map(lambda *some: jnp.stack(some, axis=1), *taken)  # [D, A, B, U1]
    alpha = jax.tree.map(lambda x: x[:-1, None], alpha)
    arc = wide_times(wide_times(alpha, weights), taken)
    return wide_nats(total), _straight(wide_over(arc, total), T)


def _lattice_forward(moves, arcs, frames, labels):
    loss, occupancy = _lattice(moves, arcs, frames, labels)
    return (loss, occupancy), (occupancy, jnp.zeros((), arcs.dtype))


def _lattice_backward(moves, residuals, cotangent):
    return arcs_gradient(*residuals, cotangent[0]), None, None


def arcs_gradient(occupancy: jax.Array, like: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient by the logarithms of arcs [A, B, ...], 0 beside an infinite loss too."""
    weight = -cotangent[None, :, None, None]
    return jnp.where(occupancy > 0, occupancy * weight, 0).astype(like.dtype)


_lattice.defvjp(_lattice_forward, _lattice_backward)


def _at(x: jax.Array, diagonal: jax.Array, position: jax.Array) -> jax.Array:
    """[B] of [D + 1, B, U1], at a node of each row; along the rows, which may be split."""
    x = jnp.take_along_axis(x, diagonal[None, :, None], axis=0)
    return jnp.take_along_axis(x, position[None, :, None], axis=2)[0, :, 0]


def _live(moves: _Moves, frames: jax.Array, labels: jax.Array, T: int, U1: int) -> jax.Array:
    """Bool [A, B, T, U1]: arcs that stay within a row; into the end none but a blank."""
    t, u = jnp.arange(T)[None, :, None], jnp.arange(U1)[None, None]
    frames, labels = frames[:, None, None], labels[:, None, None]
    inside = lambda taken, label: (
        (t < frames)
        & (u + label <= labels)
        & ((t + taken < frames) | ((t + taken == frames) & (label == 0)))
        if taken
        else (t < frames) & (u + label <= labels)
    )
    return jnp.stack([inside(*move) for move in moves])


def _skewed(x: jax.Array) -> jax.Array:
    """[A, B, T, U1] to [T + U, A, B, U1]: node (t, u) at diagonal t + u, -inf where none is."""
    A, B, T, U1 = x.shape
    x = jnp.pad(x.swapaxes(2, 3), ((0, 0),) * 3 + ((0, U1),), constant_values=-jnp.inf)
    x = x.reshape(A, B, -1)[..., : U1 * (T + U1 - 1)].reshape(A, B, U1, -1)
    return jnp.moveaxis(x, 3, 0)


def _straight(x: jax.Array, T: int) -> jax.Array:
    """[T + U, A, B, U1] back to [A, B, T, U1]."""
    D, A, B, U1 = x.shape
    x = jnp.moveaxis(x, 0, 3).reshape(A, B, U1 * D)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, U1))).reshape(A, B, U1, D + 1)
    return x[..., :T].swapaxes(2, 3)


def _behind(x: Wide, taken: int, label: int) -> Wide:
    """What an arc from each of [D, B, U1] leads to, where x begins a diagonal behind its nodes."""
    D, _, U1 = x.mantissa.shape
    ahead = taken + label - 1
    x = wide_pad(x, (0, ahead), (0, 0), (0, label))
    return jax.tree.map(lambda v: v[ahead : ahead + D, :, label : label + U1], x)


def scan(step: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """lax.scan, some of its steps in one program on accelerators."""
    unroll = 1 if partition.platform() == "cpu" else _UNROLL
    return lax.scan(step, carry, xs, unroll=unroll)


def _forward(moves: _Moves, weights: Wide) -> Wide:
    """Alpha [D + 1, B, U1]: the probability of all that leads to a node."""
    D, _, B, U1 = weights.mantissa.shape
    begun = wide_indicator(jnp.broadcast_to(jnp.arange(U1)[None] == 0, (B, U1)))
    arriving = []  # the weight of each arc, at the node that it leads to
    for number, (taken, label) in enumerate(moves):
        one = jax.tree.map(lambda x, number=number: x[:, number], weights)
        one = wide_pad(one, (taken + label - 1, 0), (0, 0), (label, 0))
        arriving.append(jax.tree.map(lambda x: x[:D, :, :U1], one))
    alpha = _diagonals(moves, arriving, begun, lambda diagonal: (), jnp.arange(D), -1)
    return jax.tree.map(lambda one, all: jnp.concatenate([one[None], all]), begun, alpha)


def _backward(moves: _Moves, weights: Wide, ends: jax.Array, labels: jax.Array) -> Wide:
    """Beta [D + 1, B, U1]: the probability of all that follows a node, to its row's end."""
    D, U1 = weights.mantissa.shape[0], weights.mantissa.shape[-1]
    corner = jnp.arange(U1)[None] == labels[:, None]
    end = lambda diagonal: wide_indicator(corner & (ends == diagonal)[:, None])
    leaving = [
        jax.tree.map(lambda x, number=number: x[::-1, number], weights)
        for number in range(len(moves))
    ]
    last = end(D)
    beta = _diagonals(moves, leaving, last, lambda at: (end(at),), jnp.arange(D)[::-1], 1)
    return jax.tree.map(lambda all, one: jnp.concatenate([all[::-1], one[None]]), beta, last)


def _diagonals(
    moves: _Moves,
    weights: list[Wide],
    begun: Wide,
    added: Callable[[jax.Array], tuple[Wide, ...]],
    diagonals: jax.Array,
    side: int,
) -> Wide:
    """[D, B, U1], each diagonal from those before it: a sum over moves, and what is `added` to it.

    A move takes what lies so many diagonals back, at the same position or at the one beside it, and
    multiplies it by its weight [D, B, U1].

    Args:
      begun: [B, U1], what is before the first one.
      side: -1 for the position to the left, 1 for that to the right.
    """
    # Kept with a zero beside it, so that no shift stands between the products of a step.
    widths = (0, 0), (1, 0) if side < 0 else (0, 1)
    same, beside = slice(1, None), slice(None, -1)
    same, beside = (same, beside) if side < 0 else (beside, same)

    def step(before, xs):
        diagonal, *weight = xs
        terms = [*added(diagonal)]
        for (taken, label), factor in zip(moves, weight, strict=True):
            part = beside if label else same
            one = jax.tree.map(lambda x, part=part: x[:, part], before[taken + label - 1])
            terms.append(wide_times(one, factor))
        found = normalized(wide_sum(*terms))
        return (wide_pad(found, *widths), *before[:-1]), found

    begun = wide_pad(begun, *widths)
    before = begun, *[wide_zeros(begun.mantissa.shape)] * (max(map(sum, moves)) - 1)
    return scan(step, before, (diagonals, *weights))[1]


# ---- The joint ---------------------------------------------------------------------------------


def joint_log_probs(
    encoded: jax.Array,
    predicted: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    *,
    durations: int = 0,
    starts: jax.Array | None = None,
    span: int = 0,
    chunk: int = CHUNK,
) -> Joint:
    """The log softmax of tanh(encoded + predicted) kernel + bias at the blank and the next label.

    It is computed for some frames at a time, and computed again for the gradient: its [B, T, U1, K]
    logits never exist together.

    Args:
      encoded: [B, T, D]; predicted: [B, U1, D], what follows each position.
      kernel: [D, K + N]; bias: [K + N]; the last N are of durations, with a softmax of their own.
      labels: int32 [B, U].
      durations: N.
      starts: int32 [B, T], the first position in the band of a frame. None: everything is in it.
      span: S, the positions of a frame in the band.
      chunk: logits that are computed at once, about.

    Returns:
      The joint [B, T, U1]; in a band [B, T, S], of its positions alone (ops/transducer_band.py).
    """
    B, T, _ = encoded.shape
    U1 = predicted.shape[1]
    following = jnp.pad(labels, ((0, 0), (0, 1)))
    banded = starts is not None

    @partial(jax.checkpoint, prevent_cse=False)
    def some(encoded: jax.Array, starts: jax.Array | None) -> Joint:
        if banded:
            at = starts[..., None] + jnp.arange(span, dtype=jnp.int32)[None, None]  # [B, C, S]
            beside = jax.vmap(lambda row, at: row[at])(predicted, at)  # [B, C, S, D]
            ids = jax.vmap(lambda row, at: row[at])(following, at)
        else:
            beside, ids = predicted[:, None], following[:, None]
        hidden = jnp.tanh(encoded[:, :, None] + beside)
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = logits + bias.astype(jnp.float32)[None, None, None]
        ids = jnp.broadcast_to(ids, logits.shape[:3])
        by_duration = None
        if durations:
            by_duration = jax.nn.log_softmax(logits[..., -durations:])
            logits = logits[..., :-durations]
        return Joint(*_picked(logits, ids), by_duration)

    positions = span if banded else U1
    size = max(1, min(T, chunk // (B * positions * kernel.shape[1])))
    if size == T:
        return some(encoded, starts)
    count = -(-T // size)
    size = -(-T // count)  # pieces of equal length, so that the last one is not filler

    def split(x):  # [B, T, ...] to [count, B, size, ...]
        x = jnp.pad(x, ((0, 0), (0, count * size - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    pieces = split(encoded), split(starts) if banded else None
    found = lax.map(lambda piece: some(*piece), pieces)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:])[:, :T], found
    )


@jax.custom_vjp
def _picked(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log softmax of logits [..., K] at the blank and at ids [...]."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return logits[..., 0] - total, own - total


def _picked_forward(logits, ids):
    found = _picked(logits, ids)
    return found, (logits, ids, logits[..., 0] - found[0])


def _picked_backward(residuals, cotangents):
    # In one pass over the logits, without a scatter.
    logits, ids, total = residuals
    blank, label = (x[..., None] for x in cotangents)
    number = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    gradient = -(blank + label) * jnp.exp(logits - total[..., None])
    gradient += jnp.where(number == 0, blank, 0) + jnp.where(number == ids[..., None], label, 0)
    return gradient, None


_picked.defvjp(_picked_forward, _picked_backward)


def simple_joint(
    encoded: jax.Array, predicted: jax.Array, labels: jax.Array, lm_scale: float = 0.0
) -> Joint:
    """The log softmax of encoded + predicted at the blank and the next label, by matrix products.

    Args:
      encoded: logits [B, T, K]; predicted: logits [B, U1, K]; labels: int32 [B, U].
      lm_scale: how much of it is log softmax(predicted) instead, so that the predictor alone learns
        what labels there are.
    """
    encoded, predicted = (x.astype(jnp.float32) for x in (encoded, predicted))
    following = jnp.pad(labels, ((0, 0), (0, 1)))
    most = [lax.stop_gradient(x.max(axis=-1, keepdims=True)) for x in (encoded, predicted)]
    total = jnp.einsum(
        "btk,buk->btu",
        jnp.exp(encoded - most[0]),
        jnp.exp(predicted - most[1]),
        precision=lax.Precision.HIGHEST,
    )
    # Peaks that are far apart: the sum is 0 in float32, not its logarithm.
    total = jnp.log(total + jnp.finfo(jnp.float32).tiny) + most[0] + most[1].swapaxes(1, 2)
    own = jnp.take_along_axis(predicted, following[..., None], axis=2)[..., 0]  # [B, U1]
    heard = jnp.take_along_axis(encoded, following[:, None], axis=2)  # [B, T, U1]
    blank = encoded[..., :1] + predicted[:, None, :, 0] - total
    label = heard + own[:, None] - total
    if lm_scale:
        alone = jax.nn.logsumexp(predicted, axis=-1)
        mixed = lambda x, y: (1 - lm_scale) * x + lm_scale * (y - alone)[:, None]
        blank, label = mixed(blank, predicted[..., 0]), mixed(label, own)
    return Joint(blank, label)
