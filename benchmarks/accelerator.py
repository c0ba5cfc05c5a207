"""Everything that only an accelerator can show, checked and measured by one command.

  python -m benchmarks.accelerator --data FOLDER --seconds 480 --out accelerator.md

Most valuable first, and written to --out (Markdown; lines of JSON beside it, and a log) after every
measurement, so that nothing is lost when the time ends or a part hangs:

- the device: what it is, its matrix rate, bandwidth and latencies;
- the CTC kernel, in a process of its own: right or not, against float64; then its times against
  XLA, optax and torch (native and cuDNN). Where it is right and faster, what follows uses it;
- the training steps of Conformer L, M, S and wav2vec2 Base: time, rate, MFU, memory, compilation;
  the same in PyTorch by transformers; numerics of the models against float32 on the CPU; variants
  of attention and convolutions side by side. These four compile at the same time, and take turns
  in measuring;
- real training on the speech in --data (LibriSpeech/train-clean-5 and dev-clean-5) until the time
  ends: input wait, learning curve, WER.

Every part is a module of benchmarks/hardware and can be run alone. --parts chooses some; --tiny
goes through all of it in small sizes on any machine.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from math import exp, log

from benchmarks.hardware import Table

PARTS = ("device", "ctc", "steps", "training")
# Seconds that a part may take at most; what it does not need goes to the training.
LIMITS = {"device": 45, "kernel": 70, "kernel again": 35, "times": 75, "steps": 170}
TRAINING = 0.46  # of the time is kept for the training
MARGIN = 2.0  # seconds before its limit at which a part should end by itself


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help="speech, as ../shared/device packs it")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("accelerator.md"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--ctc", default="", help="the loss of the steps; default: the best")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test on a CPU")
    flags = parser.parse_args()
    parts = flags.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not flags.data:
        parts = [part for part in parts if part != "training"]
    reserve = TRAINING * flags.seconds if "training" in parts else 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        run = _Run(flags, pathlib.Path(work), reserve)
        try:
            _run_parts(run, flags, parts)
        finally:
            run.end()


def _run_parts(run: "_Run", flags: argparse.Namespace, parts: list[str]) -> None:
    cpu = {"JAX_PLATFORMS": "cpu"}
    if "device" in parts:
        run.wait(run.start("device", "device", LIMITS["device"]))
    if "training" in parts:
        run.start("speech", "speech", 60, **cpu)
    if "steps" in parts:
        run.start("reference", "numerics", 120, "--only=reference", **cpu)
    chosen = flags.ctc or "xla"
    if "ctc" in parts:
        chosen = flags.ctc or _ctc(run)
    if "steps" in parts:
        # Together they must fit in the device's memory.
        loss, some = f"--ctc={chosen}", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        limit = LIMITS["steps"] * max(flags.seconds / 480, 1)
        together = [
            run.start("steps", "steps", limit, loss, XLA_PYTHON_CLIENT_MEM_FRACTION=".5"),
            run.start("peers", "peers", limit),
            run.start("numerics", "numerics", limit, loss, **some),
            run.start("variants", "variants", limit, **some),
        ]
        for name in together:
            run.wait(name)
    if "training" in parts:
        run.reserve = 0.0
        run.wait(run.start("training", "training", flags.seconds, f"--ctc={chosen}"))
    _summary(run.table)


def _ctc(run: "_Run") -> str:
    """Checks and times the kernel; the implementation that the rest should use."""
    right = []
    for barriers in ("own", "auto", "light"):
        if barriers == "auto" and "own" in right:
            continue  # wanted only to learn whether the barriers are what is wrong
        limit = LIMITS["kernel" if barriers == "own" else "kernel again"]
        run.wait(run.start(f"kernel {barriers}", "kernels", limit, f"--only={barriers}"))
        verdict = f"verdict, {barriers} barriers"
        if any(row.get("what") == verdict and row["right"] for row in run.table.rows()):
            right.append(barriers)
    kernel = "pallas_tpu" if _platform(run.table) == "tpu" else "pallas_gpu"
    device = _platform(run.table) != "cpu"
    first = ["xla", *([kernel] if device and "own" in right else [])]
    half = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}  # torch wants some of it
    run.wait(run.start("times", "losses", LIMITS["times"], f"--ctc={','.join(first)}", **half))
    for barriers in right:
        if barriers != "own" and device:
            arguments = f"--ctc={kernel}", f"--only={barriers}"
            run.wait(run.start(f"times {barriers}", "losses", LIMITS["kernel again"], *arguments))
    times = _times(run.table)
    ours = [shape["xla"] / shape[kernel] for shape in times.values() if {"xla", kernel} <= {*shape}]
    best = kernel if ours and sum(map(log, ours)) > 0 else "xla"
    run.table.add("the loss that what follows uses", ctc=best)
    return best


def _platform(table: Table) -> str:
    kinds = [row["kind"] for row in table.rows() if row.get("what") == "device"]
    if not kinds or "TPU" in kinds[0]:
        return "tpu" if kinds else "gpu"
    return "cpu" if kinds[0] == "cpu" else "gpu"


class _Run:
    """The processes of the parts, and the time they have."""

    def __init__(self, flags: argparse.Namespace, work: pathlib.Path, reserve: float):
        """`reserve`: seconds at the end that are kept for the last part."""
        self._flags, self._work, self.reserve = flags, work, reserve
        self._end = time.monotonic() + flags.seconds
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}
        self.table = Table(flags.out.absolute(), "all")
        self.table.start("On an accelerator: " + " ".join(sys.argv[1:]))

    def start(
        self, name: str, module: str, limit: float, *arguments: str, **environment: str
    ) -> str:
        """Starts a part, which may take `limit` seconds where there are so many."""
        flags = self._flags
        limit = max(min(limit, self.left() - self.reserve), 1.0)
        command = [
            sys.executable, "-m", f"benchmarks.hardware.{module}", f"--out={flags.out.absolute()}",
            f"--work={self._work}", f"--seconds={limit - MARGIN:.0f}", *arguments,
        ]  # fmt: skip
        command += [f"--data={flags.data.absolute()}"] if flags.data else []
        command += ["--tiny"] if flags.tiny else []
        with flags.out.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(
                command, stderr=log, env=_environment() | environment, start_new_session=True
            )
        self._running[name] = process, time.monotonic() + limit
        return name

    def wait(self, name: str) -> None:
        """Waits for a part, and ends it at its limit."""
        process, until = self._running.pop(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0.1))
        if process.returncode is None:
            self.table.fail(name, "out of time: ended")
        elif process.returncode:
            self.table.fail(name, f"ended by itself with {process.returncode}: see the log")
        _kill(process)

    def left(self) -> float:
        """Seconds left in all."""
        return self._end - time.monotonic()

    def end(self) -> None:
        """Ends what still runs, and keeps the curves of the training."""
        for process, _ in self._running.values():
            _kill(process)
        folder = self._flags.out.absolute().parent
        for name in ("run/metrics.jsonl", "run/predictions/dev-clean-5.jsonl", "run.log"):
            with contextlib.suppress(OSError):
                shutil.copy(self._work / name, folder / f"training.{name.rpartition('/')[2]}")


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)  # a process that hangs in its driver is left behind


def _environment() -> dict[str, str]:
    """Ours, with CUDA's own tools named: JAX 0.11 looks for them in wheels only."""
    there = dict(os.environ)
    there.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    found = shutil.which("ptxas")
    places = ["/usr/local/cuda", *([str(pathlib.Path(found).parent.parent)] if found else [])]
    for place in places:
        if "CUDA_ROOT" not in there and (pathlib.Path(place) / "bin" / "ptxas").exists():
            there["CUDA_ROOT"] = place
    return there


