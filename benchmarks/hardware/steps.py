"""The training step of each model as a run has it: time, rate, MFU, memory, compilation.

All programs are compiled first, some at once; then each is timed on full rows of noise. MFU is of
the analytic FLOPs of matrix products and convolutions (training/costs.py), forward and backward
without recomputation, over the data sheet's bfloat16 rate; front end, CTC, clipping and AdamW are
in the time and not in the FLOPs. --only names the models, joined by commas.
"""

import argparse
import concurrent.futures
import time

import jax

from benchmarks.hardware import Table, alone, choose_ctc, left, median_seconds, run_part
from benchmarks.hardware.build import Model, Step, config_of
from benchmarks.hardware.shapes import ROW_SECONDS, SIZES
from speech_jax.training import costs

THREADS = 6  # programs compiled at once


def run(table: Table, flags: argparse.Namespace) -> None:
    """Compiles in the background and times what is ready, in the order of SIZES."""
    choose_ctc(flags.ctc)
    names = flags.only.split(",") if flags.only else list(SIZES)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        waiting, states = [], {}
        for name in names:
            with table.attempt(name):
                started = time.perf_counter()
                model = Model(config_of(name, flags.tiny), vocabulary(name))
                states[name] = pool.submit(model.start)
                waiting += [
                    (name, step, pool.submit(step.compile)) for step in _trace(model, name, flags)
                ]
                table.add(f"{name}, traced", s=time.perf_counter() - started)
        # Better nothing is timed while this process compiles: the compiler tries kernels on the
        # device. But what is ready at two thirds of the time is not kept waiting.
        concurrent.futures.wait([future for _, _, future in waiting], timeout=left(flags) * 2 / 3)
        best: dict[str, float] = {}
        for name, step, future in waiting:
            if left(flags) < 4:
                break
            with table.attempt(f"{name}, {step.rows} rows"):
                states[name].result(timeout=max(left(flags) - 4, 0))
                future.result(timeout=max(left(flags) - 4, 0))
                rate = _measure(table, flags, name, step)
                best[name] = max(rate, best.get(name, 0.0))
            step.release()
        for name, rate in best.items():
            table.add(f"{name}, best batch", audio_s_per_s=rate)
        for _, _, future in waiting:
            future.cancel()


def vocabulary(name: str) -> int:
    """Classes of a model's head, the blank among them."""
    return {"wav2vec2": 32, "recipe": 128}.get(name.partition("-")[0], 1024)


def _trace(model: Model, name: str, flags: argparse.Namespace) -> list[Step]:
    totals, labels = SIZES[name]
    seconds = 2.0 if flags.tiny else ROW_SECONDS
    totals = (4.0,) if flags.tiny else totals
    return [model.trace(round(total / seconds), seconds, labels) for total in totals]


def _measure(table: Table, flags: argparse.Namespace, name: str, step: Step) -> float:
    with alone(flags.work):
        step.load()
        last = {}
        seconds = median_seconds(lambda: last.update(step()), 2 if flags.tiny else 8)
    audio = step.rows * step.seconds
    peak = costs.peak_flops()
    table.add(
        f"{name}, {step.rows} rows of {step.seconds:g} s",
        ms=1e3 * seconds,
        audio_s_per_s=audio / seconds,
        MFU=step.flops / seconds / peak,
        TFLOP=step.flops / 1e12,
        temporary_GiB=step.temporary / 2**30,
        compile_s=step.compile_seconds,
        M_parameters=step.model.parameters / 1e6,
        ctc=flags.ctc,
        finite=bool(jax.device_get(last["finite"])),
    )
    return audio / seconds


if __name__ == "__main__":
    run_part("step", run)
