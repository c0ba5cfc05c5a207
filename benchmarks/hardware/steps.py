"""The training step of a model as a run has it: time, rate, MFU, memory, compilation, profile.

--only is a model and its forms (forms.py), and how many seconds of audio a batch has where that is
not the model's usual: `conformer-l+fused@1280`. It is timed on full rows of noise. MFU is of
the analytic FLOPs of matrix products and convolutions (training/costs.py), forward and backward
without recomputation, over the data sheet's bfloat16 rate; front end, CTC, clipping and AdamW are
in the time and not in the FLOPs. Then a trace of some steps says what the time went to.

A process measures one step: what it holds of the device's memory is only freed when it ends.
"""

import argparse
import pathlib
import time

import jax

from benchmarks.hardware import Table, compiling, forms, hold, hottest, left, run_part
from benchmarks.hardware.build import Model, Step, config_of
from benchmarks.hardware.shapes import ROW_SECONDS, SIZES
from speech_jax.training import costs

PROFILED = 3  # steps
SHOWN = 12  # kernels, and modules


def run(table: Table, flags: argparse.Namespace) -> None:
    """Compiles, measures and profiles the step of --only."""
    name, _, total = flags.only.partition("@")
    kind = name.partition("+")[0]
    size, labels = SIZES[kind]
    seconds = 2.0 if flags.tiny else ROW_SECONDS
    rows = round((4.0 if flags.tiny else float(total or size)) / seconds)
    # Of the model as it is: a form may compute more, or what is not counted.
    usual = Model(config_of(kind, flags.tiny), vocabulary(kind))
    flops = usual.trace(rows, seconds, labels).flops
    started = time.perf_counter()
    model = Model(forms.apply(name, config_of(kind, flags.tiny)), vocabulary(kind))
    step = model.trace(rows, seconds, labels)
    traced = time.perf_counter() - started
    with compiling(flags.work):
        step.compile()
    hold(flags.work)
    with table.attempt(flags.only):
        model.start()
        took = _measure(table, flags, step, flops, traced)
    if left(flags) > 6:
        with table.attempt(f"{flags.only}, profile"):
            _profile(table, flags, step, took)


def vocabulary(kind: str) -> int:
    """Classes of a model's head, the blank among them."""
    return {"wav2vec2": 32, "recipe": 128}.get(kind.partition("-")[0], 1024)


def _measure(table, flags, step: Step, flops: float, traced: float) -> float:
    step.load()
    last, times = {}, []
    for number in range(4 if flags.tiny else 11):
        start = time.perf_counter()
        last = jax.device_get(step())
        if number > 1:
            times.append(time.perf_counter() - start)
        if left(flags) < 2:
            break
    took = sorted(times)[len(times) // 2]
    audio = step.rows * step.seconds
    table.add(
        f"{flags.only}, {step.rows} rows of {step.seconds:g} s",
        ms=1e3 * took,
        least_ms=1e3 * min(times),
        audio_s_per_s=audio / took,
        MFU=flops / took / costs.peak_flops(),
        TFLOP=flops / 1e12,
        temporary_GiB=step.temporary / 2**30,
        traced_s=traced,
        compile_s=step.compile_seconds,
        M_parameters=step.model.parameters / 1e6,
        finite=bool(last["finite"]),
        loss=float(last["loss"]),
        grad_norm=float(last["grad_norm"]),
    )
    return took


def _profile(table: Table, flags: argparse.Namespace, step: Step, took: float) -> None:
    found = hottest.profile(step, PROFILED, step.text)
    table.add(f"{flags.only}, profile", kernels_ms=found.milliseconds, step_ms=1e3 * took)
    for kernel in found.kernels[:SHOWN]:
        table.add(
            f"{flags.only}, kernel {kernel.name}",
            ms=kernel.milliseconds,
            share=kernel.share,
            runs=kernel.count,
            function=kernel.function[:80],
            place=kernel.place[-100:],
        )
    shown = list(found.modules.items())[:SHOWN]
    table.add(f"{flags.only}, modules, ms", **dict(shown))
    whole = flags.out.with_suffix(".kernels")
    lines = [
        f"{flags.only}\t{k.milliseconds:.4f}\t{k.count:g}\t{k.name}\t{k.function}\t{k.place}\n"
        for k in found.kernels[:150]
    ]
    with pathlib.Path(whole).open("a") as file:
        file.writelines(lines)


if __name__ == "__main__":
    run_part("step", run)
