"""Connectionist temporal classification: the loss, its feasibility and the best alignment.

Graves et al., "Connectionist temporal classification", ICML 2006. The loss is the negative
log-likelihood of the labels summed over all alignments; its gradient is softmax minus occupancy,
written by hand here and computed from the forward and backward recursions.

Probabilities are carried as numbers with an exponent of their own: value = mantissa * 2**exponent,
mantissa float32, exponent int32. Adding and multiplying them takes no exp and no log, no sum ever
underflows however peaked the logits are, and the error is that of float32 products (about 1e-7 a
frame), while log-space rounds each frame to the precision of a log-likelihood of thousands of nats.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")

# Frames between two checkpoints of alpha, and between two normalizations of the mantissas: these
# grow at most 3 * sqrt(2) times a frame, so that 16 frames stay below 2**34. Measured on CPU.
CHUNK = 16


class Wide(NamedTuple):
    """A nonnegative number mantissa * 2**exponent, elementwise; float32 and int32 arrays."""

    mantissa: jax.Array
    exponent: jax.Array


ZERO_EXPONENT = -(2**29)  # the exponent of 0: below any that a product of probabilities reaches
_LOWEST = -1e30  # stands for -inf where 0 * -inf must be 0
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is log(2); n * high is exact


def power_of_two(n):
    """2.0**n as float32 for integer n at most 127; 0 for n below -126."""
    return lax.bitcast_convert_type(jnp.maximum(n + 127, 0) << 23, jnp.float32)


def wide_exp(x):
    """exp(x) as a Wide, exact to float32 for any finite x; 0 for -inf."""
    x = x.astype(jnp.float32)
    # 2**20 bounds the exponent of one frame, so that a sum over frames stays within int32.
    n = jnp.clip(jnp.round(x * (1 / np.log(2))), -(2.0**20), 2.0**20)
    return Wide(jnp.exp((x - n * _LN2_HIGH) - n * _LN2_LOW), n.astype(jnp.int32))


def wide_sum(*terms):
    """The sum of Wide numbers of mantissas below 2**100."""
    exponent = terms[0].exponent
    for term in terms[1:]:
        exponent = jnp.maximum(exponent, term.exponent)
    mantissa = sum(term.mantissa * power_of_two(term.exponent - exponent) for term in terms)
    return Wide(mantissa, exponent)


def wide_times(a, b):
    """The product of two Wide numbers."""
    return Wide(a.mantissa * b.mantissa, a.exponent + b.exponent)


def normalized(x):
    """The same Wide number with its mantissa in [1, 2), or 0."""
    bits = lax.bitcast_convert_type(x.mantissa, jnp.int32)
    shift = lax.shift_right_logical(bits, 23) - 127
    exponent = jnp.where(x.mantissa == 0, ZERO_EXPONENT, x.exponent + shift)
    return Wide(x.mantissa * power_of_two(-shift), exponent)


def _where(condition, a, b):
    return jax.tree.map(partial(jnp.where, condition), a, b)


def wide_where(condition, x):
    """x where the condition holds, 0 elsewhere."""
    return Wide(x.mantissa, jnp.where(condition, x.exponent, ZERO_EXPONENT))


class _Problem(NamedTuple):
    # What the recursions need. N labels have N + 1 blanks around them; states are (blanks, labels).
    emissions: jax.Array  # [T, B, N] logits of the labels
    blank: jax.Array  # [T, B] logits of the blank
    skip: jax.Array  # [B, N] whether label j - 1 may be followed by label j without a blank
    logit_lengths: jax.Array  # [B]
    label_lengths: jax.Array  # [B]


def _states(column, labels):
    """States with probability 1 in one blank: a pair of Wide [B, N + 1]; column [B]."""
    here = jnp.arange(labels + 1) == column[:, None]
    blanks = Wide(here.astype(jnp.float32), jnp.where(here, 0, ZERO_EXPONENT))
    none = Wide(jnp.zeros(here.shape), jnp.full(here.shape, ZERO_EXPONENT, jnp.int32))
    return blanks, none


def _pad(x, where):
    widths = ((0, 0), where)
    return Wide(
        jnp.pad(x.mantissa, widths), jnp.pad(x.exponent, widths, constant_values=ZERO_EXPONENT)
    )


def _cut(x, start, stop):
    return jax.tree.map(lambda v: v[..., start:stop], x)


def _forward_step(skip, states, frame):
    """One frame of alpha. Labels are kept at columns 1..N: column 0 is never reached."""
    blanks, labels = states
    label, blank, live = frame
    previous = _cut(labels, None, -1)
    to_blank = wide_times(wide_sum(blanks, labels), blank)
    to_label = wide_sum(_cut(labels, 1, None), _cut(blanks, None, -1), wide_where(skip, previous))
    to_label = _where(live, wide_times(to_label, label), _cut(labels, 1, None))
    return _where(live, to_blank, blanks), _pad(to_label, (1, 0))


def _backward_step(skip, states, frame):
    """One frame of beta, the frame's own probability included. Labels are at columns 0..N-1."""
    blanks, labels = states
    label, blank, live = frame
    following = _cut(labels, 1, None)
    to_blank = wide_times(wide_sum(blanks, labels), blank)
    to_label = wide_sum(_cut(labels, None, -1), _cut(blanks, 1, None), wide_where(skip, following))
    to_label = _where(live, wide_times(to_label, label), _cut(labels, None, -1))
    return _where(live, to_blank, blanks), _pad(to_label, (0, 1))


