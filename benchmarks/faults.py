"""Disturbs a small training by a random fault at a random moment, and looks how it ends.

    python -m benchmarks.faults --runs 200 --seed 0

Each run is one of a recipe of seconds on tones, in a folder of its own. It must end within a minute
of the fault (or go on to its end), with one line where it cannot go on; when the fault is lifted,
the same command must end with the state of the run that nobody disturbed, bit for bit.

What costs most of such a run, importing, is done once: each is forked from this process and then
executes speech_jax.main as `python -m` does. As root, the runs give up the right to write what is
read-only, and the workdirs are on a small file system of their own (tmpfs) that can be full;
else a limit on the size of files stands for that. The clock jumps for Python's time.time alone, in
the disturbed process: the machine's clock is left as it is.
"""

import argparse
import atexit
import contextlib
import ctypes
import importlib
import json
import mmap
import os
import pathlib
import random
import resource
import runpy
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import soundfile

LIMIT = 60.0  # seconds in which a disturbed run must end
RECIPE = """
from speech_jax import config as defaults
from speech_jax import models

def get_config():
    config = defaults.default()
    config.data.source = "manifest"
    config.data.root = {root!r}
    config.data.cache = {cache!r}
    config.data.train_splits, config.data.eval_splits = "train", "dev"
    config.data.test_splits = "dev"
    config.data.batch_seconds, config.data.max_seconds = 8.0, 2.0
    config.data.buckets = config.data.eval_buckets = 1
    config.features.mels, config.features.normalize = 16, "global"
    config.spec_augment.update({{"time_masks": 0, "frequency_masks": 0}})  # quicker to trace
    config.model = models.settings("conformer", "tiny", width=16, num_layers=1, heads=2, kernel=5,
                                   subsampling_channels=4, dropout=0.0)
    config.schedule = {{"name": "constant", "peak": 1e-2, "warmup": 5}}
    config.train.update({{"steps": 24, "eval_every": 12, "log_every": 2}})
    config.checkpoint.every = 6
    return config
"""


class Room(NamedTuple):
    """Where runs are made, and what they share."""

    folder: pathlib.Path
    small: bool  # whether `disk` is a file system of its own
    clock: mmap.mmap  # by how many seconds time.time is wrong

    @property
    def disk(self) -> pathlib.Path:
        return self.folder / "disk"

    @property
    def workdir(self) -> pathlib.Path:
        return self.disk / "work"

    @property
    def log(self) -> pathlib.Path:
        return self.folder / "log"


class Outcome(NamedTuple):
    """How a process ended."""

    seconds: float
    status: int | None  # as of subprocess; None: it had to be killed
    said: str


# ---- Faults: each is done to the process, and returns what lifts it ------------------------------

Lift = Callable[[], object]


def _signal(number: signal.Signals, times: int = 1) -> Callable:
    def fault(room: Room, pid: int, rng: random.Random) -> Lift:
        del room
        for _ in range(times):
            os.kill(pid, number)
            if times > 1:
                time.sleep(rng.uniform(0.01, 0.5))
                if _ended(pid):
                    break
        return lambda: None

    return fault


def _full_disk(room: Room, pid: int, rng: random.Random) -> Lift:
    if not room.small:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (rng.choice([0, 500, 20_000]),) * 2)
        return lambda: None
    ballast = room.disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
        if rng.random() < 0.5:  # some pages are left
            file.truncate(max(0, file.tell() - rng.randrange(200_000)))
    return ballast.unlink


