"""Greedy and beam search of transducers, on the device: rows side by side, static shapes, one loop.

A predictor is stepwise (models/stepwise.py), and the greedy search is so, too: frames may come in
pieces. Xu et al. 2023 (TDT): a label or blank that says how many frames it takes spares the search
the frames between. The beam search says at most one label a frame and adds up the paths of equal
labels (Boyer et al., "A study of transducer based end-to-end ASR with ESPnet", 2021: modified
adaptive expansion search; here without an expansion). A language model adds to each label that is
said, and nothing to blanks.

In the shapes below B are rows, T frames, D the width of the joint, K labels with the blank (0), N
durations, M = T * most labels that may be said, and W hypotheses of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speech_jax.decoding import beam as prefixes
from speech_jax.decoding.beam import NEVER, NOBODY, STAY
from speech_jax.decoding.ctc import first_largest
from speech_jax.decoding.fusion import Fusion

Pytree = Any


@dataclasses.dataclass(frozen=True)
class Transducer:
    """What a search asks of a model.

    Attributes:
      start: of a number of rows, the predictor's carry before the first label.
      advance: (carry, labels int32 [B, N]) to (what follows each, projected [B, N, D]; carry).
      join: projections of a frame [..., D] and of what was said [..., D] to logits [..., K + N].
      durations: the frames of each of the N durations; empty: a blank takes 1, and a label none.
    """

    start: Callable[[int], Pytree]
    advance: Callable[[Pytree, jax.Array], tuple[jax.Array, Pytree]]
    join: Callable[[jax.Array, jax.Array], jax.Array]
    durations: tuple[int, ...] = ()


class Said(NamedTuple):
    """What a search found.

    labels: int32 [B, M], packed left and filled with blanks; count: int32 [B]; frames: int32 [B,
    M], where each was said; sure: float32 [B, M], its probability there; score: float32 [B], the
    log probability of what was done; steps: int32 [B], joints that were computed for a row;
    bounded: int32 [B], frames that the search left because they had as many labels as it may say.
    """

    labels: jax.Array
    count: jax.Array
    frames: jax.Array
    sure: jax.Array
    score: jax.Array
    steps: jax.Array
    bounded: jax.Array


class State(NamedTuple):
    """Where a greedy search is, between two pieces.

    carry: the predictor's; predicted: [B, D], what follows the last label; ahead: int32 [B], frames
    of the next piece that are taken already.
    """

    carry: Pytree
    predicted: jax.Array
    ahead: jax.Array


def start(model: Transducer, rows: int) -> State:
    """The state before the first frame: a blank was said."""
    begun = jnp.zeros((rows, 1), jnp.int32)
    predicted, carry = model.advance(model.start(rows), begun)
    return State(carry, predicted[:, 0], jnp.zeros(rows, jnp.int32))


def greedy(
    model: Transducer, state: State, encoded: jax.Array, lengths: jax.Array, most: int
) -> tuple[Said, State]:
    """The best label of every step, through a piece of the frames or all of them.

    Args:
      encoded: [B, T, D], projections of the frames; lengths: int32 [B], those that are valid.
      most: labels that may be said in a frame.

    Returns:
      (what was said in these frames, which are counted from 0; the state behind them).
    """
    B, T, _ = encoded.shape
    N, M = len(model.durations), T * most
    rows = jnp.arange(B)

    def body(loop):
        t, here, state, said = loop
        live = t < lengths
        frame = jnp.take_along_axis(encoded, jnp.minimum(t, T - 1)[:, None, None], axis=1)[:, 0]
        logits = model.join(frame, state.predicted)
        by_label = jax.nn.log_softmax(logits[:, : logits.shape[1] - N])
        best = first_largest(by_label)
        own = jnp.take_along_axis(by_label, best[:, None], axis=1)[:, 0]
        speaks = live & (best != 0)
        if N:
            by_duration = jax.nn.log_softmax(logits[:, -N:])
            taken = jnp.asarray(model.durations, jnp.int32)[first_largest(by_duration)]
            taken = jnp.where(speaks, taken, jnp.maximum(taken, 1))
        else:
            taken = jnp.where(speaks, 0, 1)
        here = jnp.where(taken > 0, 0, here + 1)  # labels in this frame
        bounded = live & (here == most)
        one = lambda x: x.astype(jnp.int32)
        taken, here = jnp.where(bounded, 1, taken), jnp.where(bounded, 0, here)
        at = rows, jnp.where(speaks, said.count, M)
        said = Said(
            labels=said.labels.at[at].set(best, mode="drop"),
            count=said.count + one(speaks),
            frames=said.frames.at[at].set(t, mode="drop"),
            sure=said.sure.at[at].set(jnp.exp(own), mode="drop"),
            score=said.score + jnp.where(live, own, 0),
            steps=said.steps + one(live),
            bounded=said.bounded + one(bounded),
        )
        predicted, carry = model.advance(state.carry, best[:, None])
        carry = _where(speaks, carry, state.carry)
        predicted = _where(speaks, predicted[:, 0], state.predicted)
        return jnp.where(live, t + taken, t), here, State(carry, predicted, state.ahead), said

    none = jnp.zeros(B, jnp.int32)
    silent = Said(
        labels=jnp.zeros((B, M), jnp.int32),
        count=none,
        frames=jnp.zeros((B, M), jnp.int32),
        sure=jnp.zeros((B, M)),
        score=jnp.zeros(B),
        steps=none,
        bounded=none,
    )
    t, _, state, said = lax.while_loop(
        lambda loop: (loop[0] < lengths).any(), body, (state.ahead, none, state, silent)
    )
    return said, state._replace(ahead=jnp.maximum(t - lengths, 0))


def _where(condition: jax.Array, a: Pytree, b: Pytree) -> Pytree:
    """Rows of one tree or the other; condition: bool [B]."""
    pick = lambda x, y: jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
    return jax.tree.map(pick, a, b)


class _Hypotheses(NamedTuple):
    # Of [B, W] each but for the first two, sorted by score.
    carry: Pytree  # [B W, ...]
    predicted: jax.Array  # [B, W, D]
    score: jax.Array
    hash: prefixes.Hash
    parent: prefixes.Hash  # without the last label
    last: jax.Array
    gain: jax.Array  # what the language model gave for it
    state: jax.Array  # int32, of the language model


def beam(
    model: Transducer,
    encoded: jax.Array,
    lengths: jax.Array,
    *,
    width: int,
    nbest: int = 1,
    labels: int = 32,
    fusion: Fusion | None = None,
) -> tuple[prefixes.Beam, Said]:
    """The n best hypotheses, and the best one as `greedy` gives it, M being T.

    Args:
      encoded: [B, T, D], projections of the frames; lengths: int32 [B].
      width: hypotheses that are kept after each frame (W); nbest: those that are returned.
      labels: the most probable labels of a frame that extend a hypothesis, where there is a
        language model; without one no more than `width` ever matter.
      fusion: a language model of the labels; what it adds is in the scores.
    """
    B, T, _ = encoded.shape
    candidates = labels if fusion else width
    begun = start(model, B * width)
    full = lambda value, dtype: jnp.full((B, width), value, dtype)
    numbers = jnp.broadcast_to(jnp.arange(width, dtype=jnp.uint32)[None], (B, width))
    hypotheses = _Hypotheses(
        carry=begun.carry,
        predicted=begun.predicted.reshape(B, width, -1),
        score=full(NEVER, jnp.float32).at[:, 0].set(0.0),
        # Slots without a hypothesis have hashes of their own, and are nobody's parent.
        hash=(numbers, full(0, jnp.uint32)),
        parent=(full(NOBODY[0], jnp.uint32), full(NOBODY[1], jnp.uint32)),
        last=full(0, jnp.int32),
        gain=full(0.0, jnp.float32),
        state=full(fusion.start if fusion else 0, jnp.int32),
    )

    def body(loop):
        t, hypotheses, back = loop
        frame = lax.dynamic_index_in_dim(encoded, t, axis=1)  # [B, 1, D]
        hypotheses, chosen = _advance(model, fusion, candidates, hypotheses, frame, t < lengths)
        return t + 1, hypotheses, lax.dynamic_update_index_in_dim(back, chosen, t, 0)

    _, hypotheses, back = lax.while_loop(
        lambda loop: loop[0] < lengths.max(),
        body,
        (jnp.int32(0), hypotheses, jnp.zeros((T, 2, B, width), jnp.int32)),
    )
    score = hypotheses.score + fusion.end(hypotheses.state) if fusion else hypotheses.score
    score, slot = lax.top_k(score, nbest)
    labels, count, frames = prefixes.trace(back, slot, lengths, 0)
    best = labels[:, 0], count[:, 0], frames[:, 0]
    said = Said(
        *best,
        sure=_sure(model, encoded, *best),
        score=score[:, 0],
        steps=lengths * width,
        bounded=jnp.zeros(B, jnp.int32),
    )
    return prefixes.Beam(labels, count, score), said


def _advance(
    model: Transducer,
    fusion: Fusion | None,
    candidates: int,
    old: _Hypotheses,
    frame: jax.Array,
    live: jax.Array,
) -> tuple[_Hypotheses, jax.Array]:
    """The hypotheses after a frame [B, 1, D], and what prefixes.trace needs, int32 [2, B, W]."""
    B, W, _ = old.predicted.shape
    log_probs = jax.nn.log_softmax(model.join(frame, old.predicted))  # [B, W, K]
    C = min(candidates, log_probs.shape[2] - 1)
    labels = lax.top_k(log_probs[..., 1:], C)[1].astype(jnp.int32) + 1  # [B, W, C]
    # A hypothesis stays what it is by a blank; and another one becomes it, if the beam holds the
    # prefix that it extends.
    high, low = (a[:, :, None] == b[:, None] for a, b in zip(old.parent, old.hash, strict=True))
    child = high & low  # [B, W child, W parent]
    spoken = jnp.take_along_axis(
        log_probs, jnp.broadcast_to(old.last[:, None], (B, W, W)), axis=2
    )  # [B, W parent, W child]
    arriving = jnp.where(child, (old.score[:, :, None] + spoken).swapaxes(1, 2), NEVER).max(axis=2)
    stay = prefixes.log_add(old.score + log_probs[..., 0], arriving + old.gain)
    longer = old.score[..., None] + jnp.take_along_axis(log_probs, labels, axis=2)
    if fusion:
        states = jnp.broadcast_to(old.state[..., None], labels.shape)
        gain, state = (x.reshape(B, W * C) for x in fusion(states, labels))
        longer = longer + gain.reshape(B, W, C)
    again = old.last[:, :, None, None] == labels[:, None]  # [B, W child, W parent, C]
    longer = jnp.where((child[..., None] & again).any(axis=1), NEVER, longer)
    score, chosen = lax.top_k(jnp.concatenate([stay, longer.reshape(B, W * C)], axis=1), W)
    new = chosen >= W
    number = jnp.maximum(chosen - W, 0)
    source = jnp.where(new, number // C, chosen)
    picked = lambda x: jnp.take_along_axis(x, number, axis=1)
    added = picked(labels.reshape(B, W * C))
    # A row whose frames are over stays as it is.
    itself = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32)[None], (B, W))
    new, source = new & live[:, None], jnp.where(live[:, None], source, itself)
    score = jnp.where(live[:, None], score, old.score)
    added = jnp.where(new, added, STAY)

    pick = lambda x: jnp.take_along_axis(x, source, axis=1)
    flat = (source + W * jnp.arange(B, dtype=jnp.int32)[:, None]).reshape(-1)
    before = jax.tree.map(lambda x: x[flat], old.carry)
    predicted, carry = model.advance(before, jnp.maximum(added, 0).reshape(-1, 1))
    same = old.predicted.reshape(B * W, -1)[flat]
    hashed = tuple(map(pick, old.hash))
    nothing = score < NEVER / 2  # where there are fewer hypotheses than slots
    made = _Hypotheses(
        carry=_where(new.reshape(-1), carry, before),
        predicted=_where(new.reshape(-1), predicted[:, 0], same).reshape(B, W, -1),
        score=score,
        hash=tuple(
            jnp.where(new, a, b)
            for a, b in zip(prefixes.prefix_hash(hashed, added), hashed, strict=True)
        ),
        parent=tuple(
            jnp.where(nothing, np.uint32(nobody), jnp.where(new, a, pick(b)))
            for nobody, a, b in zip(NOBODY, hashed, old.parent, strict=True)
        ),
        last=jnp.where(new, added, pick(old.last)),
        gain=jnp.where(new, picked(gain), pick(old.gain)) if fusion else old.gain,
        state=jnp.where(new, picked(state), pick(old.state)) if fusion else old.state,
    )
    return made, jnp.stack([source, added])


def _sure(
    model: Transducer, encoded: jax.Array, labels: jax.Array, count: jax.Array, frames: jax.Array
) -> jax.Array:
    """The probability of each label where it was said, float32 [B, T]; 0 beyond `count`."""
    before = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)))
    predicted, _ = model.advance(model.start(len(labels)), before)
    heard = jnp.take_along_axis(encoded, frames[..., None], axis=1)
    log_probs = jax.nn.log_softmax(model.join(heard, predicted))
    own = jnp.take_along_axis(log_probs, labels[..., None], axis=2)[..., 0]
    inside = jnp.arange(labels.shape[1])[None] < count[:, None]
    return jnp.where(inside, jnp.exp(own), 0)
