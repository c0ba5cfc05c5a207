"""What benchmarks/accelerator.py runs, a process for each part: see there.

Every part appends what it measures to one table at once, so that a part that hangs or is killed
loses nothing but itself. A part that measures times holds the device for itself while it does
(`alone`); others may compile in the meantime.
"""

import argparse
import contextlib
import fcntl
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from statistics import median
from typing import IO

PATIENCE = 25.0  # seconds that a measurement waits for the compilations of others


class Table:
    """An append-only table: a Markdown row and a line of JSON for each measurement."""

    def __init__(self, file: pathlib.Path, part: str):
        self._file, self._part = file, part

    def start(self, title: str) -> None:
        """Begins the file."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(f"# {title}\n\n| part | what | figures | at s |\n|---|---|---|---|\n")
        self._json.write_text(json.dumps({"part": "start", "time": time.time()}) + "\n")

    def add(self, what: str, **figures: object) -> None:
        """Appends a measurement, and prints it."""
        line = {"part": self._part, "what": what, **figures}
        rows = self.rows()
        at = time.time() - rows[0].get("time", time.time()) if rows else 0.0
        cells = ", ".join(f"{name} {_text(value)}" for name, value in figures.items())
        with self._json.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        with self._file.open("a") as file:
            file.write(f"| {self._part} | {what} | {cells} | {at:.0f} |\n")
        print(f"[{at:4.0f} s] {self._part}: {what}: {cells}", flush=True)

    def fail(self, what: str, error: BaseException | str) -> None:
        """Appends why something could not be measured."""
        if isinstance(error, BaseException):
            traceback.print_exception(error, file=sys.stderr)
            error = f"{type(error).__name__}: {error}"
        text = " ".join(str(error).split()).replace("|", "/")
        self.add(what, error=text if len(text) < 700 else f"{text[:400]} ... {text[-300:]}")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Around a measurement that must not end the part when it fails."""
        try:
            yield
        except Exception as error:
            self.fail(what, error)

    def rows(self) -> list[dict]:
        """What is in the table so far, the start first."""
        if not self._json.exists():
            return []
        whole = self._json.read_text().rpartition("\n")[0]  # another part may be writing
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def _json(self) -> pathlib.Path:
        return self._file.with_suffix(".jsonl")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_part(part: str, run: Callable[[Table, argparse.Namespace], None]) -> None:
    """The main function of a part: reads its flags and runs it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--forms", default="", help="+FORM+FORM, as in forms.py")
    parser.add_argument("--only", default="")
    parser.add_argument("--names", default="xla")
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    flags.end = time.monotonic() + flags.seconds
    table = Table(flags.out, part)
    with table.attempt(f"the part{flags.only and ': '}{flags.only}"):
        run(table, flags)


@contextlib.contextmanager
def compiling(work: pathlib.Path) -> Iterator[None]:
    """Around a compilation, which tries kernels on the device: nobody measures meanwhile."""
    with (work / "compiling.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def hold(work: pathlib.Path) -> None:
    """`alone`, until this process ends."""
    _wait_for_compilers(work)
    file = (work / "device.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    _held.append(file)


_held: list[IO] = []


@contextlib.contextmanager
def alone(work: pathlib.Path) -> Iterator[None]:
    """Holds the device: no other part measures at the same time."""
    _wait_for_compilers(work)
    with (work / "device.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for_compilers(work: pathlib.Path) -> None:
    """Until nobody compiles, or for as long as one who waits may lose by it."""
    until = time.monotonic() + PATIENCE
    with (work / "compiling.lock").open("w") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            else:
                return


def median_seconds(call: Callable[[], object], repeats: int, warmup: int = 2) -> float:
    """The median time of a call, which blocks until its result is there."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def left(flags: argparse.Namespace) -> float:
    """Seconds that the part still has."""
    return flags.end - time.monotonic()