def _chunk(problem, index):
    """Frames of a chunk, ready for a step, and the first of them.

    The last chunk ends with the last frame; what it shares with the one before is not live.
    """
    T = problem.blank.shape[0]
    size = min(CHUNK, T)
    start = jnp.minimum(index * size, T - size)
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    label, blank = wide_exp(cut(problem.emissions)), wide_exp(cut(problem.blank)[..., None])
    frame = start + jnp.arange(size)[:, None]
    live = (frame >= index * size) & (frame < problem.logit_lengths)
    return (label, blank, live[..., None]), start


def _chunks(frames):
    return jnp.arange(-(-frames // min(CHUNK, frames)))


def _keep_labels(step):
    def body(states, frame):
        blanks, labels = step(states, frame)
        return (blanks, labels), labels

    return body


def _normalized_states(states):
    return tuple(map(normalized, states))


def _likelihood(problem):
    """The likelihood times the softmax denominators, a Wide [B]; alpha before every chunk."""
    T, _, N = problem.emissions.shape

    def advance(states, index):
        frames, _ = _chunk(problem, index)
        step = lambda states, frame: (_forward_step(problem.skip, states, frame), None)
        return _normalized_states(lax.scan(step, states, frames)[0]), states

    states = _states(jnp.zeros_like(problem.label_lengths), N)
    (blanks, labels), checkpoints = lax.scan(advance, states, _chunks(T))
    # The last blank or the last label; column 0 of the labels is 0, for rows with none.
    last = problem.label_lengths[:, None]
    pick = lambda x: jax.tree.map(lambda v: jnp.take_along_axis(v, last, axis=1)[:, 0], x)
    return normalized(wide_sum(pick(blanks), pick(labels))), checkpoints


def _occupancy(alpha, beta, own, likelihood):
    """Posterior of each label at each frame. `own` is the frame's probability, in alpha and beta."""
    positive = likelihood.mantissa > 0
    scale = jnp.where(positive, 1 / jnp.where(positive, likelihood.mantissa, 1), 0)
    # The frame's own probability is divided out; where it is 0, so are alpha and beta.
    mantissa = jnp.where(own.mantissa == 0, 1, own.mantissa)
    exponent = alpha.exponent + beta.exponent - own.exponent - likelihood.exponent[:, None]
    product = alpha.mantissa * beta.mantissa / mantissa * scale[:, None]
    return product * power_of_two(jnp.minimum(exponent, 127))


def _subtract_labels(gradient, labels, occupancy):
    # [B, T, K] less [B, T, N] at the classes of the labels.
    return jax.vmap(lambda row, ids, x: row.at[:, ids].add(-x, mode="promise_in_bounds"))(
        gradient, labels, occupancy
    )


def _gradient(problem, logits, total, labels, blank_id, likelihood, checkpoints, cotangent):
    """cotangent * (softmax - occupancy), [B, T, K] in the dtype of the logits."""
    T, B, N = problem.emissions.shape
    step = partial(_forward_step, problem.skip)
    # What follows label j directly is label j + 1, unless they are equal.
    follows = jnp.pad(problem.skip[:, 1:], ((0, 0), (0, 1)))
    back = partial(_backward_step, follows)
    cotangent = jnp.where(likelihood.mantissa == 0, 0, cotangent)

    def advance(carry, xs):
        states, gradient = carry
        index, checkpoint = xs
        frames, start = _chunk(problem, index)
        label, _, live = frames
        _, alpha = lax.scan(_keep_labels(step), checkpoint, frames)
        states, beta = lax.scan(_keep_labels(back), states, frames, reverse=True)
        alpha, beta = _cut(alpha, 1, None), _cut(beta, None, -1)
        occupancy = _occupancy(alpha, beta, label, likelihood)
        weight = jnp.where(live[..., 0], cotangent, 0)
        occupancy = (jnp.where(live, occupancy, 0) * weight[..., None]).swapaxes(0, 1)
        chunk = lax.dynamic_slice_in_dim(logits, start, len(live), axis=1).astype(jnp.float32)
        log_total = lax.dynamic_slice_in_dim(total, start, len(live), axis=1)
        chunk = jnp.exp(chunk - log_total[..., None])
        chunk = jnp.where(live.swapaxes(0, 1), chunk, 0) * weight.T[..., None]
        # At every frame the occupancies of blank and labels sum to 1.
        chunk = chunk.at[..., blank_id].add(occupancy.sum(-1) - weight.T)
        chunk = _subtract_labels(chunk, labels, occupancy).astype(gradient.dtype)
        gradient = lax.dynamic_update_slice_in_dim(gradient, chunk, start, axis=1)
        return (_normalized_states(states), gradient), None

    init = _states(problem.label_lengths, N), jnp.zeros_like(logits)
    (_, gradient), _ = lax.scan(advance, init, (_chunks(T), checkpoints), reverse=True)
    return gradient


class _Softmax(NamedTuple):
    # log(sum(exp(logits))) of each frame, and its sum over a row's frames in two parts: that sum
    # may be large where the loss is small, so its whole powers of two are subtracted as integers.
    total: jax.Array  # [B, T]
    remainder: jax.Array  # [B] nats
    exponent: jax.Array  # [B]


def _softmax(logits, lengths):
    largest = logits.max(axis=-1).astype(jnp.float32)
    rest = jnp.log(jnp.exp(logits.astype(jnp.float32) - largest[..., None]).sum(axis=-1))
    exponent = wide_exp(largest).exponent
    remainder = rest + ((largest - exponent * _LN2_HIGH) - exponent * _LN2_LOW)
    live = jnp.arange(logits.shape[1]) < lengths[:, None]
    row_sum = lambda x: jnp.where(live, x, 0).sum(axis=1)
    return _Softmax(largest + rest, row_sum(remainder), row_sum(exponent))


def _negative_log(likelihood, softmax):
    # -log(likelihood / softmax denominators); +inf where the likelihood is 0.
    whole = likelihood.exponent - softmax.exponent
    loss = softmax.remainder - jnp.log(likelihood.mantissa) - whole * np.float32(np.log(2))
    return jnp.where(likelihood.mantissa == 0, jnp.inf, loss)


def _problem(logits, logit_lengths, labels, label_lengths, blank_id):
    return _Problem(
        emissions=jnp.take_along_axis(logits, labels[:, None, :], axis=2).swapaxes(0, 1),
        blank=logits[..., blank_id].T,
        skip=jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0))),
        logit_lengths=logit_lengths,
        label_lengths=label_lengths,
    )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ctc_xla(logits, logit_lengths, labels, label_lengths, blank_id):
    return _ctc_xla_forward(logits, logit_lengths, labels, label_lengths, blank_id)[0]


