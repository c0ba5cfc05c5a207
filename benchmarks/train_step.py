"""A training step: time, rate, MFU, memory and compilation; against transformers, taking turns.

  python -m benchmarks.train_step --model=conformer-s,wav2vec2-base,deepspeech-ds2,wavenet-base
  python -m benchmarks.train_step --model=conformer-s --profile=FOLDER
  python -m benchmarks.train_step --model=conformer-s --peer=transformers
  python -m benchmarks.train_step --model=4x256 --peer=transformers --json FILE
  python -m benchmarks.train_step --model=wav2vec2-base --peer=transformers --frozen

Without a peer: the whole step of a run (front end, SpecAugment, dropout, CTC, clipping, AdamW) on
full rows of noise, in float32 on CPU and in bfloat16 elsewhere. MFU is of the analytic FLOPs of
matrix products and convolutions (speech_jax/training/costs.py) over the peak there; "compiler"
is what is in the compiled program of them, over the analytic ones, which a program that recomputes
or calls libraries has more or fewer of. "cold" is to trace and compile, "kept" the same again with
what the first time has kept. --profile leaves a trace and prints what takes most time.

With a peer, benchmarks/transformers_steps.py says what is compared. `4x256` is a Conformer of 4
layers of width 256. The medians of both, and how often they took turns, are in one row.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import table, transformers_steps
from benchmarks.hardware import hottest
from benchmarks.hardware.build import Model, Step, config_of
from speech_jax import main as command
from speech_jax.preflight import hlo
from speech_jax.training import costs

# Layers and width.
CONFORMERS = {"conformer-s": (16, 144), "conformer-m": (16, 256), "conformer-l": (17, 512)}
PROFILED = 3  # steps
SHOWN = 10  # instructions


def whole_steps(names: list[str], chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each of our own steps."""
    for name in names:
        cold, kept = _started(name, chosen), _started(name, chosen)
        step, seconds = kept
        step.model.start()
        step.load()
        took = table.interleaved_medians({name: step}, repeats=chosen.repeats, warmup=2)[name]
        found = hlo.products(step.text)
        yield {
            "step": name,
            "ms": 1e3 * took,
            "audio s/s": step.rows * step.seconds / took,
            "MFU": step.flops / took / costs.peak_flops(),
            "GFLOP": step.flops / 1e9,
            "compiler": found / step.flops,
            "temporary MiB": step.temporary / 2**20,
            "M parameters": step.model.parameters / 1e6,
            "cold s": cold[1],
            "kept s": seconds,
        }
        if chosen.profile:
            _profile(step, chosen.profile / name)


def _started(name: str, chosen: argparse.Namespace) -> tuple[Step, float]:
    """A compiled step and how long it took to make, from a configuration on."""
    start = time.perf_counter()
    config = config_of(name, tiny=chosen.tiny)
    if jax.default_backend() == "cpu":
        config.model.dtype = "float32"
    model = Model(config, vocabulary_size=32 if name.startswith("wav2vec2") else 1024)
    step = model.trace(chosen.rows, chosen.seconds, labels_per_second=5).compile()
    return step, time.perf_counter() - start


def _profile(step: Step, folder: pathlib.Path) -> None:
    found = hottest.profile(step, PROFILED, step.text, folder=folder)
    costs_of = hlo.costs(step.text)
    print(f"{found.milliseconds:.1f} ms in instructions; the trace is in {folder}")
    rows = []
    for kernel in found.kernels[:SHOWN]:
        moved, products = costs_of.get(kernel.name, (0.0, 0.0))
        rows.append(
            {
                "instruction": kernel.name,
                "ms": kernel.milliseconds,
                "share": kernel.share,
                "runs": kernel.count,
                "MB": moved / 1e6,
                "MFLOP": products / 1e6,
                "of": kernel.place[-70:],
            }
        )
    table.report(rows)


def against_transformers(names: list[str], chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of ours and theirs."""
    for name in names:
        if name.startswith("wav2vec2"):
            kinds = {"fine-tuning": lambda name=name: _fine_tuning(name, chosen)}
        else:
            layers, width = _conformer(name)
            kinds = {
                part: lambda layers=layers, width=width, front=front: transformers_steps.encoders(
                    width, layers, chosen.rows, chosen.seconds, front=front
                )
                for part, front in (("layers", False), ("with their fronts", True))
            }
        for part, make in kinds.items():
            calls, arithmetic = make()
            losses = {side: call() for side, call in calls.items()}
            seconds = table.interleaved_medians(calls, repeats=chosen.repeats, warmup=1)
            for side, took in seconds.items():
                yield {
                    "step": f"{name}, {part}: {side}",
                    "first loss": losses[side],
                    "ms": 1e3 * took,
                    "audio s/s": chosen.rows * chosen.seconds / took,
                    "MFU": arithmetic / took / costs.peak_flops(),
                    "speed-up": seconds["transformers"] / took,
                }


def _conformer(name: str) -> tuple[int, int]:
    """Layers and width of a Conformer by its name, such as conformer-s or 4x256."""
    if name in CONFORMERS:
        return CONFORMERS[name]
    layers, _, width = name.partition("x")
    if not (layers.isdecimal() and width.isdecimal()):
        raise SystemExit(
            f"error: nothing is compared with {name!r}: take {', '.join(CONFORMERS)}, 4x256 (4 "
            "layers of width 256) or wav2vec2-base"
        )
    return int(layers), int(width)


def _fine_tuning(name: str, chosen: argparse.Namespace):
    return transformers_steps.fine_tuning(name, chosen.rows, chosen.seconds, frozen=chosen.frozen)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wav2vec2-base", help="names joined by commas")
    parser.add_argument("--peer", choices=("transformers",))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--frozen", action="store_true", help="without the feature extractor")
    parser.add_argument("--tiny", action="store_true", help="small models of the same kinds")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", type=pathlib.Path, help="a folder for traces")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    if jax.default_backend() == "cpu":
        command.keep_memory()  # as a run has it; it is the peer's memory too
    names, rows = chosen.model.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        if not chosen.peer:  # before anything is compiled
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        costs.peak_flops()
        for row in (against_transformers if chosen.peer else whole_steps)(names, chosen):
            print(f"{row['step']}: {row['ms']:.1f} ms", file=sys.stderr, flush=True)
            rows.append(row)
        table.report(rows, file=chosen.json)


if __name__ == "__main__":
    main()
