"""What a person sees of a run, and what is written of it: console, metrics.jsonl, TensorBoard."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speech_jax import files
from speech_jax.errors import UserError

if TYPE_CHECKING:
    from speech_jax.training.tensorboard import Events


class ReportError(UserError):
    """The metrics cannot be written; the message names the file and the cure."""


class Report:
    """Takes each step's sums, and reads them only after the next step was dispatched.

    So the host never waits for the device while there is work to hand it. A context manager: the
    bar is shown inside it. What it finds is kept for the loop, which says when a run ends:
    `skipped` counts the updates that were not finite, since the run's first start; `figures` are
    the task's at the last logged step, `logged`.
    """

    def __init__(
        self,
        metrics: pathlib.Path,
        tensorboard: pathlib.Path,
        *,
        steps: int,
        first: int,
        log_every: int,
        sample_rate: int,
        peak_flops: float,
        learning_rate: Callable[[int], Any],
        figures: Callable[[Mapping[str, float]], dict[str, float]],
        name: Callable[[int], str],
        unreadable: Callable[[], int],
    ):
        """`first` updates are done of `steps`; what the files hold of later ones is dropped.

        `peak_flops` is of all devices together, `learning_rate` of an update's number, `figures`
        the task's of the sums, `name` that of the utterance at an index of the source, and
        `unreadable` counts those that could not be read.
        """
        self._steps, self._first, self._log_every = steps, first, log_every
        self._sample_rate, self._peak_flops = sample_rate, peak_flops
        self._learning_rate, self._figures = learning_rate, figures
        self._name, self._unreadable = name, unreadable
        self._paths = metrics, tensorboard
        self._writer: Writer | None = None
        main = jax.process_index() == 0
        self._console = _Console(stderr=True, quiet=not main, highlight=False)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._line = self._bar.add_task("", total=steps, completed=first, figures="")
        self._pending: tuple | None = None
        self._window, self._total = _Work(), _Work()
        self._since: float | None = None
        self._score = ""
        self._compiles = 0
        self.skipped = 0
        self.figures: dict[str, float] = {}
        self.logged = first

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._writer = Writer(*self._paths, self._first)
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._count_compilations)
        self._bar.start()
        self._start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count_compilations)
        self._bar.stop()
        if self._writer:
            with contextlib.suppress(*([ReportError] if error else [])):  # the first one is raised
                self._writer.close()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, soft_wrap=True, markup=False)

    def step(
        self, step: int, sums: Mapping[str, jax.Array], finite: jax.Array, index: Sequence[int],
        flops: float,
    ) -> None:  # fmt: skip
        """Takes what update `step` returned (still being computed), and reads the one before.

        `index` are this process's utterances of the batch (-1: none), `flops` the arithmetic of the
        whole batch. Raises ReportError where the metrics cannot be written.
        """
        previous, self._pending = self._pending, (step, sums, finite, index, flops)
        if previous:
            self._read(*previous)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: the step before is read first, and no time is counted."""
        self._flush()
        self._stop()
        yield
        self._start()

    def scores(
        self, step: int, scores: Mapping[str, Mapping[str, float]], shown: Mapping[str, str]
    ) -> None:
        """Writes an evaluation's scores of each split; `shown` is what a person sees of them."""
        for split, line in shown.items():
            self.say(f"step {step}  {split}: {line}")
        values = {f"{split}/{k}": x for split, found in scores.items() for k, x in found.items()}
        self._write(step, values)
        first = next(iter(shown))
        self._score = f"  {first}: {shown[first]}"

    def finish(self) -> dict[str, float]:
        """Reads the last step; returns the run's figures for results.json."""
        self._flush()
        self._stop()
        self._total.add(self._window)
        self._window = _Work()
        return {
            "audio_seconds_per_second": self._total.rate(self._total.audio_seconds),
            "mfu": self._total.rate(self._total.flops) / self._peak_flops,
            "skipped_updates": self.skipped,
            "compiles": self._compiles,
        }

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint must hold for the figures to be of the whole run, not of a process.

        To be asked inside `pause`.
        """
        return {
            "skipped": self.skipped,
            "compiles": self._compiles,
            "total": dataclasses.asdict(self._total),
            "window": dataclasses.asdict(self._window),
        }

    def from_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes what `to_dict` returned; nothing of a checkpoint that was saved before it was."""
        self.skipped = saved.get("skipped", 0)
        self._compiles = saved.get("compiles", 0)
        self._total, self._window = (_Work(**saved.get(name, {})) for name in ("total", "window"))

    def _start(self) -> None:
        self._since = time.monotonic()

    def _stop(self) -> None:
        if self._since is not None:
            self._window.seconds += time.monotonic() - self._since
        self._since = None

    def _flush(self) -> None:
        if self._pending:
            self._read(*self._pending)
            self._pending = None
        if self._writer:
            self._writer.flush()

    def _read(
        self, step: int, sums: Mapping[str, jax.Array], finite: jax.Array, index: Sequence[int],
        flops: float,
    ) -> None:  # fmt: skip
        self._window.flops += flops
        self._window.steps += 1
        self._bar.update(self._line, completed=step)
        if not bool(finite):
            self.skipped += 1
            names = [self._name(int(place)) for place in index if place >= 0]
            self.say(f"step {step}: not finite, skipped; its utterances: {' '.join(names)}")
        if step % self._log_every == 0 or step == self._steps:
            self._log(step, {name: float(value) for name, value in jax.device_get(sums).items()})

    def _log(self, step: int, sums: Mapping[str, float]) -> None:
        # After a restart from before there were totals, the sums may reach back further than these.
        done = max(sums["steps"] + sums["skipped"], 1.0)
        window = self._window
        window.audio_seconds = sums["samples"] / self._sample_rate * window.steps / done
        self._stop()
        updates = max(sums["steps"], 1.0)
        self.figures, self.logged = self._figures(sums), step
        values = self.figures | {
            "grad_norm": sums["grad_norm"] / updates,
            "learning_rate": float(self._learning_rate(step - 1)),
            "padding_fraction": 1 - sums["samples"] / max(sums["padded_samples"], 1.0),
            "skipped_updates": sums["skipped"],
            "unreadable": self._unreadable(),
            "audio_seconds_per_second": window.rate(window.audio_seconds),
            "mfu": window.rate(window.flops) / self._peak_flops,
            "compiles": self._compiles,
        }
        self._total.add(window)
        self._window = _Work()
        loss = next(iter(self.figures.values()))
        accuracy = self.figures.get("accuracy")
        progress = f"loss {loss:.3f}" + ("" if accuracy is None else f"  accuracy {accuracy:.3f}")
        self._show(step, progress, values)
        self._write(step, values)
        self._start()

    def _show(self, step: int, progress: str, values: Mapping[str, float]) -> None:
        figures = (
            f"{progress}  grad {values['grad_norm']:.2f}  "
            f"lr {values['learning_rate']:.1e}  {values['audio_seconds_per_second']:.0f} audio s/s"
        )
        figures += self._score
        if self._bar.disable:
            eta = (self._steps - step) * self._total.seconds / max(self._total.steps, 1)
            self.say(f"step {step}/{self._steps}  {figures}  ETA {eta // 60:.0f}:{eta % 60:02.0f}")
        else:
            self._bar.update(self._line, figures=figures)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer:
            self._writer.write(step, values)

    def _count_compilations(self, event: str, seconds: float, **_: Any) -> None:
        del seconds
        # The steps are compiled in other threads, some of them while the run is under way.
        if threading.get_ident() == self._thread:
            self._compiles += event == "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class _Work:
    """Work done and the time it took, between two logged steps or in all."""

    steps: int = 0
    seconds: float = 0.0
    audio_seconds: float = 0.0
    flops: float = 0.0

    def add(self, other: "_Work") -> None:
        for field in dataclasses.fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)

    def rate(self, amount: float) -> float:
        return amount / self.seconds if self.seconds else 0.0