def _read_only(room: Room, pid: int, rng: random.Random) -> Lift:
    del pid, rng
    paths = [path for path in (room.workdir, *room.workdir.rglob("*")) if path.exists()]
    rights = {path: path.stat().st_mode for path in paths}
    for path, mode in rights.items():
        _chmod(path, mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    return lambda: [_chmod(path, mode) for path, mode in rights.items()]


def _chmod(path: pathlib.Path, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.chmod(mode)


def _damage(remove: bool) -> Callable:
    def fault(room: Room, pid: int, rng: random.Random) -> Lift:
        if rng.random() < 0.5:
            os.kill(pid, signal.SIGKILL)
            while not _ended(pid):
                time.sleep(0.01)
        for _ in range(100):  # what is listed may be gone
            try:
                found = sorted(path for path in room.workdir.rglob("*") if path.is_file())
                if not found:
                    return lambda: None
                path = rng.choice(found)
                before = path.read_bytes()
                if remove:
                    path.unlink()
                else:
                    os.truncate(path, rng.randrange(len(before) + 1))
            except FileNotFoundError:
                continue
            break

        def lift() -> str:
            """Only what the restart asked for by its name is brought back."""
            if path.parent.exists():
                path.write_bytes(before)
                path.chmod(0o666)
            return str(path)

        return lift

    return fault


def _clock(room: Room, pid: int, rng: random.Random) -> Lift:
    del pid
    jump = rng.choice([-1, 1]) * 10 ** rng.uniform(1, 8)
    room.clock[:8] = struct.pack("d", jump)
    return lambda: room.clock.__setitem__(slice(0, 8), bytes(8))


FAULTS: dict[str, Callable] = {
    "killed": _signal(signal.SIGKILL),
    "SIGTERM": _signal(signal.SIGTERM),
    "Ctrl-C": _signal(signal.SIGINT),
    "Ctrl-C twice": _signal(signal.SIGINT, 2),
    "full disk": _full_disk,
    "read-only folder": _read_only,
    "truncated file": _damage(remove=False),
    "removed file": _damage(remove=True),
    "clock jump": _clock,
}
_MAY_BE_BROUGHT_BACK = ("truncated file", "removed file")
_ENDED: dict[int, int] = {}


def _ended(pid: int) -> bool:
    """Whether a child has ended; its status is then in _ENDED."""
    if pid not in _ENDED:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _ENDED[pid] = os.waitstatus_to_exitcode(status)
    return pid in _ENDED


# ---- A run ---------------------------------------------------------------------------------------


def _start(room: Room, action: Callable[[], None]) -> int:
    """Runs `action` in a process of its own, its output in the room's log; returns the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(room.log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if os.getuid() == 0:
            _heed_rights()
        now = time.time
        time.time = lambda: now() + struct.unpack("d", room.clock[:8])[0]
        action()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else error.code is not None
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    # As an interpreter ends, without what this process's own `with` would do at its end.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


def _heed_rights() -> None:
    """Gives up what lets root write everywhere: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[0] &= ~0b110  # of those in force
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _train(room: Room) -> int:
    def action() -> None:
        from speech_jax.training import saved

        sys.argv = ["main", f"--config={room.folder / 'recipe.py'}", f"--workdir={room.workdir}"]
        try:
            runpy.run_module("speech_jax.main", run_name="__main__", alter_sys=True)
        except SystemExit as error:
            if error.code or not (room.workdir / "results.json").exists():
                raise
        try:
            _print_digest(room)
        except saved.Damaged as error:  # the file was taken after the run had ended
            sys.exit(f"error: the newest checkpoint: {error}")

    return _start(room, action)


def _wait(room: Room, pid: int, limit: float) -> Outcome:
    start = time.monotonic()
    while not _ended(pid) and time.monotonic() - start < limit:
        time.sleep(0.01)
    seconds = time.monotonic() - start
    late = not _ended(pid)
    if late:
        os.kill(pid, signal.SIGKILL)
        while not _ended(pid):
            time.sleep(0.01)
    said = room.log.read_text(errors="replace")
    return Outcome(seconds, None if late else _ENDED[pid], said)


def _digest(said: str) -> str:
    """What a run that came to its end has said of its state."""
    return next((line for line in said.splitlines() if line.startswith("digest ")), "")


def _print_digest(room: Room) -> None:
    """Of the newest checkpoint, all of the state; in the process of the run, which uses JAX."""
    from benchmarks import digest
    from speech_jax.training import saved

    folder = saved.epath.Path(room.workdir / "checkpoints")
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    names = ("params", "model_state", "opt_state", "step")
    print(f"digest {step} {digest.of(saved.load(folder / str(step), names))}", flush=True)


def _await_moment(room: Room, pid: int, whole: int, rng: random.Random) -> str:
    """Waits for a random one of the `whole` lines that a run says, and a little more.

    By what it says, not by a clock, so that moments are spread however busy the machine is.
    """
    lines, more = rng.randrange(whole + 1), rng.expovariate(2)
    while not _ended(pid) and room.log.read_bytes().count(b"\n") < lines:
        time.sleep(0.005)
    end = time.monotonic() + more
    while not _ended(pid) and time.monotonic() < end:
        time.sleep(0.005)
    return f"{lines} lines and {more:.2f} s"


def disturb(room: Room, name: str, whole: int, rng: random.Random) -> dict:
    """One run; what came out, with 'problem' where it is not as it must be."""
    shutil.rmtree(room.workdir, ignore_errors=True)
    room.log.write_text("")
    pid = _train(room)
    after = _await_moment(room, pid, whole, rng)
    over = _ended(pid)
    fault = FAULTS[name]
    if over and name not in _MAY_BE_BROUGHT_BACK:
        lift: Lift = lambda: None
    else:
        try:
            lift = fault(room, pid, rng)
        except ProcessLookupError:
            lift = lambda: None
    first = _wait(room, pid, LIMIT)
    problem = _judge(first, name)
    moved = None if name in _MAY_BE_BROUGHT_BACK else lift()
    again = _wait(room, _train(room), 2 * LIMIT)
    if again.status and name in _MAY_BE_BROUGHT_BACK and "Traceback" not in again.said:
        problem = problem or _judge(again, name)
        moved = lift()
        again = _wait(room, _train(room), 2 * LIMIT)
    if again.status != 0:
        problem = problem or f"the same command did not go on: {again.said[-600:]}"
    return {
        "fault": name,
        "after": after,
        "over": over,
        "seconds": first.seconds,
        "in time": first.status is not None,
        "one line": not problem,
        "digest": _digest(again.said),
        "problem": problem,
        "said": first.said[-1500:],
        "moved": moved,
    }


def _judge(one: Outcome, name: str) -> str:
    """What is wrong with the end of a disturbed run; empty if nothing is."""
    if one.status is None:
        return "it did not end"
    if "Traceback" in one.said:
        return f"a traceback: {one.said[-1500:]}"
    lines = one.said.strip().splitlines()
    told = {"killed": -9, "SIGTERM": -15, "Ctrl-C": 130, "Ctrl-C twice": 130}
    told = {-9} if name in _MAY_BE_BROUGHT_BACK else {told.get(name, 0)}
    if one.status == 0 or one.status in told:
        return ""
    if one.status != 1 or not lines or not lines[-1].startswith("error: "):
        return f"status {one.status} without a line that says why: {one.said[-600:]}"
    return ""


# ---- All of them ---------------------------------------------------------------------------------


def _tones(folder: pathlib.Path, split: str, count: int, rng: np.random.Generator) -> None:
    rows, words, rate = [], {"A": 300.0, "B": 900.0, "C": 2700.0}, 16_000
    moments = np.arange(round(0.3 * rate)) / rate
    for number in range(count):
        text = rng.choice(list(words), size=rng.integers(1, 5))
        pieces = [np.sin(2 * np.pi * words[one] * moments) for one in text]
        audio = 0.3 * np.concatenate(pieces) + 0.01 * rng.standard_normal(len(moments) * len(text))
        path = folder / f"{split}-{number}.flac"
        soundfile.write(path, audio, rate)
        row = {"audio_filepath": path.name, "duration": len(audio) / rate, "text": " ".join(text)}
        rows.append(json.dumps(row) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(rows))


def _furnish(folder: pathlib.Path) -> Room:
    small = os.getuid() == 0
    room = Room(folder, small, mmap.mmap(-1, 8))
    for name in ("data", "cache", "compiled", "disk"):
        (folder / name).mkdir()
    if small:
        command = ["mount", "-t", "tmpfs", "-o", "size=32m,mode=777", "none", str(room.disk)]
        small = subprocess.run(command, check=False).returncode == 0
        room = room._replace(small=small)
    rng = np.random.default_rng(0)
    _tones(folder / "data", "train", 48, rng)
    _tones(folder / "data", "dev", 6, rng)
    recipe = RECIPE.format(root=str(folder / "data"), cache=str(folder / "cache"))
    (folder / "recipe.py").write_text(recipe)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o777)
    room.log.touch()
    room.log.chmod(0o666)
    return room


def _table(found: list[dict], right: str) -> list[dict]:
    rows = []
    for name in (*FAULTS, "all"):
        some = [one for one in found if name in (one["fault"], "all")]
        if some:
            rows.append(
                {
                    "fault": name,
                    "runs": len(some),
                    "over before": sum(one["over"] for one in some),
                    "ended in time": sum(one["in time"] for one in some),
                    "one line": sum(one["one line"] for one in some),
                    "same state": sum(one["digest"] == right for one in some),
                    "worst s": max(one["seconds"] for one in some),
                }
            )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one fault, by its name in the table")
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults."))
    os.environ |= {
        "HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    # Imported once for all, and only now that JAX finds its settings; no device is used here.
    for name in ("benchmarks.digest", "speech_jax.train"):
        importlib.import_module(name)
    from benchmarks.table import report

    room = _furnish(folder)
    try:
        for _ in range(2):  # the second one finds all that it needs compiled
            shutil.rmtree(room.workdir, ignore_errors=True)
            whole = _wait(room, _train(room), 300)
            if whole.status:
                sys.exit(f"error: the undisturbed run failed: {whole.said[-2000:]}")
        right = _digest(whole.said)
        lines = whole.said.count("\n") - 1  # the last one is that of the digest
        print(f"undisturbed: {whole.seconds:.1f} s, {right}", file=sys.stderr, flush=True)
        found = []
        names = [args.only] if args.only else list(FAULTS)
        for number in range(args.first, args.first + args.runs):
            rng = random.Random(f"{args.seed} {number}")
            one = disturb(room, names[number % len(names)], lines, rng)
            one["number"] = number
            if one["digest"] != right and not one["problem"]:
                one["problem"] = f"another state: {one['digest']}"
            found.append(one)
            print(
                f"run {number}, {one['fault']} after {one['after']}, ended "
                f"{one['seconds']:.1f} s later: {one['problem'] or 'fine'}",
                file=sys.stderr,
                flush=True,
            )
    finally:
        if room.small:
            subprocess.run(["umount", "-l", str(room.disk)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    rows = _table(found, right)
    report(rows, file=args.json, device=f"CPU, {os.cpu_count()} cores")
    if any(one["problem"] for one in found):
        sys.exit("error: not all runs ended as they must")


if __name__ == "__main__":
    main()
