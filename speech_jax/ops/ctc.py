"""Connectionist temporal classification: the loss, its feasibility and the best alignment.

Graves et al., "Connectionist temporal classification", ICML 2006. The loss is the negative
log-likelihood of the labels summed over all alignments; its gradient is softmax minus occupancy,
written by hand here and computed from the forward and backward recursions.

Probabilities are carried as numbers with an exponent of their own (ops/wide.py). In the shapes
below T are frames, B rows, N labels of a row and K classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.ops import partition
from speech_jax.ops.checks import checked
from speech_jax.ops.wide import (
    CHUNK,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    Wide,
    normalized,
    wide_exp,
    wide_indicator,
    wide_over,
    wide_pad,
    wide_sum,
    wide_times,
    wide_where,
    wide_zeros,
)

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")

UNROLL = 16  # frames that are one program on accelerators
_LOWEST = -1e30  # stands for -inf where 0 * -inf must be 0

# The states of a row at a frame: Wide [B, N + 1] of the blanks and of the labels.
States = tuple[Wide, Wide]


class _Problem(NamedTuple):
    # What the recursions need. N labels have N + 1 blanks around them; states are (blanks, labels).
    emissions: jax.Array  # [T, B, N] logits of the labels
    blank: jax.Array  # [T, B] logits of the blank
    skip: jax.Array  # [B, N] whether label j - 1 may be followed by label j without a blank
    logit_lengths: jax.Array  # [B] frames
    label_lengths: jax.Array  # [B] labels


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), a, b)


def _states(column: jax.Array, labels: int) -> States:
    """States with probability 1 in one blank: a pair of Wide [B, N + 1]; column [B]."""
    here = jnp.arange(labels + 1)[None] == column[:, None]
    return wide_indicator(here), wide_zeros(here.shape)


def _cut(x: Wide, start: int | None, stop: int | None) -> Wide:
    return jax.tree.map(lambda v: v[..., start:stop], x)


def _forward_step(skip: jax.Array, states: States, frame: tuple) -> States:
    """One frame of alpha. Labels are kept at columns 1..N: column 0 is never reached."""
    blanks, labels = states  # [B, N + 1]
    label, blank, live = frame  # [B, N], [B, 1], [B, 1]
    previous = _cut(labels, None, -1)
    to_blank = wide_times(wide_sum(blanks, labels), blank)
    to_label = wide_sum(_cut(labels, 1, None), _cut(blanks, None, -1), wide_where(skip, previous))
    to_label = _where(live, wide_times(to_label, label), _cut(labels, 1, None))
    return _where(live, to_blank, blanks), wide_pad(to_label, (0, 0), (1, 0))


def _backward_step(skip: jax.Array, states: States, frame: tuple) -> States:
    """One frame of beta, the frame's own probability included. Labels are at columns 0..N-1."""
    blanks, labels = states  # [B, N + 1]
    label, blank, live = frame  # [B, N], [B, 1], [B, 1]
    following = _cut(labels, 1, None)
    to_blank = wide_times(wide_sum(blanks, labels), blank)
    to_label = wide_sum(_cut(labels, None, -1), _cut(blanks, 1, None), wide_where(skip, following))
    to_label = _where(live, wide_times(to_label, label), _cut(labels, None, -1))
    return _where(live, to_blank, blanks), wide_pad(to_label, (0, 0), (0, 1))


def _chunk(problem: _Problem, index: jax.Array) -> tuple[tuple, jax.Array]:
    """Frames of a chunk, ready for a step, and the first of them.

    The last chunk ends with the last frame; the frames that it shares with the one before are not
    live.
    """
    T = problem.blank.shape[0]
    size = min(CHUNK, T)
    start = jnp.minimum(index * size, T - size)
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    label, blank = wide_exp(cut(problem.emissions)), wide_exp(cut(problem.blank)[..., None])
    frame = start + jnp.arange(size)[:, None]  # [size, 1]
    live = (frame >= index * size) & (frame < problem.logit_lengths[None])
    return (label, blank, live[..., None]), start


