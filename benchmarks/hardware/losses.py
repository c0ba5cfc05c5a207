"""CTC's value and gradient on the shapes of benchmarks/ctc.py: ours, the kernel, optax and torch.

--names are the implementations of ours that are known to be right, joined by commas; --only is the
barriers of the GPU kernel (kernels.py). `graphs` stands for XLA alone, with what XLA_FLAGS say.
"""

import argparse
import concurrent.futures
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import ctc as benchmark
from benchmarks.hardware import Table, alone, left, median_seconds, run_part
from benchmarks.hardware.kernels import set_barriers
from speech_jax.ops import ctc

TINY = ((2, 20, 5, 16),)


def run(table: Table, flags: argparse.Namespace) -> None:
    """A row for each shape and contestant, our best first."""
    barriers = flags.only or "own"
    set_barriers(barriers)
    names = flags.names.split(",")
    graphs = names == ["graphs"]
    contestants = {name: partial(ctc.ctc_loss, implementation=name) for name in names}
    if graphs:
        contestants = {"xla, loops in graphs": ctc.ctc_loss}
    elif barriers == "own":
        contestants["optax"] = benchmark.optax_loss
    shapes = TINY if flags.tiny else benchmark.SHAPES
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = {shape: benchmark.problem(*shape, jnp.float32) for shape in shapes}
        programs = {
            (shape, name): pool.submit(_compile, loss, problems[shape])
            for shape in shapes
            for name, loss in contestants.items()
        }
    for shape, arrays in problems.items():
        if left(flags) < 5:
            break
        what = "B,T,N,K = " + ",".join(map(str, shape))
        for name in contestants:
            with table.attempt(f"{name}, {what}"):
                program = programs[shape, name].result()
                _measure(table, flags, f"{name}, {what}", program, arrays, shape)
        if barriers == "own" and not graphs:
            with table.attempt(f"torch, {what}"):
                for name, call in torch_calls(arrays).items():
                    with table.attempt(f"{name}, {what}"), alone(flags.work):
                        seconds = median_seconds(call, 3 if flags.tiny else 11)
                        table.add(f"{name}, {what}", ms=1e3 * seconds)


def _compile(loss: Callable, arrays: tuple) -> jax.stages.Compiled:
    total = lambda *args: loss(*args).sum()
    return jax.jit(jax.value_and_grad(total)).lower(*arrays).compile()


def _measure(table, flags, what, compiled, arrays, shape) -> None:
    with alone(flags.work):
        call = lambda: jax.block_until_ready(compiled(*arrays))
        seconds = median_seconds(call, 3 if flags.tiny else 15)
    if "pallas" in what:
        what += f", {flags.only or 'own'} barriers"
    table.add(
        what,
        ms=1e3 * seconds,
        us_a_frame=1e6 * seconds / shape[1],
        temporary_MB=compiled.memory_analysis().temp_size_in_bytes / 1e6,
    )


def torch_calls(arrays) -> dict[str, Callable[[], None]]:
    """The native loss of torch and, on a GPU, cuDNN's (which wants whole rows of frames)."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    logits, frames, labels, lengths = (torch.tensor(np.asarray(x)) for x in arrays)
    logits = logits.float().to(device).requires_grad_()

    def call(labels, frames, lengths, native):
        logits.grad = None
        with torch.backends.cudnn.flags(enabled=not native):
            log_probs = torch.log_softmax(logits, -1).transpose(0, 1)
            loss = torch.nn.functional.ctc_loss(log_probs, labels, frames, lengths, reduction="sum")
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    there = [x.long().to(device) for x in (labels, frames, lengths)]
    calls = {"torch native": lambda: call(*there, native=True)}
    if device == "cuda":
        flat = torch.cat([row[:n] for row, n in zip(labels, lengths, strict=True)]).int()
        whole = torch.full_like(frames, logits.shape[1]).int()
        calls["torch cuDNN"] = lambda: call(flat, whole, lengths.int(), native=False)
    return calls


if __name__ == "__main__":
    run_part("ctc time", run)
