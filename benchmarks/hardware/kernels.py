"""Whether the CTC kernel of this platform runs, and is right: its own process, for it may hang.

--only is the barriers of the GPU kernel: 'own' (as ops/ctc_pallas.py places them), 'auto' (Pallas
places more) or 'light' (its own, without the fence for asynchronous copies). The last row says
'right: True' where every case is.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hardware import Table, forms, left, run_part
from speech_jax.ops import ctc

# B, T, N, K, scale of the logits. Ragged; the first two rows of each are extreme. A case takes some
# seconds to compile.
CASES = (
    (4, 30, 8, 20, 3.0),
    (16, 400, 60, 1024, 1.0),
    (6, 300, 128, 40, 2.0),  # a second piece of 128 columns
    (4, 7, 12, 6, 1.0),  # more labels than frames
    (3, 3000, 200, 64, 5.0),
    (6, 300, 127, 40, 2.0),  # 128 columns, all of them taken
    (4, 400, 300, 32, 10.0),
    (3, 1, 1, 5, 1.0),
)
FEW = CASES[:3]
TINY = CASES[0], CASES[3], CASES[7]
TOLERANCE = 2e-5


def run(table: Table, flags: argparse.Namespace) -> None:
    """Every case against float64, value and gradient, three runs that must be equal."""
    name = implementation()
    forms.choose(flags.forms)
    barriers = flags.only or "own"
    set_barriers(barriers)
    right, known = True, 0
    cases = TINY if flags.tiny else CASES if barriers == "own" else FEW
    problems = [problem(number, *case) for number, case in enumerate(cases)]
    for case, arrays in zip(cases, problems, strict=True):
        if left(flags) < 3:
            break
        what = f"{name}, {barriers} barriers, B,T,N,K = {','.join(map(str, case[:4]))}"
        try:
            start = time.perf_counter()
            loss, gradient = evaluate(name, *arrays)
            # What can hang is known not to have; the comparison follows.
            table.add(f"{what}: it came back", s=time.perf_counter() - start)
        except Exception as error:
            table.fail(what, error)
            right = False
            break
        wanted, slope = reference(*arrays)
        again = [evaluate(name, *arrays) for _ in range(0 if flags.tiny else 3)]
        equal = all(
            np.array_equal(loss, x, equal_nan=True) and np.array_equal(gradient, y, equal_nan=True)
            for x, y in again
        )
        value_error = worst(loss, wanted, relative=True)
        gradient_error = worst(gradient, slope)
        xla, xla_gradient = evaluate("xla", *arrays)
        slack = lambda other: max(TOLERANCE, 4 * worst(*other))  # what float32 cannot do either
        good = equal and value_error < slack((xla, wanted, True))
        good = good and gradient_error < slack((xla_gradient, slope))
        right, known = right and good, known + 1
        table.add(
            what,
            right=good,
            value_error=value_error,
            gradient_error=gradient_error,
            repeats_equal=equal,
            xla_value_error=worst(xla, wanted, relative=True),
            xla_gradient_error=worst(xla_gradient, slope),
            infinite=int(np.isinf(wanted).sum()),
        )
    table.add(f"verdict, {barriers} barriers", right=bool(right and known), cases=known)


def implementation() -> str:
    """The kernel of this platform; the GPU's, interpreted, on a CPU."""
    return {"tpu": "pallas_tpu"}.get(jax.default_backend(), "pallas_gpu")


def interpreter() -> object | None:
    """How a kernel runs here: None for compiled."""
    if jax.default_backend() != "cpu":
        return None
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10

    return InterpretGPUParams()


def set_barriers(kind: str) -> None:
    """Changes the GPU kernel's barriers in this process, to see what they do and cost."""
    from speech_jax.ops import ctc_pallas

    plgpu = ctc_pallas.plgpu
    if kind == "auto":
        original = plgpu.CompilerParams
        plgpu.CompilerParams = lambda **settings: original(
            **settings | {"unsafe_no_auto_barriers": False}
        )
    elif kind == "light":
        from jax.experimental.mosaic.gpu import utils

        @plgpu.inline_mgpu()
        def barrier(_):
            utils.warpgroup_barrier()

        if jax.default_backend() != "cpu":  # the interpreter has no such thing
            plgpu.commit_smem = barrier
    elif kind != "own":
        raise ValueError(f"barriers {kind!r} are none of own, auto and light")


