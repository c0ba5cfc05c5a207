"""CTC prefix beam search, on the device: rows side by side, static shapes, a loop over frames.

Graves and Jaitly, "Towards end-to-end speech recognition with recurrent neural networks" (2014);
Hannun et al., "First-pass large vocabulary continuous speech recognition using bi-directional
recurrent DNNs" (2014). A hypothesis is a prefix of labels with the log probability of all its
paths that end in a blank, and of those that end in its last label. Prefixes are compared by a hash
of 64 bits; those that are equal are one hypothesis.

In the shapes below B are rows, T frames, K classes, W hypotheses of a row (the beam), C labels that
a hypothesis is extended by and M = candidates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speech_jax.decoding.fusion import Fusion
from speech_jax.ops import masking
from speech_jax.ops.ctc import ctc_loss

NEVER = -1e30  # stands for the logarithm of 0
NOBODY = 0, 1  # the hash of no prefix
STAY = -1  # the label of a candidate that is its parent


class Beam(NamedTuple):
    """The n best hypotheses of each row, the best first.

    labels: int32 [B, n, T], packed left and filled with blanks; count: int32 [B, n], labels in
    each; score: float32 [B, n], log p(labels | logits) over all paths, not only those that the
    search followed, and what the language model adds; -1e30 where there are fewer than n.
    """

    labels: jax.Array
    count: jax.Array
    score: jax.Array


class _Frames(NamedTuple):
    # The frames that hypotheses are extended in, packed left.
    log_probs: jax.Array  # [B, T, K]
    labels: jax.Array  # [B, T, C], the most probable ones, sorted
    skipped: jax.Array  # bool [B, T], whether blanks before a frame were skipped
    quiet: jax.Array  # [B, T], their log probability, which may be 0
    count: jax.Array  # [B]


Hash = tuple[jax.Array, jax.Array]  # of a prefix, uint32 [B, W] twice


class _Hypotheses(NamedTuple):
    # Of [B, W] each, sorted by score.
    blank: jax.Array  # log probability of the paths that end in a blank
    label: jax.Array  # and of those that end in the last label
    hash: Hash
    parent: Hash  # without the last label
    last: jax.Array  # int32, the last label; the blank if there is none
    gain: jax.Array  # what the language model gave for it
    added: jax.Array  # and for all labels
    state: jax.Array  # int32, of the language model


def search(
    logits: jax.Array,
    lengths: jax.Array,
    *,
    width: int,
    labels: int,
    nbest: int = 1,
    skip: float = 1.0,
    fusion: Fusion | None = None,
    blank_id: int = 0,
) -> Beam:
    """The best label sequences of each row.

    Args:
      logits: [B, T, K], not normalized; lengths: int32 [B], frames.
      width: hypotheses that are kept after each frame (W).
      labels: the most probable labels of a frame that extend a hypothesis (C). Without a language
        model no more than `width` + 1 ever matter.
      nbest: hypotheses that are returned, `width` at most.
      skip: a frame whose blank is more probable than this extends no hypothesis; 1: none is.
      fusion: a language model of the labels.
    """
    K = logits.shape[-1]
    C = min(labels, K - 1) if fusion else min(labels, width + 1, K - 1)
    frames = _frames(logits, lengths, C, skip, blank_id)
    pairs = _pairs(width, C, everything=fusion is not None)
    B, T = logits.shape[:2]
    state = fusion.start if fusion else 0
    full = lambda value, dtype: jnp.full((B, width), value, dtype)
    numbers = jnp.arange(width, dtype=jnp.uint32)[None]
    begun = _Hypotheses(
        blank=full(NEVER, jnp.float32).at[:, 0].set(0.0),
        label=full(NEVER, jnp.float32),
        # Slots without a hypothesis have hashes of their own, and are nobody's parent.
        hash=(jnp.broadcast_to(numbers, (B, width)), full(0, jnp.uint32)),
        parent=(full(NOBODY[0], jnp.uint32), full(NOBODY[1], jnp.uint32)),
        last=full(blank_id, jnp.int32),
        gain=full(0.0, jnp.float32),
        added=full(0.0, jnp.float32),
        state=full(state, jnp.int32),
    )
    back = jnp.zeros((T, 2, B, width), jnp.int32)

    def body(carry):
        t, hypotheses, back = carry
        hypotheses, chosen = _advance(hypotheses, frames, t, pairs, fusion, blank_id)
        return t + 1, hypotheses, lax.dynamic_update_index_in_dim(back, chosen, t, 0)

    _, hypotheses, back = lax.while_loop(
        lambda carry: carry[0] < frames.count.max(), body, (jnp.int32(0), begun, back)
    )
    score, added = log_add(hypotheses.blank, hypotheses.label), hypotheses.added
    if fusion:
        end = fusion.end(hypotheses.state)
        score, added = score + end, added + end
    score, slot = lax.top_k(score, nbest)
    found, count, _ = trace(back, slot, frames.count, blank_id)
    # What was found is scored by all its paths, and sorted by that.
    several = lambda x: jnp.repeat(x, nbest, axis=0)
    flat = found.reshape(B * nbest, T), count.reshape(B * nbest)
    exact = -ctc_loss(several(logits), several(lengths), *flat, blank_id=blank_id)
    exact = exact.reshape(B, nbest) + jnp.take_along_axis(added, slot, axis=1)
    score, order = lax.top_k(jnp.where(score < NEVER / 2, NEVER, exact), nbest)
    return Beam(
        jnp.take_along_axis(found, order[..., None], axis=1),
        jnp.take_along_axis(count, order, axis=1),
        score,
    )


def _frames(logits: jax.Array, lengths: jax.Array, C: int, skip: float, blank_id: int) -> _Frames:
    T = logits.shape[1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    valid = masking.length_mask(lengths, T)
    blank = jnp.where(valid, log_probs[..., blank_id], 0)
    kept = valid & (blank <= jnp.log(skip)) if skip < 1 else valid
    count = kept.sum(axis=1, dtype=jnp.int32)
    before = jnp.cumsum(jnp.where(kept, 0, blank), axis=1)  # quiet up to each frame
    if skip < 1:
        order = jnp.argsort(~kept, axis=1, stable=True)  # those that are kept first, in order
        log_probs = jnp.take_along_axis(log_probs, order[..., None], axis=1)
        at = jnp.take_along_axis(before, order, axis=1)
        skipped = jnp.diff(order, axis=1, prepend=-1) > 1  # beyond `count` nobody asks
    else:
        at, skipped = before, jnp.zeros_like(valid)
    quiet = jnp.diff(at, axis=1, prepend=jnp.zeros((len(at), 1)))
    quiet = jnp.where(skipped, jnp.minimum(quiet, 0), 0)
    spoken = log_probs.at[..., blank_id].set(-jnp.inf)
    labels = lax.top_k(spoken, C)[1].astype(jnp.int32)
    return _Frames(log_probs, labels, skipped, quiet, count)


def _pairs(width: int, C: int, everything: bool) -> tuple[np.ndarray, np.ndarray]:
    """(hypothesis, rank of the label) of each candidate that extends a hypothesis, [M] each.

    Hypotheses and labels are sorted, so without a language model a pair is beaten by all pairs
    before it in both, but for one in each hypothesis (its last label again, which needs a blank in
    between): where that makes `width`, it is no candidate.
    """
    one, label = np.meshgrid(np.arange(width), np.arange(C), indexing="ij")
    if everything:
        useful = np.ones_like(one, bool)
    else:
        useful = (one + 1) * label <= width
    return one[useful], label[useful]


def _advance(
    old: _Hypotheses,
    frames: _Frames,
    t: jax.Array,
    pairs: tuple[np.ndarray, np.ndarray],
    fusion: Fusion | None,
    blank_id: int,
) -> tuple[_Hypotheses, jax.Array]:
    """The hypotheses after a frame, and int32 [2, B, W]: which one each came from, and by what."""
    at = lambda x: lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)
    log_probs, labels = at(frames.log_probs), at(frames.labels)
    skipped, quiet = at(frames.skipped)[:, None], at(frames.quiet)[:, None]
    W = old.blank.shape[1]

    # Blanks that were skipped: every path ends in one.
    total = log_add(old.blank, old.label)
    before = jnp.where(skipped, total + quiet, old.blank)
    repeated = jnp.where(skipped, NEVER, old.label)
    total = jnp.where(skipped, total + quiet, total)

    # A hypothesis stays what it is by a blank or by its last label again; and another one becomes
    # it, if the beam holds the prefix that it extends.
    own = jnp.take_along_axis(log_probs, old.last, axis=1)  # [B, W]
    high, low = (a[:, :, None] == b[:, None] for a, b in zip(old.parent, old.hash, strict=True))
    child = high & low  # [B, W child, W parent]
    again = old.last[:, :, None] == old.last[:, None]
    arriving = jnp.where(again, before[:, None], total[:, None])
    arriving = jnp.where(child, arriving, NEVER).max(axis=-1) + old.gain
    stay_blank = total + log_probs[:, blank_id, None]
    # Nothing has been said by the empty prefix: its last label is no label.
    stay_label = jnp.where(old.last == blank_id, NEVER, log_add(repeated, arriving) + own)

    # A hypothesis is extended by a label, unless what comes of it is in the beam already.
    one, rank = pairs
    label = labels[:, rank]  # [B, M]
    extended = jnp.where(label == old.last[:, one], before[:, one], total[:, one])
    extended += jnp.take_along_axis(log_probs, label, axis=1)
    gain, state = fusion(old.state[:, one], label) if fusion else (None, None)
    extended = extended + gain if fusion else extended
    known = (child[:, :, one] & (old.last[:, :, None] == label[:, None])).any(axis=1)  # [B, M]
    extended = jnp.where(known, NEVER, extended)

    score = jnp.concatenate([log_add(stay_blank, stay_label), extended], axis=1)
    chosen = lax.top_k(score, W)[1]  # [B, W]
    new = chosen >= W
    source = jnp.where(new, jnp.asarray(one, jnp.int32)[chosen - W], chosen)
    number = jnp.maximum(chosen - W, 0)
    pick = lambda x: jnp.take_along_axis(x, source, axis=1)
    picked = lambda x: jnp.take_along_axis(x, number, axis=1)
    added = jnp.where(new, picked(label), STAY)
    hashed = tuple(map(pick, old.hash))
    # Where there are fewer hypotheses than slots, what fills one is nobody's child.
    nothing = jnp.take_along_axis(score, chosen, axis=1) < NEVER / 2
    made = _Hypotheses(
        blank=jnp.where(new, NEVER, pick(stay_blank)),
        label=jnp.where(new, picked(extended), pick(stay_label)),
        hash=tuple(
            jnp.where(new, a, b) for a, b in zip(prefix_hash(hashed, added), hashed, strict=True)
        ),
        parent=tuple(
            jnp.where(nothing, jnp.uint32(nobody), jnp.where(new, a, pick(b)))
            for nobody, a, b in zip(NOBODY, hashed, old.parent, strict=True)
        ),
        last=jnp.where(new, added, pick(old.last)),
        gain=jnp.where(new, picked(gain), pick(old.gain)) if fusion else old.gain,
        added=pick(old.added) + jnp.where(new, picked(gain), 0) if fusion else old.added,
        state=jnp.where(new, picked(state), pick(old.state)) if fusion else old.state,
    )
    # A row whose frames are over stays as it is.
    live = (t < frames.count)[:, None]
    made = jax.tree.map(lambda a, b: jnp.where(live, a, b), made, old)
    itself = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32)[None], source.shape)
    return made, jnp.stack([jnp.where(live, source, itself), jnp.where(live, added, STAY)])


def log_add(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(exp(a) + exp(b)) of finite numbers."""
    return jnp.maximum(a, b) + jnp.log1p(jnp.exp(-jnp.abs(a - b)))


