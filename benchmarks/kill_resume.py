"""Kills a training again and again, starts the same command again, and compares what comes out.

    python -m benchmarks.kill_resume --kills 20
    python -m benchmarks.kill_resume --kills 3 -- --config=configs/quickstart.py ...

SIGKILL at random moments, in turn while it updates, saves and evaluates. In the end the state
(parameters, optimizer, everything), the metrics and the scores must be those of a run that nobody
killed, bit for bit. What follows -- are flags of speech_jax.main, all but --workdir; they should
log every update.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp

from benchmarks.report import report

STAGES = ("training", "saving", "evaluating")
TIMED = ("audio_seconds_per_second", "mfu", "compiles")
STEPS = 200
FLAGS = (
    f"--config=configs/quickstart.py --config.train.steps={STEPS} --config.train.log_every=1 "
    "--config.train.eval_every=9 --config.checkpoint.every=5 --config.data.test_splits= "
    "--config.model.width=32 --config.model.num_layers=1 --config.schedule.warmup=20 "
    "--config.data.buckets=1 --config.data.eval_buckets=1 --config.data.batch_seconds=16"
).split()


def main():
    """Prints one row: the kills, and whether the two runs are identical."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("flags", nargs="*", help="of speech_jax.main, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        found = compare(args.flags or FLAGS, folder, args.kills, args.seed, dict(os.environ))
    differences = found.pop("differences")
    report([found | {"identical": not differences}], file=args.json)
    if differences:
        sys.exit("error: not as if never killed: " + "; ".join(differences))


def compare(flags, folder: pathlib.Path, kills: int, seed: int, env: dict) -> dict:
    """Runs the command twice in folder, killing one of the runs.

    Returns 'kills', how many of them in each of STAGES, and 'differences': what is not the same.
    """
    # The programs are those of the first start: what a restart compiles is not the point.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    rng = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    env = cache | env
    _finish(_start(flags, whole, env))
    counts = dict.fromkeys(STAGES, 0)
    for number in range(kills):
        stage = _kill(_start(flags, killed, env), killed, STAGES[number % 3], rng)
        counts[stage] += 1
    _finish(_start(flags, killed, env))
    return {"kills": sum(counts.values()), **counts, "differences": _differences(whole, killed)}


def _start(flags, workdir, env):
    command = [sys.executable, "-m", "speech_jax.main", *flags, f"--workdir={workdir}"]
    root = pathlib.Path(__file__).parent.parent
    with open(f"{workdir}.log", "w") as log:
        return subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)


def _finish(process):
    if process.wait():
        log = pathlib.Path(f"{process.args[-1].partition('=')[2]}.log")
        raise RuntimeError(f"the training failed: {log.read_text()[-3000:]}")


def _kill(process, workdir, wanted: str, rng) -> str:
    """Kills a process some updates after its first one, in a wanted stage; returns the stage."""
    start = _last(workdir)
    ahead = rng.randint(2, 6)
    while not (_last(workdir) >= start + ahead and wanted in _stages(workdir)):
        if process.poll() is not None:
            log = pathlib.Path(f"{workdir}.log").read_text()
            raise RuntimeError(f"it ended before it could be killed: {log[-3000:]}")
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return _stages(workdir)[-1]


def _stages(workdir) -> list[str]:
    """What the run does now: it always trains, saves behind that, and stops to evaluate."""
    found, folder = ["training"], workdir / "checkpoints"
    if any(ocp.utils.TMP_DIR_SUFFIX in path.name for path in folder.iterdir()):
        found.append("saving")
    lines = _lines(workdir)
    every = json.loads((workdir / "config.json").read_text())["train"]["eval_every"]
    # An evaluation's own line comes when it is done.
    if lines and lines[-1]["step"] % every == 0 and "learning_rate" in lines[-1]:
        found.append("evaluating")
    return found


def _last(workdir) -> int:
    lines = _lines(workdir)
    return lines[-1]["step"] if lines else 0


def _lines(workdir) -> list[dict]:
    """metrics.jsonl, without a line that is being written, and without what the clock says."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def _differences(whole, killed) -> list[str]:
    found = []
    if _lines(whole) != _lines(killed):
        found.append("metrics.jsonl")
    results = [json.loads((run / "results.json").read_text())["splits"] for run in (whole, killed)]
    if results[0] != results[1]:
        found.append("results.json")
    one, other = _state(whole), _state(killed)
    if one.keys() != other.keys():
        return [*found, f"leaves of the state: {one.keys() ^ other.keys()}"]
    return found + [name for name in one if one[name].tobytes() != other[name].tobytes()]


def _state(workdir) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, and its step."""
    folder = workdir / "checkpoints"
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    path, handler = folder / str(step) / "state", ocp.PyTreeCheckpointHandler()
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in handler.metadata(path)}
    arrays = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {"step": np.asarray(step), **arrays}


if __name__ == "__main__":
    main()