def _ctc_xla_forward(logits, logit_lengths, labels, label_lengths, blank_id):
    softmax = _softmax(logits, logit_lengths)
    problem = _problem(logits, logit_lengths, labels, label_lengths, blank_id)
    likelihood, checkpoints = _likelihood(problem)
    loss = _negative_log(likelihood, softmax)
    return loss, (problem, logits, softmax.total, labels, likelihood, checkpoints)


def _ctc_xla_backward(blank_id, residuals, cotangent):
    problem, logits, total, labels, likelihood, checkpoints = residuals
    gradient = _gradient(
        problem, logits, total, labels, blank_id, likelihood, checkpoints, cotangent
    )
    return gradient, None, None, None


_ctc_xla.defvjp(_ctc_xla_forward, _ctc_xla_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ctc_pallas(logits, logit_lengths, labels, label_lengths, blank_id, kernel):
    loss, _ = _ctc_pallas_run(logits, logit_lengths, labels, label_lengths, blank_id, kernel, False)
    return loss


def _ctc_pallas_run(logits, logit_lengths, labels, label_lengths, blank_id, kernel, history):
    from speech_jax.ops import ctc_pallas

    platform, interpret = kernel
    softmax = _softmax(logits, logit_lengths)
    ids = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=blank_id)
    if platform == "tpu":
        # A gather along lanes is slow there; a product with 0 and 1 is exact at this precision.
        emissions = jnp.einsum(
            "btk,bnk->tbn",
            jnp.maximum(logits.astype(jnp.float32), _LOWEST),
            jax.nn.one_hot(ids, logits.shape[2]),
            precision=lax.Precision.HIGHEST,
        )
    else:
        emissions = jnp.take_along_axis(logits, ids[:, None, :], axis=2).swapaxes(0, 1)
    skip = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))
    likelihood, alpha, beta = ctc_pallas.recursions(
        emissions.astype(jnp.float32),
        skip,
        logit_lengths,
        label_lengths,
        platform=platform,
        history=history,
        interpret=interpret,
    )
    loss = _negative_log(likelihood, softmax)
    if not history:
        return loss, None
    own = wide_exp(emissions[..., :-1])
    occupancy = _occupancy(alpha, beta, own, likelihood)
    live = jnp.arange(len(emissions))[:, None] < logit_lengths
    possible = live & (likelihood.mantissa > 0)
    occupancy = jnp.where(possible[..., None], occupancy, 0).swapaxes(0, 1)
    return loss, (logits, softmax.total, labels, occupancy, possible.T)