def prefix_hash(prefix: Hash, label: jax.Array) -> Hash:
    """The hash of a prefix and one more label."""
    label = label.astype(jnp.uint32) + np.uint32(1)
    mixed = tuple(
        one * np.uint32(a) + label * np.uint32(b)
        for one, a, b in zip(
            prefix, (0x01000193, 0x9E3779B1), (0x85EBCA6B, 0xC2B2AE35), strict=True
        )
    )
    return tuple((one ^ (one >> np.uint32(15))) * np.uint32(0x2C1B3C6D) for one in mixed)


def trace(
    back: jax.Array, slot: jax.Array, count: jax.Array, blank_id: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the hypotheses that ended in `slot` [B, n] are.

    Args:
      back: int32 [T, 2, B, W], of each frame the hypothesis that one came from, and its new label
        or STAY; count: int32 [B], the frames of a row.

    Returns:
      (labels int32 [B, n, T], packed left; how many they are [B, n]; their frames [B, n, T]).
    """

    def step(slot, frame):
        source, label = frame
        pick = lambda x: jnp.take_along_axis(x, slot, axis=1)
        return pick(source), pick(label)

    # Frames that no row had were never written: zeros would be read as moves.
    T = back.shape[0]
    written = (jnp.arange(T)[:, None] < count[None])[..., None]  # [T, B, 1]
    itself = jnp.arange(back.shape[-1], dtype=jnp.int32)[None, None]
    source = jnp.where(written, back[:, 0], itself)
    label = jnp.where(written, back[:, 1], STAY)
    _, labels = lax.scan(step, slot, (source, label), reverse=True)  # [T, B, n]
    labels = labels.transpose(1, 2, 0)
    said = labels != STAY
    place = jnp.where(said, jnp.cumsum(said, axis=-1) - 1, T)
    rows, ones = (jnp.arange(n) for n in slot.shape)
    at = rows[:, None, None], ones[None, :, None], place
    packed = jnp.full(labels.shape, blank_id, jnp.int32).at[at].set(labels, mode="drop")
    time = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), labels.shape)
    when = jnp.zeros(labels.shape, jnp.int32).at[at].set(time, mode="drop")
    return packed, said.sum(axis=-1, dtype=jnp.int32), when
