"""The forward and backward recursions of CTC as one kernel, for TPU (Mosaic) and GPU (Mosaic GPU).

Both directions run in the same time loop (TPU) or in concurrent blocks (GPU), so a value with its
gradient takes as many sequential steps as there are frames. A kernel reads the logits of each row's
labels, keeps its states in registers and VMEM or SMEM, and writes the label half of both histories:
the blank's occupancy is what the labels leave of 1.

Columns: label j of a row is column j, the blank before it is column j, and the last blank is column
N. Emissions hold the blank's logit in column N. The numbers are those of ops/wide.py; exponents are
not reduced by the softmax denominators, which the caller subtracts as integers.

On an H200 the GPU's kernel was as near to float64 as XLA's (values to 8e-8, gradients to 2e-6, five
shapes), but two calls gave the same bits for the smallest shape alone, nobody knows yet why: it is
no default (ops/ctc.py).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from speech_jax.ops.wide import (
    CHUNK,
    ZERO_EXPONENT,
    Wide,
    normalized,
    wide_exp,
    wide_indicator,
    wide_sum,
    wide_times,
    wide_where,
    wide_zeros,
)

LANES = 128
ROWS = 8  # rows of a batch tile on TPU: the sublanes of a register
PREFETCH = 4  # frames that a GPU block has in flight, to hide the latency of the L2 cache


def recursions(
    logits: jax.Array,
    skip: jax.Array,
    logit_lengths: jax.Array,
    label_lengths: jax.Array,
    *,
    platform: str,
    history: bool,
    interpret: Any = False,
) -> tuple[Wide, Wide | None, Wide | None]:
    """Alpha and beta by a kernel.

    Args:
      logits: float32 [T, B, N + 1], those of the labels and, last, of the blank.
      skip: bool [B, N], whether label j - 1 may be followed by label j without a blank.
      logit_lengths, label_lengths: int32 [B].
      platform: 'tpu' or 'gpu'.
      history: whether to compute alpha and beta of all frames; else they are None.
      interpret: True (TPU) or Pallas interpreter parameters: run it on any platform.

    Returns:
      The likelihood, a Wide [B], and alpha and beta of the labels, Wide [T, B, N], the frame's own
      probability in both; frames beyond logit_lengths hold anything.
    """
    T, B, N = logits.shape[0], logits.shape[1], skip.shape[1]
    columns = -(-(N + 1) // LANES) * LANES
    run = {"tpu": _run_tpu, "gpu": _run_gpu}[platform]
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, columns - N - 1)))
    skip = jnp.pad(skip.astype(jnp.int32), ((0, 0), (0, columns - N)))
    blanks, labels, histories = run(
        logits, skip, logit_lengths, label_lengths, N, history=history, interpret=interpret
    )
    blanks, labels = jax.tree.map(lambda x: x[:B], (blanks, labels))
    last = label_lengths[:, None]
    pick = lambda x, i: jax.tree.map(lambda v: jnp.take_along_axis(v, i, axis=1)[:, 0], x)
    # A row without labels ends in its only blank.
    final = wide_where(label_lengths > 0, pick(labels, jnp.maximum(last - 1, 0)))
    likelihood = normalized(wide_sum(pick(blanks, last), final))
    if not history:
        return likelihood, None, None
    alpha, beta = jax.tree.map(lambda x: x[:T, :B, :N], histories)
    return likelihood, alpha, beta


def _start(column, shape):
    # Probability 1 in the blank `column`, before the first frame of a direction.
    here = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == column
    return wide_indicator(here), wide_zeros(shape)


# TPU: a grid of (batch tiles, chunks of frames). The states of [ROWS, columns] stay in VMEM.


def _live(condition, new, old):
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _alpha_step(states, label, blank, skip, live):
    blanks, labels = states
    column = lax.broadcasted_iota(jnp.int32, skip.shape, 1)
    previous = Wide(*(pltpu.roll(x, 1, 1) for x in labels))
    previous = wide_where(column > 0, previous)
    to_blank = wide_times(wide_sum(blanks, previous), blank)
    to_label = wide_times(wide_sum(labels, blanks, wide_where(skip, previous)), label)
    return _live(live, (to_blank, to_label), states)


def _beta_step(states, label, blank, skip, live):
    blanks, labels = states
    columns = skip.shape[1]
    column = lax.broadcasted_iota(jnp.int32, skip.shape, 1)
    # What label j - 1 may be followed by: blank j, or label j.
    following = wide_sum(blanks, wide_where(skip, labels))
    following = Wide(*(pltpu.roll(x, columns - 1, 1) for x in following))
    following = wide_where(column < columns - 1, following)
    to_blank = wide_times(wide_sum(blanks, labels), blank)
    to_label = wide_times(wide_sum(labels, following), label)
    return _live(live, (to_blank, to_label), states)


def _tpu_kernel(
    forward_logits, backward_logits, skip, logit_lengths, label_lengths, *refs, labels, history
):
    alpha_refs, refs = refs[:4], refs[4:]
    chunk, chunks = pl.program_id(1), pl.num_programs(1)
    frames, shape = forward_logits.shape[0], skip.shape
    skips, lengths = skip[...] != 0, logit_lengths[...]
    if history:
        alpha_history, beta_history, beta_refs = refs[:2], refs[2:4], refs[4:]

    def load(refs):
        return Wide(refs[0][...], refs[1][...]), Wide(refs[2][...], refs[3][...])

    def store(refs, states):
        for ref, value in zip(refs, jax.tree.leaves(states), strict=True):
            ref[...] = value

    @pl.when(chunk == 0)
    def _():
        store(alpha_refs, _start(jnp.zeros_like(lengths), shape))
        if history:
            store(beta_refs, _start(label_lengths[...], shape))

    def frame(logits, i, first):
        probability = wide_exp(logits[i])
        blank = Wide(*(x[:, labels : labels + 1] for x in probability))
        return probability, blank, skips, first + i < lengths

    def body(i, states):
        alpha, beta = states
        alpha = _alpha_step(alpha, *frame(forward_logits, i, chunk * frames))
        if history:
            j = frames - 1 - i
            alpha_history[0][i], alpha_history[1][i] = alpha[1]
            beta = _beta_step(beta, *frame(backward_logits, j, (chunks - 1 - chunk) * frames))
            beta_history[0][j], beta_history[1][j] = beta[1]
        return alpha, beta

    states = load(alpha_refs), load(beta_refs) if history else ()
    alpha, beta = lax.fori_loop(0, frames, body, states)
    store(alpha_refs, jax.tree.map(normalized, alpha, is_leaf=lambda x: isinstance(x, Wide)))
    if history:
        store(beta_refs, jax.tree.map(normalized, beta, is_leaf=lambda x: isinstance(x, Wide)))


def _run_tpu(logits, skip, logit_lengths, label_lengths, labels, *, history, interpret):
    columns, frames = logits.shape[2], CHUNK
    pad = lambda x, *to: jnp.pad(x, [(0, -n % size) for n, size in zip(x.shape, to, strict=True)])
    logits, skip = pad(logits, frames, ROWS, 1), pad(skip, ROWS, 1)
    lengths = [pad(x[:, None], ROWS, 1) for x in (logit_lengths, label_lengths)]
    padded_frames, rows, _ = logits.shape
    chunks = padded_frames // frames
    ahead = pl.BlockSpec((frames, ROWS, columns), lambda b, t: (t, b, 0))
    behind = pl.BlockSpec((frames, ROWS, columns), lambda b, t: (chunks - 1 - t, b, 0))
    row = lambda width: pl.BlockSpec((ROWS, width), lambda b, t: (b, 0))
    dtypes = (jnp.float32, jnp.int32)
    out_shape = [jax.ShapeDtypeStruct((rows, columns), d) for d in dtypes * 2]
    out_specs, scratch = [row(columns)] * 4, []
    if history:
        out_shape += [jax.ShapeDtypeStruct(logits.shape, d) for d in dtypes * 2]
        out_specs += [ahead] * 2 + [behind] * 2
        scratch = [pltpu.VMEM((ROWS, columns), d) for d in dtypes * 2]
    outputs = pl.pallas_call(
        partial(_tpu_kernel, labels=labels, history=history),
        out_shape=out_shape,
        grid=(rows // ROWS, chunks),
        in_specs=[ahead, behind, row(columns), row(1), row(1)],
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret or False,
        name="ctc_recursions",
    )(logits, logits, skip, *lengths)
    wide = [Wide(*outputs[i : i + 2]) for i in range(0, len(outputs), 2)]
    return wide[0], wide[1], wide[2:]


# GPU: a block of one warpgroup for each row and direction. A state of `columns` is a list of pieces
# of 128, one value a thread, so that neighbours are read at any offset of shared memory unaligned.
# Exponents are float32: in jax 0.10.2 a selected int32 is taken for unsigned by what follows.


def _gpu_kernel(logits, skip, starts, lengths, lasts, *refs, labels, history):
    blank_refs, label_refs, refs = refs[:2], refs[2:4], refs[4:]
    histories, buffers = (refs[:2], refs[2:]) if history else ((), refs)
    row, direction = lax.axis_index("row"), lax.axis_index("direction")
    pieces = skip.shape[1] // LANES
    length, last = lengths[row], lasts[row]
    at = lambda piece: pl.ds(piece * LANES, LANES)
    each = lambda function, *lists: [function(*x) for x in zip(*lists, strict=True)]
    skips = [skip[row, at(p)] != 0 for p in range(pieces)]

    def share(slot, values, offset):
        # The values of the next (offset 1) or the previous (-1) column, by way of shared memory.
        # Two slots take turns: a thread that writes one has seen all threads leave it.
        for p, value in enumerate(values):
            for buffer, part in zip(buffers, value, strict=True):
                buffer[slot, pl.ds(p * LANES + 1, LANES)] = part
        plgpu.commit_smem()
        read = lambda buffer, p: buffer[slot, pl.ds(p * LANES + 1 + offset, LANES)]
        return [Wide(*(read(buffer, p) for buffer in buffers)) for p in range(pieces)]

    def alpha_step(slot, blanks, labels):
        previous = share(slot, labels, -1)
        to_blank = each(wide_sum, blanks, previous)
        return to_blank, each(
            lambda s, p, b, x: wide_sum(x, b, wide_where(s, p)), skips, previous, blanks, labels
        )

    def beta_step(slot, blanks, labels):
        leave = lambda s, b, x: wide_sum(b, wide_where(s, x))
        following = share(slot, each(leave, skips, blanks, labels), 1)
        return each(wide_sum, blanks, labels), each(wide_sum, labels, following)

    def run(step, frame_at):
        def load(i):
            frame = frame_at(jnp.minimum(i, last))
            return logits[row, frame, labels], [logits[row, frame, at(p)] for p in range(pieces)]

        def body(i, carry):
            (blanks, states), ((blank, emissions), *ahead) = carry
            ahead = (*ahead, load(i + PREFETCH))
            to_blank, to_label = step(lax.rem(i, 2), blanks, states)
            spread = lambda x: lax.broadcast_in_dim(x, (LANES,), ())
            blank = wide_exp(spread(blank), jnp.float32)
            blanks = [normalized(wide_times(x, blank)) for x in to_blank]
            states = [
                normalized(wide_times(x, wide_exp(e, jnp.float32)))
                for x, e in zip(to_label, emissions, strict=True)
            ]
            if history:
                for p, value in enumerate(states):
                    for ref, part in zip(histories, value, strict=True):
                        ref[direction, row, frame_at(i), at(p)] = part
            return (blanks, states), ahead

        def certain(here):
            return Wide(here, (here - 1) * -ZERO_EXPONENT)  # 1 where here is 1, 0 where it is 0

        blanks = [certain(starts[direction, row, at(p)]) for p in range(pieces)]
        zero = certain(blanks[0].mantissa * 0)
        for slot in range(2):
            for place in (0, pieces * LANES - LANES + 2):
                # The columns beyond either end are 0; their neighbours are overwritten.
                for buffer, part in zip(buffers, zero, strict=True):
                    buffer[slot, pl.ds(place, LANES)] = part
        plgpu.commit_smem()
        states = blanks, [zero] * pieces
        ahead = tuple(load(i) for i in range(PREFETCH))
        (blanks, states), _ = lax.fori_loop(0, length, body, (states, ahead))
        for p in range(pieces):
            for refs, values in ((blank_refs, blanks), (label_refs, states)):
                for ref, part in zip(refs, values[p], strict=True):
                    ref[direction, row, at(p)] = part

    @pl.when(direction == 0)
    def _():
        run(alpha_step, lambda i: i)

    if history:

        @pl.when(direction == 1)
        def _():
            run(beta_step, lambda i: last - i)


def _run_gpu(logits, skip, logit_lengths, label_lengths, labels, *, history, interpret):
    T, B, columns = logits.shape
    directions = 2 if history else 1
    shape = lambda *sizes: [jax.ShapeDtypeStruct(sizes, jnp.float32)] * 2
    out_type = shape(directions, B, columns) * 2
    if history:
        out_type += shape(directions, B, T, columns)
    starts = jax.nn.one_hot(jnp.stack([jnp.zeros_like(label_lengths), label_lengths]), columns)
    outputs = plgpu.kernel(
        partial(_gpu_kernel, labels=labels, history=history),
        out_type=out_type,
        scratch_types=[plgpu.SMEM((2, columns + 2), jnp.float32)] * 2,
        grid=(B, directions),
        grid_names=("row", "direction"),
        # One barrier a frame, in `share`, is enough: no thread reads what another wrote elsewhere.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret or None,
        kernel_name="ctc_recursions",
    )(logits.swapaxes(0, 1), skip, starts, logit_lengths, jnp.maximum(logit_lengths - 1, 0))
    blanks, states, *histories = [
        Wide(mantissa, exponent.astype(jnp.int32))
        for mantissa, exponent in zip(outputs[::2], outputs[1::2], strict=True)
    ]
    histories = jax.tree.map(lambda x: x.swapaxes(1, 2), histories)
    pick = lambda x, direction: jax.tree.map(lambda v: v[direction], x)
    histories = [pick(x, direction) for x in histories for direction in range(2)]
    return pick(blanks, 0), pick(states, 0), histories