# ---- What the figures say together --------------------------------------------------------------


def _times(table: Table) -> dict[str, dict[str, float]]:
    """Milliseconds of each implementation of CTC, by shape."""
    times: dict[str, dict[str, float]] = {}
    for row in table.rows():
        if row.get("part") == "ctc time" and "ms" in row:
            name, _, shape = row["what"].partition(", B,T,N,K = ")
            shape, _, barriers = shape.partition(", ")
            key = name if barriers in ("", "own barriers") else f"{name}, {barriers}"
            times.setdefault(shape, {})[key] = row["ms"]
    return times


def _summary(table: Table) -> None:
    """Ratios: others' time over ours."""
    times = _times(table)
    for ours in ("xla", "pallas_gpu", "pallas_tpu"):
        others = {name for shape in times.values() for name in shape} - {ours}
        ratios = {}
        for other in sorted(others):
            both = [s[other] / s[ours] for s in times.values() if {other, ours} <= {*s}]
            if both:
                ratios[other.replace(" ", "_")] = exp(sum(map(log, both)) / len(both))
        if ratios:
            table.add(f"CTC, {ours}: times as fast as, geometric mean", **ratios)
    rates = {"step": {}, "peer": {}}
    for row in table.rows():
        if row.get("part") in rates and "audio_s_per_s" in row and "rows of" in row["what"]:
            rates[row["part"]][row["what"]] = row["audio_s_per_s"]
    for what, rate in rates["peer"].items():
        shape, _, way = what.rpartition(", ")
        if shape in rates["step"]:
            table.add(f"{shape}: times the rate of {way}", ratio=rates["step"][shape] / rate)


if __name__ == "__main__":
    main()
