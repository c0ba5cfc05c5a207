"""Joint search of CTC and a decoder of text: prefixes scored by CTC, n-best lists by the decoder.

Watanabe et al., "Hybrid CTC/attention architecture for end-to-end speech recognition" (2017). CTC
gives a prefix the probability of all label sequences that begin with it; the decoder gives a label
its probability behind a prefix. The search adds up `weight` times the logarithm of the former and
1 - weight times that of the latter, label by label, in one compiled loop.

Shapes: B rows, W hypotheses of a row, R = B * W, T frames, K labels (0 is the blank), V = K + 1
symbols, of which the last one ends a text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.decoding import beam, generate
from speech_jax.decoding.beam import NEVER
from speech_jax.decoding.generate import Advance, Texts
from speech_jax.ops import masking


class Prefixes(NamedTuple):
    """What CTC knows of prefixes, as log probabilities.

    label, blank: [B, W, T], of all paths up to a frame that write the prefix, by what they end in:
    its last label or a blank; last: int32 [B, W], that label, -1 for the empty prefix; score:
    [B, W], of all label sequences that begin with the prefix.
    """

    label: jax.Array
    blank: jax.Array
    last: jax.Array
    score: jax.Array


class Emissions(NamedTuple):
    """Log probabilities [B, T, K] and the frames of each row, bool [B, T]."""

    log_probs: jax.Array
    valid: jax.Array


def emissions(logits: jax.Array, lengths: jax.Array) -> Emissions:
    """Those of logits [B, T, K] of lengths int32 [B]; past a row's end there are blanks alone."""
    valid = masking.length_mask(lengths, logits.shape[1])
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    silence = jnp.where(jnp.arange(logits.shape[-1]) == 0, 0.0, NEVER)
    return Emissions(jnp.where(valid[:, :, None], log_probs, silence[None, None]), valid)


def empty(heard: Emissions, width: int) -> Prefixes:
    """The prefix without a label, `width` times for each row."""
    blank = jnp.cumsum(heard.log_probs[:, None, :, 0], axis=2)  # [B, 1, T]
    shape = (blank.shape[0], width)
    blank = jnp.broadcast_to(blank, (*shape, blank.shape[2]))
    return Prefixes(
        label=jnp.full(blank.shape, NEVER),
        blank=blank,
        last=jnp.full(shape, -1, jnp.int32),
        score=jnp.zeros(shape),
    )


def continued(heard: Emissions, prefixes: Prefixes) -> jax.Array:
    """Scores [B, W, V] of each prefix with a label more, and of the text that ends here.

    They are logarithms: in the last column of the text itself, elsewhere of all that begin so.
    """
    log_probs = heard.log_probs
    after_any, after_blank = _before(prefixes)
    # The sum over the frames that a new label may come first in, as one product of matrices.
    most = after_any.max(-1, keepdims=True)
    probs = jnp.where(heard.valid[:, :, None], jnp.exp(log_probs), 0)
    summed = jnp.matmul(jnp.exp(after_any - most), probs, precision="highest")  # [B, W, K]
    score = jnp.where(summed > 0, jnp.log(jnp.maximum(summed, 1e-37)) + most, NEVER)
    # The last label again needs a blank in between.
    own = _emitted(log_probs, prefixes.last)
    again = jax.nn.logsumexp(after_blank + own, axis=-1, keepdims=True)  # [B, W, 1]
    labels = jnp.arange(log_probs.shape[-1])[None, None]
    score = jnp.where(labels == prefixes.last[:, :, None], again, score)
    score = jnp.where(labels == 0, NEVER, score)
    whole = jnp.logaddexp(prefixes.label[..., -1:], prefixes.blank[..., -1:])
    return jnp.maximum(jnp.concatenate([score, whole], axis=-1), NEVER)


def extended(heard: Emissions, prefixes: Prefixes, labels: jax.Array, score: jax.Array) -> Prefixes:
    """Each prefix with its label of int32 [B, W] more, which has the `score` [B, W]."""
    after_any, after_blank = _before(prefixes)
    again = labels == prefixes.last
    before = jnp.where(again[..., None], after_blank, after_any)
    own, silence = _emitted(heard.log_probs, labels), heard.log_probs[:, :, 0]

    def frame(ends, emitted):
        label, blank = ends
        before, own, silence = emitted  # [B, W], [B, W], [B]
        ends = (
            own + jnp.logaddexp(label, before),
            silence[:, None] + jnp.logaddexp(blank, label),
        )
        return ends, ends

    nothing = jnp.full(labels.shape, NEVER)
    by_frame = (jnp.moveaxis(before, 2, 0), jnp.moveaxis(own, 2, 0), silence.T)
    _, (label, blank) = lax.scan(frame, (nothing, nothing), by_frame)
    floor = lambda x: jnp.maximum(jnp.moveaxis(x, 0, 2), NEVER)
    return Prefixes(floor(label), floor(blank), labels, score)


