"""Texts written label by label: greedy and beam search over a decoder, each one compiled loop.

A decoder here is a function `advance(carry, symbols int32 [R, 1]) -> (scores [R, 1, V], carry)`, as
a Stepwise of labels has it (models/stepwise.py); scores are logarithms of probabilities, which add
up. A text begins with the symbol `begin`, and that symbol ends it. What would go on at its row's
limit is cut there, and said to be: it is for the caller to count.

Shapes: B rows, W hypotheses of a row (the beam), R = B * W, S labels at most, V symbols.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.decoding.beam import NEVER

Advance = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


class Texts(NamedTuple):
    """The n best texts of each row, the best first.

    labels: int32 [B, n, S], filled with 0; count: int32 [B, n], labels in each; score: float32
    [B, n], the sum of the scores of its symbols, its end among them, over what the length penalty
    says, -1e30 where there are fewer than n; ended: bool [B, n], whether it ended by itself; one of
    `limit` labels did if the end is the most probable symbol behind them.
    """

    labels: jax.Array
    count: jax.Array
    score: jax.Array
    ended: jax.Array


def confidence(texts: Texts, length_penalty: float = 0.0) -> jax.Array:
    """The geometric mean of the probabilities of the symbols of each row's best text, [B].

    `length_penalty` is what the search was given.
    """
    symbols = texts.count[:, 0] + texts.ended[:, 0].astype(jnp.int32)
    log_probability = texts.score[:, 0] * _penalty(symbols, length_penalty)
    return jnp.exp(log_probability / jnp.maximum(symbols, 1).astype(jnp.float32))


def _penalty(symbols: jax.Array, exponent: float) -> jax.Array:
    return ((5.0 + symbols.astype(jnp.float32)) / 6.0) ** exponent


def greedy(advance: Advance, carry: Any, *, begin: int, limit: jax.Array, longest: int) -> Texts:
    """The best symbol at each step, one text a row (n = 1).

    Args:
      carry: of a decoder that has read nothing, with room for `longest` + 1 symbols (R = B).
      limit: int32 [B], labels of each row at most; longest: S, the largest limit there can be.
    """
    B = limit.shape[0]

    def body(state):
        step, symbols, labels, count, score, live, ended, carry = state
        scores, carry = advance(carry, symbols[:, None])
        best = scores[:, 0].argmax(-1).astype(jnp.int32)
        ends, room = best == begin, step < limit
        score += jnp.where(live & (ends | room), scores[:, 0].max(-1), 0)
        ended |= live & ends
        live &= ~ends & room
        column = jnp.where(live, best, 0)[:, None]
        labels = lax.dynamic_update_slice_in_dim(labels, column, step, axis=1)
        return step + 1, best, labels, count + live.astype(jnp.int32), score, live, ended, carry

    begun = (
        jnp.int32(0),
        jnp.full(B, begin, jnp.int32),
        jnp.zeros((B, longest + 1), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B),
        jnp.ones(B, bool),
        jnp.zeros(B, bool),
        carry,
    )
    going = lambda state: state[5].any() & (state[0] <= longest)
    _, _, labels, count, score, _, ended, _ = lax.while_loop(going, body, begun)
    return Texts(labels[:, None, :longest], count[:, None], score[:, None], ended[:, None])


class _Beam(NamedTuple):
    # What is being written, [B, W, ...] sorted by score, and the best that has ended.
    step: jax.Array
    symbols: jax.Array  # int32 [B, W], the last of each
    labels: jax.Array  # int32 [B, W, S + 1]
    score: jax.Array  # [B, W]
    texts: Texts  # [B, n, S + 1]
    carry: Any


def beam(
    advance: Advance,
    carry: Any,
    *,
    pick: Callable[[Any, jax.Array], Any],
    begin: int,
    limit: jax.Array,
    longest: int,
    width: int,
    nbest: int = 1,
    length_penalty: float = 0.0,
) -> Texts:
    """Beam search: the `width` best texts are written on, and the `nbest` best that ended kept.

    A row is done when nothing that is being written can become better than those. At its limit,
    what would go on is one of its texts as it is, and is said not to have ended.

    Args:
      carry: as in `greedy`, of R rows, those of one row of the batch side by side.
      pick: (carry, rows int32 [R]) -> the carry in which row i goes on from rows[i].
      limit, longest: as in `greedy`.
      length_penalty: the exponent of ((5 + symbols) / 6), by which scores are divided (Wu et al.
        2016); 0: none, which favours short texts.
    """
    B = limit.shape[0]

    penalty = functools.partial(_penalty, exponent=length_penalty)

    def body(beam: _Beam) -> _Beam:
        scores, carry = advance(beam.carry, beam.symbols.reshape(-1, 1))
        scores = scores[:, 0].reshape(B, width, -1)
        total = jnp.maximum(beam.score[:, :, None] + scores, NEVER)  # [B, W, V]
        ending = total[:, :, begin]
        room = beam.step < limit  # [B]
        ends = room[:, None] | (ending >= total.max(-1))  # [B, W]
        score = jnp.where(ends, ending, beam.score)
        divisor = jnp.where(ends, penalty(beam.step + 1), penalty(beam.step))
        done = Texts(
            labels=beam.labels,
            count=jnp.broadcast_to(beam.step, (B, width)),
            score=jnp.where(_is_real(score), score / divisor, NEVER),
            ended=ends,
        )
        texts = _best(beam.texts, done, nbest)
        on = jnp.where(room[:, None, None], total.at[:, :, begin].set(NEVER), NEVER)
        score, place = lax.top_k(on.reshape(B, -1), width)  # [B, W]
        source, symbols = place // scores.shape[-1], (place % scores.shape[-1]).astype(jnp.int32)
        labels = jnp.take_along_axis(beam.labels, source[:, :, None], axis=1)
        # Scores only fall, so the best that can come is what is best now, divided by the most.
        hope = score[:, 0] / penalty(limit + 1)
        live = room & (hope > texts.score[:, -1])
        labels = lax.dynamic_update_slice_in_dim(labels, symbols[:, :, None], beam.step, axis=2)
        rows = (jnp.arange(B)[:, None] * width + source).reshape(-1)
        score = jnp.where(live[:, None], score, NEVER)
        return _Beam(beam.step + 1, symbols, labels, score, texts, pick(carry, rows))

    score = jnp.full((B, width), NEVER).at[:, 0].set(0.0)
    begun = _Beam(
        step=jnp.int32(0),
        symbols=jnp.full((B, width), begin, jnp.int32),
        labels=jnp.zeros((B, width, longest + 1), jnp.int32),
        score=score,
        texts=_nothing(B, nbest, longest + 1),
        carry=carry,
    )
    going = lambda beam: _is_real(beam.score).any() & (beam.step <= longest)
    texts = lax.while_loop(going, body, begun).texts
    inside = jnp.arange(longest)[None, None] < texts.count[:, :, None]
    return texts._replace(labels=jnp.where(inside, texts.labels[:, :, :longest], 0))


def _is_real(score: jax.Array) -> jax.Array:
    return score > NEVER / 2


def _nothing(B: int, n: int, S: int) -> Texts:
    return Texts(
        labels=jnp.zeros((B, n, S), jnp.int32),
        count=jnp.zeros((B, n), jnp.int32),
        score=jnp.full((B, n), NEVER),
        ended=jnp.zeros((B, n), bool),
    )


def _best(some: Texts, others: Texts, n: int) -> Texts:
    """The n best of both, row by row."""
    both = Texts(*(jnp.concatenate(pair, axis=1) for pair in zip(some, others, strict=True)))
    score, place = lax.top_k(both.score, n)
    take = lambda x: jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), 1)
    return Texts(*map(take, both))._replace(score=score)
