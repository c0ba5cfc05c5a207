"""Everything that only an accelerator can show, checked and measured by one command.

  python -m benchmarks.accelerator --data FOLDER --seconds 480 --out accelerator.md

Most valuable first, and written to --out (Markdown; lines of JSON beside it, and a log) after every
measurement, so that nothing is lost when the time ends or a part hangs:

- the device: what it is, its matrix rate, bandwidth and latencies;
- the training steps of Conformer L, wav2vec2 Base and the recipe of the training, in several forms
  (hardware/forms.py): time, rate, MFU, memory, compilation, and a profile of their kernels; the
  same models in PyTorch by transformers; numerics of the models against float32 on the CPU;
- the CTC kernel, in a process of its own: right or not, against float64; then its times against
  XLA, optax and torch (native and cuDNN);
- variants of attention and convolutions side by side;
- real training on the speech in --data (LibriSpeech/train-clean-5 and dev-clean-5) until the time
  ends: input wait, learning curve, WER, and the best model (training.tar.*).

Some compile while one is measured.

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

PARTS = ("device", "steps", "peers", "numerics", "ctc", "variants", "training", "timed")
# Seconds that a part may take at most; what it does not need goes to the training.
LIMITS = {
    "device": 45, "kernel": 150, "kernel again": 60, "times": 90, "steps": 330, "step": 150,
    "peers": 300, "variants": 60, "before": 130,
}  # fmt: skip
TRAINING = 0.6  # of the time is kept for the training, if there is other work
MARGIN = 2.0  # seconds before its limit at which a part should end by itself
TOGETHER = 5  # steps that are compiled at the same time
# Models and the forms that they are tried in (hardware/steps.py), the most telling first.
STEPS = (
    "conformer-l+fused+products",
    "conformer-l+fused",
    "wav2vec2-base+windows+fused",
    "conformer-l+lax+fused",
    "conformer-l+banded+fused@1280",
    "conformer-l+grouped",
    "recipe+fused",
    "wav2vec2-base",
    "conformer-l+fused+products@1280",
    "conformer-l+shifted+fused",
    "conformer-l+fused+unrolled",
)


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help="speech, as ../shared/device packs it")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("accelerator.md"))
    parser.add_argument("--parts", default=",".join(PARTS[:-1]), help="some of " + ",".join(PARTS))
    parser.add_argument("--steps", default=",".join(STEPS), help="what steps are measured")
    parser.add_argument("--forms", default="", help="of the training: +FORM+FORM (forms.py)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test on a CPU")
    flags = parser.parse_args()
    parts = flags.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not flags.data:
        parts = [part for part in parts if part not in ("training", "timed")]
    reserve = TRAINING * flags.seconds if "training" in parts else 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        run = _Run(flags, pathlib.Path(work), reserve)
        try:
            _run_parts(run, flags, parts)
        finally:
            run.end()


def _run_parts(run: "_Run", flags: argparse.Namespace, parts: list[str]) -> None:
    if "device" in parts:
        run.wait(run.start("device", "device", LIMITS["device"]))
    # The parts share the device's memory.
    some = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if "timed" in parts:  # compiles at once, and waits for what is measured before
        run.start("speech", "speech", 60, "--only=decode", JAX_PLATFORMS="cpu")
        wait = f"--only={LIMITS['before']}"
        run.start("timed", "timed", flags.seconds, f"--forms={flags.forms}", wait, **some)
    elif "training" in parts:
        run.start("speech", "speech", 60, JAX_PLATFORMS="cpu")
    if "peers" in parts:
        run.start("peers", "peers", LIMITS["peers"])
    if "numerics" in parts:
        run.start("reference", "numerics", 120, "--only=reference", JAX_PLATFORMS="cpu")
    if "ctc" in parts:
        run.start(
            "kernel own", "kernels", LIMITS["kernel"], "--only=own", "--forms=+rolled", **some
        )
    if "steps" in parts:
        _steps(run, flags.steps.split(","), some, LIMITS["before" if "timed" in parts else "steps"])
    if "ctc" in parts:
        _ctc(run, some)
    if "numerics" in parts:
        run.wait(run.start("numerics", "numerics", 60, **some))
    if "variants" in parts:
        run.wait(run.start("variants", "variants", LIMITS["variants"], **some))
    if "peers" in parts:
        run.wait("peers")
    if "timed" in parts:
        run.go()
        run.wait("timed")
    elif "training" in parts:
        run.reserve = 0.0
        forms = f"--forms={flags.forms}"
        run.wait(run.start("training", "training", flags.seconds, forms))
    _summary(run.table)


def _steps(run: "_Run", names: list[str], some: dict[str, str], seconds: float) -> None:
    """Measures steps, each in a process; some compile while one is measured."""
    until = time.monotonic() + seconds
    waiting, running = list(names), []
    while waiting or running:
        while waiting and len(running) < TOGETHER and time.monotonic() < until:
            name = waiting.pop(0)
            limit = min(LIMITS["step"], until - time.monotonic())
            running.append(run.start(name, "steps", limit, f"--only={name}", **some))
        running = [name for name in running if not run.ended(name)]
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    for name in running:
        run.wait(name)


def _ctc(run: "_Run", some: dict[str, str]) -> None:
    """Waits for the check of the kernel, and times what is right."""
    run.wait("kernel own")
    kernel = "pallas_tpu" if _platform(run.table) == "tpu" else "pallas_gpu"
    right = any(
        row.get("what") == "verdict, own barriers" and row["right"] for row in run.table.rows()
    )
    if not right:
        limit = LIMITS["kernel again"]
        run.wait(
            run.start("kernel auto", "kernels", limit, "--only=auto", "--forms=+rolled", **some)
        )
    first = ["xla", *([kernel] if right and _platform(run.table) != "cpu" else [])]
    run.wait(run.start("times", "losses", LIMITS["times"], f"--names={','.join(first)}", **some))
    if _platform(run.table) == "gpu":
        loops = "--xla_gpu_enable_command_buffer=+WHILE"
        run.wait(run.start("times of loops in graphs", "losses", 30, "--names=graphs",
                           XLA_FLAGS=loops, **some))  # fmt: skip


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

    def ended(self, name: str) -> bool:
        """Whether a part has ended; it is ended at its limit."""
        process, until = self._running[name]
        if process.poll() is None and time.monotonic() < until:
            return False
        self.wait(name)
        return True

    def go(self) -> None:
        """Tells the training that waits that the device is its own."""
        (self._work / "go").touch()

    def left(self) -> float:
        """Seconds left in all."""
        return self._end - time.monotonic()

    def end(self) -> None:
        """Ends what still runs, and keeps the curves of the training."""
        for process, _ in self._running.values():
            _kill(process)
        folder = self._flags.out.absolute().parent
        if (folder / "training.tar.00").exists():
            return
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
        for ours, found in rates["step"].items():
            if ours.replace("+", ",").replace("@", ",").partition(",")[0] == what.partition(",")[0]:
                table.add(f"{ours}: times the rate of {what}", ratio=found / rate)


if __name__ == "__main__":
    main()