def _ctc_pallas_forward(logits, logit_lengths, labels, label_lengths, blank_id, kernel):
    return _ctc_pallas_run(logits, logit_lengths, labels, label_lengths, blank_id, kernel, True)


def _ctc_pallas_backward(blank_id, kernel, residuals, cotangent):
    logits, total, labels, occupancy, possible = residuals
    weight = jnp.where(possible, cotangent[:, None], 0)
    occupancy = occupancy * weight[..., None]
    soft = jnp.exp(logits.astype(jnp.float32) - total[..., None])
    soft = jnp.where(possible[..., None], soft, 0) * weight[..., None]
    soft = soft.at[..., blank_id].add(occupancy.sum(-1) - weight)
    if kernel[0] == "tpu":
        one_hot = jax.nn.one_hot(labels, logits.shape[2])
        gradient = soft - jnp.einsum(
            "btn,bnk->btk", occupancy, one_hot, precision=lax.Precision.HIGHEST
        )
    else:
        gradient = _subtract_labels(soft, labels, occupancy)
    return gradient.astype(logits.dtype), None, None, None


_ctc_pallas.defvjp(_ctc_pallas_forward, _ctc_pallas_backward)


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
    labels = jnp.asarray(labels, jnp.int32)
    label_lengths = jnp.asarray(label_lengths, jnp.int32)
    labels = jnp.where(jnp.arange(labels.shape[1]) < label_lengths[:, None], labels, blank_id)
    args = (
        jnp.asarray(logits),
        jnp.asarray(logit_lengths, jnp.int32),
        labels,
        label_lengths,
        blank_id,
    )
    if implementation in (None, "xla"):
        loss = _ctc_xla(*args)
    else:
        loss = _ctc_pallas(*args, (implementation[-3:], True))
    if zero_infinity:
        loss = jnp.where(jnp.isinf(loss), 0.0, loss)
    return loss


def ctc_feasible(logit_lengths, labels, label_lengths):
    """Which rows have an alignment at all: frames >= labels + adjacent repeats; bool [B]."""
    labels, label_lengths = jnp.asarray(labels), jnp.asarray(label_lengths)
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1, dtype=jnp.int32)
    return jnp.asarray(logit_lengths) >= label_lengths + repeats