def _before(prefixes: Prefixes) -> tuple[jax.Array, jax.Array]:
    """Log probabilities [B, W, T] of all paths before a frame that write a prefix.

    The second ones are of those that end in a blank, or have no frame.
    """
    whole = jnp.logaddexp(prefixes.label, prefixes.blank)
    begins = jnp.where(prefixes.last < 0, 0.0, NEVER)[..., None]
    shifted = lambda x: jnp.concatenate([begins, x[..., :-1]], axis=-1)
    return shifted(whole), shifted(prefixes.blank)


def _emitted(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, W, T] of the labels int32 [B, W]."""
    places = jnp.maximum(labels, 0)[:, None]  # [B, 1, W]
    return jnp.moveaxis(jnp.take_along_axis(log_probs, places, axis=2), 1, 2)


class _Carry(NamedTuple):
    text: Any  # of the decoder
    prefixes: Prefixes  # without the symbol that comes next
    scores: jax.Array  # [B, W, V], what CTC gives the symbols that come next


def search(
    advance: Advance,
    carry: Any,
    logits: jax.Array,
    lengths: jax.Array,
    *,
    weight: float,
    pick: Callable[[Any, jax.Array], Any],
    width: int,
    **settings: Any,
) -> Texts:
    """The best texts by CTC and a decoder together; scores are those of the sum above.

    Args:
      advance, carry, pick, width, settings: as of generate.beam.
      logits: of CTC, [B, T, K]; lengths: int32 [B], frames.
      weight: of CTC, in [0, 1]. With 1 the decoder is not asked, with 0 CTC is not.
    """
    if not weight:
        return generate.beam(advance, carry, pick=pick, width=width, **settings)
    if weight == 1:
        carry, pick = (), lambda nothing, rows: nothing
    heard = emissions(logits, lengths)
    B, end = logits.shape[0], logits.shape[2]

    def both(carry: _Carry, symbols: jax.Array) -> tuple[jax.Array, _Carry]:
        last = symbols.reshape(B, width)
        chosen = jnp.take_along_axis(carry.scores, last[..., None], axis=2)[..., 0]
        grown = extended(heard, carry.prefixes, jnp.minimum(last, end - 1), chosen)
        begins = last == end  # what has ended is not asked for again
        keep = lambda old, new: jnp.where(begins.reshape(B, width, *[1] * (new.ndim - 2)), old, new)
        prefixes = jax.tree.map(keep, carry.prefixes, grown)
        scores = continued(heard, prefixes)
        # No text is more probable than what it begins with; what is no hypothesis stays none.
        more = jnp.minimum(scores - prefixes.score[..., None], 0).reshape(B * width, 1, -1)
        impossible = (scores <= NEVER / 2).reshape(more.shape)
        total = weight * more
        text = carry.text
        if weight < 1:
            written, text = advance(text, symbols)
            total = total + (1 - weight) * written
        return jnp.where(impossible, NEVER, total), _Carry(text, prefixes, scores)

    def picked(carry: _Carry, rows: jax.Array) -> _Carry:
        own = (carry.prefixes, carry.scores)
        flat = jax.tree.map(lambda x: x.reshape(B * width, *x.shape[2:])[rows], own)
        back = jax.tree.map(lambda x: x.reshape(B, width, *x.shape[1:]), flat)
        return _Carry(pick(carry.text, rows), *back)

    nothing = empty(heard, width)
    begun = _Carry(carry, nothing, jnp.zeros((B, width, end + 1)))
    return generate.beam(both, begun, pick=picked, width=width, **settings)


def rescore(
    written: Callable[[jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    lengths: jax.Array,
    *,
    weight: float,
    width: int,
    labels: int,
    nbest: int = 1,
) -> Texts:
    """The `width` best texts of CTC's beam search, in the order of CTC and a decoder together.

    Args:
      written: (labels int32 [B, T], counts [B]) -> the decoder's log probability of each [B].
      logits: of CTC, [B, T, K]; lengths: int32 [B], frames; weight: of CTC, in [0, 1].
      width, labels: as of beam.search; nbest: texts that are returned.
    """
    found = beam.search(logits, lengths, width=width, labels=labels, nbest=width)
    by_number = lambda x: jnp.moveaxis(x, 1, 0)
    each = lax.map(lambda one: written(*one), (by_number(found.labels), by_number(found.count)))
    score = weight * found.score + (1 - weight) * by_number(each)
    score = jnp.where(found.score > NEVER / 2, score, NEVER)
    score, order = lax.top_k(score, nbest)
    return Texts(
        jnp.take_along_axis(found.labels, order[..., None], axis=1),
        jnp.take_along_axis(found.count, order, axis=1),
        score,
        jnp.ones(order.shape, bool),
    )
