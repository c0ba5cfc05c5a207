"""Connectionist temporal classification: loss, feasibility and alignment (Graves et al., 2006)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_NONE = -1e30  # log(0) that survives subtraction: no inf - inf, no NaN


def _logaddexp(a, b):
    return jnp.maximum(a, b) + jnp.log(1 + jnp.exp(-jnp.abs(a - b)))


def _repeats(labels, label_lengths):
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    return jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1, dtype=jnp.int32)


def ctc_feasible(logit_lengths, labels, label_lengths):
    """Which rows have an alignment at all: frames >= labels + adjacent repeats; bool [B]."""
    labels = jnp.asarray(labels)
    label_lengths = jnp.asarray(label_lengths)
    return jnp.asarray(logit_lengths) >= label_lengths + _repeats(labels, label_lengths)


def _step(state, label, blank, same):
    # before[j]: the blank before label j; on[j]: label j - 1, so on[0] is never reached.
    before, on = state
    either = _logaddexp(before, on)
    enter = jnp.where(same, before, either)
    enter = jnp.pad(enter[:, :-1], ((0, 0), (1, 0)), constant_values=_NONE)
    return either + blank, _logaddexp(on, enter) + label


def _forward(emit, blank, labels, lengths, start):
    # alpha for every frame; `start` is the column that holds the first blank.
    B, N = labels.shape
    same = jnp.pad(labels[:, 1:] == labels[:, :-1], ((0, 0), (1, 1)))
    column = jnp.arange(N + 1)
    first = jnp.where(column == start[:, None], 0.0, _NONE)
    init = first, jnp.full((B, N + 1), _NONE)

    def body(state, x):
        t, emit, blank = x
        new = _step(state, emit, blank, same)
        live = (t < lengths)[:, None]
        state = jax.tree.map(lambda n, s: jnp.where(live, n, s), new, state)
        return state, state

    return lax.scan(body, init, (jnp.arange(emit.shape[0]), emit, blank))


def _emissions(logits, labels, blank_id):
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    emit = jnp.take_along_axis(logits, labels[:, None, :], axis=2) - total[..., None]
    emit = jnp.pad(emit, ((0, 0), (0, 0), (1, 0)), constant_values=_NONE)
    blank = logits[..., blank_id] - total
    return total, emit.swapaxes(0, 1), blank.T[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(logits, logit_lengths, labels, label_lengths, blank_id):
    return _loss_fwd(logits, logit_lengths, labels, label_lengths, blank_id)[0]


def _loss_fwd(logits, logit_lengths, labels, label_lengths, blank_id):
    total, emit, blank = _emissions(logits, labels, blank_id)
    B, N = labels.shape
    T = logits.shape[1]
    zero = jnp.zeros_like(label_lengths)
    (before, on), (before_t, on_t) = _forward(emit, blank, labels, logit_lengths, zero)
    pick = lambda x: jnp.take_along_axis(x, label_lengths[:, None], axis=1)[:, 0]
    loss = -_logaddexp(pick(before), pick(on))
    # Time reversed within each row, labels reversed within the array.
    back = (logit_lengths[:, None] - 1 - jnp.arange(T)) % T
    rev = lambda x: jnp.take_along_axis(x, back.T[..., None], axis=0)
    flip = lambda x: jnp.pad(x[..., 1:], ((0, 0), (0, 0), (1, 0)), constant_values=_NONE)
    emit_rev = flip(rev(jnp.concatenate([emit[..., :1], emit[..., :0:-1]], -1)))
    _, (before_b, on_b) = _forward(
        emit_rev, rev(blank), labels[:, ::-1], logit_lengths, N - label_lengths
    )
    on_b = jnp.concatenate([on_b[..., :1], on_b[..., :0:-1]], -1)
    occ_label = jnp.exp(jnp.minimum(on_t + rev(on_b) - emit + loss[:, None], 0.0))
    occ_blank = jnp.exp(before_t + rev(before_b[..., ::-1]) - blank + loss[:, None]).sum(-1)
    valid = (jnp.arange(T)[:, None] < logit_lengths) & (loss < -_NONE / 2)
    occ_label = jnp.where(valid[..., None], occ_label[..., 1:], 0).swapaxes(0, 1)
    occ_blank = jnp.where(valid, occ_blank, 0).T
    loss = jnp.where(loss < -_NONE / 2, loss, jnp.inf)
    return loss, (logits, total, occ_label, occ_blank, labels, valid.T)


def _loss_bwd(blank_id, residuals, g):
    logits, total, occ_label, occ_blank, labels, valid = residuals
    g = jnp.where(valid, g[:, None], 0.0)
    soft = jnp.exp(logits.astype(jnp.float32) - total[..., None])
    grad = jnp.where(valid[..., None], soft, 0)
    b = jnp.arange(labels.shape[0])[:, None, None]
    t = jnp.arange(logits.shape[1])[None, :, None]
    grad = grad.at[b, t, labels[:, None, :]].add(-occ_label)
    grad = grad.at[..., blank_id].add(-occ_blank)
    return (grad * g[..., None]).astype(logits.dtype), None, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def ctc_loss(
    logits,
    logit_lengths,
    labels,
    label_lengths,
    *,
    blank_id=0,
    zero_infinity=False,
    implementation=None,
):
    """Negative log-likelihood in nats, float32 [B], of labels [B, N] under logits [B, T, K]."""
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation {implementation!r} is not available yet: use 'xla'")
    loss = _loss(
        jnp.asarray(logits),
        jnp.asarray(logit_lengths, jnp.int32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(label_lengths, jnp.int32),
        blank_id,
    )
    if zero_infinity:
        loss = jnp.where(jnp.isinf(loss), 0.0, loss)
    return loss