def _chunks(frames: int) -> jax.Array:
    return jnp.arange(-(-frames // min(CHUNK, frames)))


def _scan(step: Callable, states: States, frames: tuple, reverse: bool = False) -> tuple:
    """lax.scan over the frames of a chunk."""
    # On accelerators, a step of a loop costs several times its arithmetic, and copies of states.
    unroll = 1 if partition.platform() == "cpu" else min(UNROLL, len(frames[0].mantissa))
    return lax.scan(step, states, frames, reverse=reverse, unroll=unroll)


def _keep_labels(step: Callable) -> Callable:
    def body(states, frame):
        blanks, labels = step(states, frame)
        return (blanks, labels), labels

    return body


def _normalized_states(states: States) -> States:
    return tuple(map(normalized, states))


def _likelihood(problem: _Problem) -> tuple[Wide, States]:
    """The likelihood times the softmax denominators, a Wide [B]; alpha before every chunk."""
    T, _, N = problem.emissions.shape

    def advance(states, index):
        frames, _ = _chunk(problem, index)
        step = lambda states, frame: (_forward_step(problem.skip, states, frame), None)
        return _normalized_states(_scan(step, states, frames)[0]), states

    states = _states(jnp.zeros_like(problem.label_lengths), N)
    (blanks, labels), checkpoints = lax.scan(advance, states, _chunks(T))
    # The last blank or the last label; column 0 of the labels is 0, for rows with none.
    last = problem.label_lengths[:, None]
    pick = lambda x: jax.tree.map(lambda v: jnp.take_along_axis(v, last, axis=1)[:, 0], x)
    return normalized(wide_sum(pick(blanks), pick(labels))), checkpoints


def _occupancy(alpha: Wide, beta: Wide, own: Wide, likelihood: Wide) -> jax.Array:
    """Posterior of each label at each frame [T, B, N]; alpha and beta both hold the frame's `own`.

    alpha, beta, own: Wide [T, B, N]; likelihood: Wide [B].
    """
    # The frame's own probability is divided out; where it is 0, so are alpha and beta.
    mantissa = jnp.where(own.mantissa == 0, 1, own.mantissa)
    exponent = alpha.exponent + beta.exponent - own.exponent
    return wide_over(Wide(alpha.mantissa * beta.mantissa / mantissa, exponent), likelihood)


def _subtract_labels(gradient: jax.Array, labels: jax.Array, occupancy: jax.Array) -> jax.Array:
    # [B, T, K] less [B, T, N] at the classes of the labels [B, N].
    return jax.vmap(lambda row, ids, x: row.at[:, ids].add(-x, mode="promise_in_bounds"))(
        gradient, labels, occupancy
    )


def _gradient(
    problem: _Problem,
    logits: jax.Array,
    total: jax.Array,
    labels: jax.Array,
    blank_id: int,
    likelihood: Wide,
    checkpoints: States,
    cotangent: jax.Array,
) -> jax.Array:
    """The cotangent times softmax - occupancy, [B, T, K] in the dtype of the logits."""
    T, _, N = problem.emissions.shape
    step = partial(_forward_step, problem.skip)
    # What follows label j directly is label j + 1, unless they are equal.
    follows = jnp.pad(problem.skip[:, 1:], ((0, 0), (0, 1)))
    back = partial(_backward_step, follows)
    cotangent = jnp.where(likelihood.mantissa == 0, 0, cotangent)

    def advance(carry, xs):
        states, gradient = carry
        index, checkpoint = xs
        frames, start = _chunk(problem, index)
        label, _, live = frames  # [size, B, N], ..., [size, B, 1]
        _, alpha = _scan(_keep_labels(step), checkpoint, frames)
        states, beta = _scan(_keep_labels(back), states, frames, reverse=True)
        alpha, beta = _cut(alpha, 1, None), _cut(beta, None, -1)  # [size, B, N]
        occupancy = _occupancy(alpha, beta, label, likelihood)
        weight = jnp.where(live[..., 0], cotangent[None], 0)  # [size, B]
        occupancy = (jnp.where(live, occupancy, 0) * weight[..., None]).swapaxes(0, 1)
        # [B, size, K] from here on.
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


def _softmax(logits: jax.Array, lengths: jax.Array) -> _Softmax:
    largest = logits.max(axis=-1).astype(jnp.float32)  # [B, T]
    rest = jnp.log(jnp.exp(logits.astype(jnp.float32) - largest[..., None]).sum(axis=-1))
    exponent = wide_exp(largest).exponent
    whole = exponent.astype(jnp.float32)
    remainder = rest + ((largest - whole * LN2_HIGH) - whole * LN2_LOW)
    live = jnp.arange(logits.shape[1])[None] < lengths[:, None]
    row_sum = lambda x: jnp.where(live, x, 0).sum(axis=1)
    return _Softmax(largest + rest, row_sum(remainder), row_sum(exponent))


def _negative_log(likelihood: Wide, softmax: _Softmax) -> jax.Array:
    # -log(likelihood / softmax denominators); +inf where the likelihood is 0.
    whole = likelihood.exponent - softmax.exponent
    loss = softmax.remainder - jnp.log(likelihood.mantissa) - whole.astype(jnp.float32) / LOG2_E
    return jnp.where(likelihood.mantissa == 0, jnp.inf, loss)


def _problem(
    logits: jax.Array,
    logit_lengths: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    blank_id: int,
) -> _Problem:
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
    live = jnp.arange(len(emissions))[:, None] < logit_lengths[None]
    possible = live & (likelihood.mantissa > 0)[None]
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
    logits: jax.Array,
    logit_lengths: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    *,
    blank_id: int = 0,
    zero_infinity: bool = False,
    implementation: str = "xla",
    batch_axes: tuple[str, ...] | str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """The CTC loss of each row.

    Rows that no alignment fits (see `ctc_feasible`) have a loss of +inf and a gradient of 0. What
    the padding of logits and labels holds changes nothing.

    Args:
      logits: [B, T, K], float32 or bfloat16, not normalized; K classes, the blank among them.
      logit_lengths: int [B], frames in each row, 0 to T.
      labels: int [B, N], ids in [0, K) other than `blank_id`, padded on the right.
      label_lengths: int [B], labels in each row, 0 to N.
      blank_id: the blank's class.
      zero_infinity: return 0 instead of +inf.
      implementation: 'xla', which runs anywhere, or the kernel 'pallas_tpu' or 'pallas_gpu'. The
        kernels have only run interpreted so far, so neither is a default.
      batch_axes: mesh axes over which B is sharded; each shard is then computed on its own, by
        shard_map over the mesh of `jax.set_mesh`. The kernels need it on several devices; XLA does
        not.
      interpret: None compiles a kernel, if this platform runs it; False compiles it for whatever
        platform the program is lowered to (ahead of time, for another machine); True, or the
        platform's Pallas interpreter parameters, interprets it on any platform.

    Returns:
      Nats, float32 [B]: -log p(labels | logits). The gradient has the dtype of the logits.

    Raises:
      ValueError: a shape or dtype does not fit; a length, id or implementation is out of range.
        Lengths and ids are checked where their values are known, so not under jit.
    """
    args = checked(logits, logit_lengths, labels, label_lengths, blank_id)
    _check_implementation(implementation, interpret)

    def run(*args):
        if implementation == "xla":
            return _ctc_xla(*args, blank_id)
        return _ctc_pallas(*args, blank_id, (implementation.removeprefix("pallas_"), interpret))

    if batch_axes is not None:
        spec = jax.sharding.PartitionSpec(batch_axes)
        run = jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)
    loss = run(*args)
    return jnp.where(jnp.isinf(loss), 0, loss) if zero_infinity else loss


def ctc_feasible(
    logit_lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
    """Which rows have an alignment at all, bool [B]: frames >= labels + adjacent repeats.

    Args: logit_lengths int [B], labels int [B, N] padded on the right, label_lengths int [B].
    """
    labels, label_lengths = jnp.asarray(labels), jnp.asarray(label_lengths)
    inside = jnp.arange(1, labels.shape[1])[None] < label_lengths[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1, dtype=jnp.int32)
    return jnp.asarray(logit_lengths) >= label_lengths + repeats


def ctc_align(
    logits: jax.Array,
    logit_lengths: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    *,
    blank_id: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The most probable alignment (Viterbi).

    Args: as for `ctc_loss`.

    Returns:
      starts, ends: int32 [B, N], the frames [start, end) in which each label is emitted; both -1
        beyond label_lengths and in rows that no alignment fits.
      score: float32 [B], log p(alignment | logits) in nats; -inf in those rows.

    Raises:
      ValueError: as `ctc_loss`.
    """
    given = jnp.shape(labels)
    args = checked(logits, logit_lengths, labels, label_lengths, blank_id)
    logits, logit_lengths, labels, label_lengths = args
    (B, T, _), N = logits.shape, labels.shape[1]
    # States [B, 2N + 1]: blank, label 0, blank, label 1, ..., blank.
    states = jnp.full((B, 2 * N + 1), blank_id).at[:, 1::2].set(labels)
    skip = jnp.pad(states[:, 2:] != states[:, :-2], ((0, 0), (2, 0))) & (states != blank_id)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    emissions = jnp.take_along_axis(log_probs, states[:, None, :], axis=2).swapaxes(0, 1)
    shift = lambda x, n: jnp.pad(x, ((0, 0), (n, 0)), constant_values=-jnp.inf)[:, : 2 * N + 1]

    def forward(scores, frame):
        t, emission = frame  # emission [B, 2N + 1]; a move is 0, 1 or 2 states ahead
        moves = jnp.stack([scores, shift(scores, 1), jnp.where(skip, shift(scores, 2), -jnp.inf)])
        live = (t < logit_lengths)[:, None]
        move = jnp.where(live, jnp.argmax(moves, axis=0), 0)
        scores = jnp.where(live, moves.max(axis=0) + emission, scores)
        return scores, move.astype(jnp.int8)

    # Before the first frame: one move to the first blank, or to the first label.
    scores = jnp.full((B, 2 * N + 1), -jnp.inf).at[:, 0].set(0)
    scores, moves = lax.scan(forward, scores, (jnp.arange(T), emissions))
    last = 2 * label_lengths
    pick = lambda x, i: jnp.take_along_axis(x, i[:, None], axis=1)[:, 0]
    before_last = jnp.where(label_lengths > 0, pick(scores, jnp.maximum(last - 1, 0)), -jnp.inf)
    score = jnp.maximum(pick(scores, last), before_last)
    last = jnp.where(before_last > pick(scores, last), last - 1, last)

    def backward(state, move):
        return state - pick(move, state).astype(jnp.int32), state

    _, path = lax.scan(backward, last, moves, reverse=True)  # [T, B], the state of each frame
    t = jnp.arange(T)[:, None]
    fits = score > -jnp.inf
    column = jnp.where((path % 2 == 1) & (t < logit_lengths[None]) & fits[None], path // 2, N)
    rows = jnp.arange(B)[None]
    starts = jnp.full((B, N + 1), T, jnp.int32).at[rows, column].min(t)[:, : given[1]]
    ends = jnp.full((B, N + 1), -1, jnp.int32).at[rows, column].max(t + 1)[:, : given[1]]
    return jnp.where(ends < 0, -1, starts), ends, score


def _check_implementation(implementation: str, interpret: Any) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is none of {IMPLEMENTATIONS}")
    if interpret is None and (reason := obstacle(implementation, jax.default_backend())):
        raise ValueError(f"implementation {implementation!r} cannot run here: {reason}; use 'xla'")


def obstacle(implementation: str, platform: str) -> str:
    """Why an implementation cannot run on this platform; '' if it can."""
    if implementation == "xla":
        return ""
    wanted = implementation.removeprefix("pallas_")
    if platform != wanted:
        return f"it needs a {wanted.upper()} and the platform is {platform}"
    if wanted == "gpu" and float(jax.local_devices()[0].compute_capability) < 9:
        return f"it needs a Hopper GPU or newer and this is {jax.local_devices()[0].device_kind}"
    return ""