class _Console(Console):
    """A run goes on when nobody listens any more: its terminal, or the end of a pipe, is gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except OSError:  # stderr may be a file on the disk that is full
            self.quiet = True


class Writer:
    """Appends scalar metrics to a file of JSON lines and to TensorBoard's event files.

    Both are written in this thread, so that a disk which is full is an error here and at once, a
    ReportError. What was written after `step` by an earlier process is dropped: a resumed run
    writes it again.
    """

    _FLUSH_SECONDS = 30.0

    def __init__(self, metrics: pathlib.Path, tensorboard: pathlib.Path, step: int):
        self._metrics, self._folder, self._step = metrics, tensorboard, step
        self._events: Events | None = None  # until there is something to write
        # Nothing can be appended to what is in a bucket: there, all of it is written anew.
        self._scratch = tempfile.TemporaryDirectory() if files.is_remote(metrics) else None
        with self._errors(metrics):
            lines = _truncate(metrics, step)
            self._last = json.loads(lines[-1]) if lines else {}
            self._start = sum(len(line) + 1 for line in lines[:-1])
        with self._errors(tensorboard):
            tensorboard.mkdir(parents=True, exist_ok=True)
            # A name of its own: two may start within a second.
            name = f"events.out.tfevents.{time.time_ns() // 10**9}.{time.time_ns()}"
            self._lines, self._events_path = metrics, tensorboard / name
            if self._scratch:
                self._lines = pathlib.Path(self._scratch.name, metrics.name)
                self._events_path = pathlib.Path(self._scratch.name, name)
                if metrics.exists():
                    self._lines.write_bytes(metrics.read_bytes())
            self._events_path.touch()
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line of JSON for each step, and one point in each plot.

        What is not finite is null in the line, and no point.
        """
        numbers = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        line = {"step": step, **numbers}
        with self._errors(self._metrics), self._lines.open("ab") as file:
            if step == self._last.get("step"):  # the scores come after the figures of training
                line = self._last | line
                file.truncate(self._start)
            self._start = file.seek(0, os.SEEK_END)
            file.write(json.dumps(line).encode() + b"\n")
        self._last = line
        plots = self._plots()
        with self._errors(self._folder):
            plots.add(step, {name: x for name, x in numbers.items() if x is not None})
        if time.monotonic() - self._flushed > self._FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what TensorBoard's file holds back, and what is in a bucket."""
        if self._events:
            with self._errors(self._folder):
                self._events.flush()
                if self._scratch:
                    events = self._folder / self._events_path.name
                    events.write_bytes(self._events_path.read_bytes())
        if self._scratch and self._lines.exists():
            with self._errors(self._metrics):
                self._metrics.write_bytes(self._lines.read_bytes())
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            if self._events:
                with self._errors(self._folder):
                    self._events.close()
            if self._scratch:
                self._scratch.cleanup()

    def _plots(self) -> "Events":
        if self._events is None:
            # Not before: the library imports PyTorch where it is there, which takes a second.
            from speech_jax.training.tensorboard import Events

            with self._errors(self._folder):
                self._events = Events(self._events_path, self._step)
        return self._events

    @contextlib.contextmanager
    def _errors(self, path: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReportError(
                f"cannot write to {path} ({error.strerror or error}): make room or give the rights "
                "to write, then run the same command again"
            ) from error


def _truncate(path: pathlib.Path, step: int) -> list[bytes]:
    """Drops the lines after `step`, and a line that a kill has left unfinished; returns the rest.

    A file that is damaged otherwise is kept aside.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    kept, broken = [], []
    for line in data.splitlines():
        try:
            if json.loads(line.decode())["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            broken.append(line)
    if broken and not (len(broken) == 1 and data.endswith(broken[0])):
        aside = path.with_name(f"{path.name}.damaged")
        aside.write_bytes(data)
        logging.warning(
            "%s has %d damaged lines: they are left out, and all of it is in %s",
            path, len(broken), aside,
        )  # fmt: skip
    files.write_atomically(path, "".join(line.decode() + "\n" for line in kept))
    return kept
