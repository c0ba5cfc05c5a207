"""Training on real speech by speech_jax.main until the time ends: input wait, learning curve, WER.

A first run of a few updates finds how many updates a second there are; the second has as many as
fit, so that its schedule ends when the time does. recipe.py holds the settings.
"""

import argparse
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from benchmarks.hardware import Table, left, run_part

PROBE = 60  # updates of the first run
EVALUATIONS = 6
END = 16.0  # seconds that the end of the run takes: the best checkpoint, scored


def run(table: Table, flags: argparse.Namespace) -> None:
    """The two runs."""
    folder = flags.work / "speech"
    until = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < until:
        time.sleep(0.5)
    root = folder if (folder / "ready").exists() else flags.data / "LibriSpeech"
    probe = 12 if flags.tiny else PROBE
    rate, start = _probe(table, flags, root, probe)
    spare = 8.0 if flags.tiny else END + 2.0 * EVALUATIONS
    steps = int(0.93 * rate * (left(flags) - start - spare))
    if flags.tiny:
        steps = min(max(steps, 4), 12)
    evaluations = 2 if flags.tiny else EVALUATIONS
    every = max(steps // evaluations, 1)
    steps = every * evaluations
    log = max(every // 5, 1)
    table.add("plan", updates=steps, updates_per_s=rate, first_update_s=start)
    workdir = flags.work / "run"
    process, waits = _start(
        flags, root, workdir,
        f"--config.train.steps={steps}", f"--config.train.eval_every={every}",
        f"--config.train.log_every={log}",
    )  # fmt: skip
    try:
        _follow(table, flags, process, workdir)
    finally:
        _end(process)
    with table.attempt("input wait"):
        table.add("input wait", **_waits(waits))
    with table.attempt("result"):
        result = json.loads((workdir / "results.json").read_text())
        for split, scores in result["splits"].items():
            table.add(f"result, {split}", **scores)
        table.add("result, training", **result["training"])
        lines = (workdir / "predictions" / "dev-clean-5.jsonl").read_text().splitlines()
        for line in lines[:: max(len(lines) // 8, 1)][:8]:
            shown = json.loads(line)
            table.add("heard", **{k: shown[k] for k in ("reference", "hypothesis") if k in shown})


def _probe(table: Table, flags: argparse.Namespace, root, updates: int) -> tuple[float, float]:
    """(updates a second, seconds from the command to the first update)."""
    began = time.monotonic()
    process, waits = _start(
        flags, root, flags.work / "probe",
        "--config.train.steps=1000000", "--config.train.log_every=10",
        "--config.train.eval_every=1000000",
    )  # fmt: skip
    try:
        while process.poll() is None and _count(waits) <= updates and left(flags) > 5:
            time.sleep(0.1)
    finally:
        ended = process.poll()
        _end(process)
    if ended is not None:
        log = (flags.work / "probe.log").read_text()[-600:]
        raise RuntimeError(f"the first run ended by itself with {ended}: {log}")
    lines = _lines(waits)
    settled = lines[len(lines) // 2 :]
    first, last = settled[0], settled[-1]
    rate = (last["count"] - first["count"]) / (last["clock"] - first["clock"])
    # Batches are loaded ahead: the second line is written when most of the first were updates.
    start = lines[1]["clock"] - began
    table.add("probe", updates_per_s=rate, first_updates_s=start, **_waits(waits))
    return rate, start


def _start(flags: argparse.Namespace, root, workdir: pathlib.Path, *arguments: str):
    recipe = "tiny_recipe" if flags.tiny else "recipe"
    waits = workdir.with_suffix(".waits")
    log = workdir.with_suffix(".log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks.hardware.watched", flags.ctc, str(waits),
            f"--config=benchmarks/hardware/{recipe}.py", f"--workdir={workdir}",
            f"--config.data.root={root}", f"--config.data.cache={flags.work / 'cache'}",
            *arguments,
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    return process, waits


def _follow(table: Table, flags, process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Copies what is new in metrics.jsonl into the table until the run or the time ends."""
    seen = 0
    while True:
        running = process.poll() is None
        file = workdir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        for line in lines[seen:]:
            point = json.loads(line)
            kept = ("loss", "cer", "wer", "grad_norm", "audio_seconds_per_second", "mfu", "skipped")
            chosen = {
                k: v for k, v in point.items() if any(k.split("/")[-1].startswith(n) for n in kept)
            }
            table.add(f"update {point['step']}", **chosen)
        seen = len(lines)
        if not running:
            break
        if left(flags) < 2:
            table.fail("the run", "was stopped before its end")
            break
        time.sleep(0.5)
    if process.poll():
        log = workdir.with_suffix(".log").read_text()[-600:]
        table.fail("the run", f"ended with {process.returncode}: {log}")


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(waits: pathlib.Path) -> list[dict]:
    if not waits.exists():
        return []
    whole = waits.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _count(waits: pathlib.Path) -> int:
    lines = _lines(waits)
    return lines[-1]["count"] if lines else 0


def _waits(waits: pathlib.Path) -> dict[str, float]:
    """The part of the time that was spent waiting for input: the median and the mean of windows."""
    lines = _lines(waits)[2:]
    parts = [
        (b["waited"] - a["waited"]) / (b["clock"] - a["clock"])
        for a, b in itertools.pairwise(lines)
    ]
    if not parts:
        return {}
    return {"wait_median": sorted(parts)[len(parts) // 2], "wait_mean": sum(parts) / len(parts)}


if __name__ == "__main__":
    run_part("training", run)
