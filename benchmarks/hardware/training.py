"""Training on real speech by speech_jax.main until the time ends: input wait, learning curve, WER.

The updates are as many as should fit, by the rates that steps.py (the step of recipe.py) and
speech.py (the loader) have put into the table: then the schedule ends about when the time does. A
run that is ended at nine tenths of a cosine has lost little.
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
from benchmarks.hardware.shapes import BATCH_SECONDS

EVALUATIONS = 8
GUESS = 5_000.0  # audio seconds a second, where nothing was measured
START = 40.0  # seconds from the command to the first update
END = 16.0  # seconds that the end of the run takes: the best checkpoint, scored
EVALUATION = 2.0  # seconds of each


def run(table: Table, flags: argparse.Namespace) -> None:
    """Waits for speech.py, then trains."""
    folder = flags.work / "speech"
    until = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < until:
        time.sleep(0.5)
    root = folder if (folder / "ready").exists() else flags.data / "LibriSpeech"
    evaluations = 2 if flags.tiny else EVALUATIONS
    rate = expected_rate(table.rows())
    updates = rate * max(left(flags) - START - END - EVALUATION * evaluations, 1.0)
    every = 6 if flags.tiny else max(int(updates) // evaluations, 1)
    steps = every * evaluations
    table.add("plan", updates=steps, updates_per_s=rate, evaluate_every=every)
    workdir = flags.work / "run"
    process, waits = _start(
        flags, root, workdir,
        f"--config.train.steps={steps}", f"--config.train.eval_every={every}",
        f"--config.train.log_every={max(every // 4, 1)}",
    )  # fmt: skip
    began = time.monotonic()
    try:
        _follow(table, flags, process, workdir)
    finally:
        _end(process)
    with table.attempt("input wait"):
        found = _waits(waits)
        start = found.pop("clock", began) - began
        table.add("input wait", first_updates_s=start, **found)
    with table.attempt("result"):
        if not (workdir / "results.json").exists():
            return
        result = json.loads((workdir / "results.json").read_text())
        for split, scores in result["splits"].items():
            table.add(f"result, {split}", **scores)
        table.add("result, training", **result["training"])
        lines = (workdir / "predictions" / "dev-clean-5.jsonl").read_text().splitlines()
        for line in lines[:: max(len(lines) // 8, 1)][:8]:
            shown = json.loads(line)
            table.add("heard", **{k: shown[k] for k in ("reference", "hypothesis") if k in shown})


def expected_rate(rows: list[dict]) -> float:
    """Updates a second, from what was measured before."""
    rates = {row["what"]: row["audio_s_per_s"] for row in rows if "audio_s_per_s" in row}
    found = [
        max((rate for what, rate in rates.items() if what.startswith(start)), default=None)
        for start in ("recipe", "loader, WAV, speeds (0.9")
    ]
    known = [0.85 * rate for rate in found if rate]
    return (min(known) if known else GUESS) / (0.92 * BATCH_SECONDS)  # 8% of a batch is padding


def _start(flags: argparse.Namespace, root, workdir: pathlib.Path, *arguments: str):
    recipe = "tiny_recipe" if flags.tiny else "recipe"
    waits = workdir.with_suffix(".waits")
    log = workdir.with_suffix(".log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks.hardware.watched", flags.forms, str(waits),
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


def _waits(waits: pathlib.Path) -> dict[str, float]:
    """What part of the time was spent waiting for input: median and mean of windows of updates.

    `clock` is when the first window ended.
    """
    every = _lines(waits)
    lines = every[2:]
    parts = [
        (b["waited"] - a["waited"]) / (b["clock"] - a["clock"])
        for a, b in itertools.pairwise(lines)
    ]
    if not parts:
        return {}
    median, mean = sorted(parts)[len(parts) // 2], sum(parts) / len(parts)
    return {"clock": every[1]["clock"], "wait_median": median, "wait_mean": mean}


if __name__ == "__main__":
    run_part("training", run)