def evaluate(name: str, logits, frames, labels, lengths):
    """The loss of each row and the gradient of their finite sum."""
    loss, gradient = _evaluator(name)(logits, frames, labels, lengths)
    return np.asarray(loss), np.asarray(gradient)


_made = {}


def _evaluator(name: str):
    if name not in _made:
        interpret = None if name == "xla" else interpreter()
        loss = partial(ctc.ctc_loss, implementation=name, interpret=interpret)

        def both(logits, frames, labels, lengths):
            value, pullback = jax.vjp(lambda x: loss(x, frames, labels, lengths), logits)
            return value, pullback(jnp.ones_like(value))[0]

        _made[name] = jax.jit(both)
    return _made[name]


def problem(seed: int, B: int, T: int, N: int, K: int, scale: float):
    """Logits [B, T, K], frames [B], labels [B, N], label lengths [B]; short and empty rows too."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(max(1, T // 2), T + 1, B)
    lengths = rng.integers(0, N + 1, B)
    frames[0], lengths[0] = T, N
    lengths[1] = 0
    if B > 3:
        frames[3] = 1
    logits = (scale * rng.standard_normal((B, T, K))).astype(np.float32)
    labels = rng.integers(1, K, (B, N))
    return tuple(
        map(jnp.asarray, (logits, *(x.astype(np.int32) for x in (frames, labels, lengths))))
    )


def reference(logits, frames, labels, lengths):
    """The loss [B] and its gradient [B, T, K] in float64, in log space; 0 where there is no way."""
    logits, frames, labels, lengths = (np.asarray(x) for x in (logits, frames, labels, lengths))
    logits = logits.astype(np.float64)
    B, T, K = logits.shape
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    losses, gradients = np.full(B, np.inf), np.zeros((B, T, K))
    for b in range(B):
        t_end, n = int(frames[b]), int(lengths[b])
        states = np.zeros(2 * n + 1, int)
        states[1::2] = labels[b, :n]
        skip = np.zeros(len(states), bool)
        skip[2:] = (states[2:] != states[:-2]) & (states[2:] != 0)
        emission = log_probs[b, :t_end][:, states]
        alpha = _walk(emission, skip)
        back_skip = np.zeros(len(states), bool)
        back_skip[2:] = skip[::-1][:-2]
        beta = _walk(emission[::-1, ::-1], back_skip)[::-1, ::-1]
        ends = alpha[-1, -2:] if n else alpha[-1]
        total = np.logaddexp.reduce(ends)
        if not np.isfinite(total):
            continue
        losses[b] = -total
        occupancy = np.exp(alpha + beta - emission - total)
        gradients[b, :t_end] = np.exp(log_probs[b, :t_end])
        for t in range(t_end):
            np.add.at(gradients[b, t], states, -occupancy[t])
    return losses, gradients


def _walk(emission: np.ndarray, skip: np.ndarray) -> np.ndarray:
    alpha = np.full(emission.shape, -np.inf)
    alpha[0, :2] = emission[0, :2]
    with np.errstate(invalid="ignore"):
        for t in range(1, len(emission)):
            before = alpha[t - 1]
            one = np.concatenate([[-np.inf], before[:-1]])
            two = np.where(skip, np.concatenate([[-np.inf] * 2, before])[: len(before)], -np.inf)
            alpha[t] = np.logaddexp(np.logaddexp(before, one), two) + emission[t]
    return alpha


def worst(found: np.ndarray, wanted: np.ndarray, relative: bool = False) -> float:
    """The largest difference, of losses over the loss; infinite where one of them alone is."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    if not np.array_equal(np.isinf(found), np.isinf(wanted)) or np.isnan(found).any():
        return float("inf")
    finite = np.isfinite(wanted)
    scale = np.maximum(np.abs(wanted[finite]), 1.0) if relative else 1.0
    return float(np.max(np.abs(found[finite] - wanted[finite]) / scale, initial=0.0))


if __name__ == "__main__":
    run_part("ctc kernel", run)
