"""What a person sees of a run, and what is written of it: console, metrics.jsonl, TensorBoard."""

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from speech_jax.errors import UserError
from speech_jax.training import costs as flops


class TrainingError(UserError):
    """The run cannot go on; the message says why."""


class Report:
    """Takes each step's sums, and reads them only after the next step was dispatched.

    So the host never waits for the device while there is work to hand it. A context manager: the
    bar is shown inside it.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        steps: int,
        first: int,
        log_every: int,
        max_skipped: int,
        schedule,
        corpus,
        task,
    ):
        """`first` updates are done of `steps`; `corpus` names utterances and gives the rate."""
        self._steps, self._first, self._log_every = steps, first, log_every
        self._max_skipped, self._schedule = max_skipped, schedule
        self._corpus, self._task = corpus, task
        main = jax.process_index() == 0
        self._writer = Writer(workdir) if main else None
        if self._writer:
            self._writer.truncate(first)
        self._console = Console(stderr=True, quiet=not main, highlight=False)
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
        self._pending = None
        self._window = _Window()
        self._total = _Window()
        self._score = ""
        self._skipped = 0
        self._compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._count_compilations)

    def __enter__(self):
        self._bar.start()
        self._window.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()
        if self._writer:
            self._writer.close()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, soft_wrap=True, markup=False)

    def step(self, step: int, sums, finite, batch, program_flops: float) -> None:
        """Takes what update `step` returned (still being computed), and reads the one before."""
        previous, self._pending = self._pending, (step, sums, finite, batch["index"], program_flops)
        if previous:
            self._read(*previous)

    @contextlib.contextmanager
    def pause(self):
        """Around what is not training: the step before is read first, and no time is counted."""
        self._flush()
        self._window.stop()
        yield
        self._window.start()

    def scores(self, step: int, counts: dict) -> dict[str, float]:
        """Writes an evaluation's counts; returns the first split's rates."""
        rates = {
            split: {name: found.results()[name] for name in found.RATES}
            for split, found in counts.items()
        }
        for split, found in counts.items():
            self.say(f"step {step}  {split}: {found}")
        self._write(
            step,
            {f"{split}/{name}": x for split, values in rates.items() for name, x in values.items()},
        )
        first = next(iter(counts))
        self._score = f"  {first}: {counts[first]}"
        return rates[first]

    def finish(self) -> dict:
        """Reads the last step; returns the run's figures for results.json."""
        self._flush()
        self._window.stop()
        self._total.add(self._window)
        return {
            "audio_seconds_per_second": self._total.rate(self._total.audio_seconds),
            "mfu": self._total.rate(self._total.flops) / (flops.peak_flops() * jax.device_count()),
            "skipped_updates": self._skipped,
            "compiles": self._compiles,
            "left_out": len(self._corpus.left_out),
            "unreadable": len(self._corpus.skipped),
        }

    def _flush(self):
        if self._pending:
            self._read(*self._pending)
            self._pending = None

    def _read(self, step, sums, finite, index, program_flops):
        self._window.flops += program_flops
        self._window.steps += 1
        self._bar.update(self._line, completed=step)
        if not bool(finite):
            self._skipped += 1
            names = [self._corpus.source.utterances[place].id for place in index if place >= 0]
            self.say(f"step {step}: not finite, skipped; its utterances: {' '.join(names)}")
            if self._skipped > self._max_skipped:
                raise TrainingError(
                    f"{self._skipped} updates were not finite, more than train.max_skipped="
                    f"{self._max_skipped}: lower the learning rate or look at the utterances above"
                )
        if step % self._log_every == 0:
            self._log(step, {name: float(value) for name, value in jax.device_get(sums).items()})

    def _log(self, step, sums):
        rate = self._corpus.sample_rate
        done = max(sums["steps"] + sums["skipped"], 1.0)
        # After a restart the sums may reach back further than this process does.
        self._window.audio_seconds = sums["samples"] / rate * self._window.steps / done
        self._window.stop()
        updates = max(sums["steps"], 1.0)
        found = self._task.figures(sums)
        values = found | {
            "grad_norm": sums["grad_norm"] / updates,
            "learning_rate": float(self._schedule(step - 1)),
            "padding_fraction": 1 - sums["samples"] / max(sums["padded_samples"], 1.0),
            "skipped_updates": sums["skipped"],
            "unreadable": len(self._corpus.skipped),
            "audio_seconds_per_second": self._window.rate(self._window.audio_seconds),
            "mfu": self._window.rate(self._window.flops)
            / (flops.peak_flops() * jax.device_count()),
            "compiles": self._compiles,
        }
        self._total.add(self._window)
        self._window = _Window()
        self._window.start()
        self._write(step, values)
        loss = next(iter(found.values()))
        accuracy = f"  accuracy {found['accuracy']:.3f}" if "accuracy" in found else ""
        self._show(step, f"loss {loss:.3f}{accuracy}", values)
        self._task.check(found, step)

    def _show(self, step, progress, values):
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

    def _write(self, step, values):
        if self._writer:
            self._writer.write(step, values)

    def _count_compilations(self, event: str, seconds: float, **_) -> None:
        self._compiles += event == "/jax/core/compile/backend_compile_duration"


class _Window:
    """Work done and the time it took, between two logged steps or in all."""

    def __init__(self):
        self.steps, self.seconds, self.audio_seconds, self.flops = 0, 0.0, 0.0, 0.0
        self._since = None

    def start(self):
        self._since = time.monotonic()

    def stop(self):
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
        self._since = None

    def add(self, other):
        self.steps += other.steps
        self.seconds += other.seconds
        self.audio_seconds += other.audio_seconds
        self.flops += other.flops

    def rate(self, amount: float) -> float:
        return amount / self.seconds if self.seconds else 0.0


class Writer:
    """Appends scalar metrics to metrics.jsonl and TensorBoard event files in `directory`.

    Only lines of steps that a resumed run will not write again are kept: call `truncate` with the
    step that was restored.
    """

    def __init__(self, directory: pathlib.Path):
        self._path = directory / "metrics.jsonl"
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def truncate(self, step: int) -> None:
        """Drops the lines after `step`, and a line that a kill left unfinished."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        scratch = self._path.with_suffix(".partial")
        scratch.write_text("".join(line + "\n" for line in kept))
        scratch.replace(self._path)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One line of JSON, and one point in each TensorBoard plot."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes what TensorBoard holds back."""
        self._board.close()
