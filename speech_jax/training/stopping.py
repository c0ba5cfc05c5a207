"""When a run ends before its last update: no more improvement, or a signal."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class Watched:
    """What says which checkpoint is best: a metric on a split, and whether less is better."""

    split: str
    metric: str
    mode: str  # 'min' or 'max'

    def __post_init__(self):
        if self.mode not in ("min", "max"):
            raise ValueError(f"The mode of {self.metric} is {self.mode!r}: use 'min' or 'max'.")

    def score(self, metrics: Mapping[str, float | None]) -> float | None:
        """The metric; None where it is absent or not finite, which picks no model."""
        value = metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None

    def is_that_of(self, saved: Mapping[str, str] | None) -> bool:
        """Whether this is what a checkpoint was saved with; earlier ones do not name the split."""
        return bool(saved) and all(
            saved.get(name, value) == value for name, value in dataclasses.asdict(self).items()
        )


@dataclasses.dataclass
class EarlyStopping:
    """Says when the metric has not improved for so many evaluations in a row, or so many epochs.

    `patience` counts evaluations and `patience_epochs` epochs, from the best evaluation on, or from
    the first where none is; 0 is never.
    An improvement is of more than `min_delta`. Plain state: `to_dict` goes into the checkpoint and
    `from_dict` brings it back.
    """

    patience: int
    watched: Watched | None = None
    min_delta: float = 0.0
    patience_epochs: float = 0.0
    best: float | None = None
    count: int = 0
    epoch: float = 0.0
    best_epoch: float | None = None

    def update(self, metrics: Mapping[str, float | None], epoch: float = 0.0) -> bool:
        """Takes an evaluation's metrics, after so many epochs; returns whether they are the best.

        A metric that is absent or not finite is no improvement.
        """
        value = self.watched.score(metrics) if self.watched else None
        sign = -1 if self.watched and self.watched.mode == "max" else 1
        improved = value is not None and (
            self.best is None or sign * (self.best - value) > self.min_delta
        )
        self.best = value if improved else self.best
        self.count = 0 if improved else self.count + 1
        self.epoch = epoch
        if improved or self.best_epoch is None:
            self.best_epoch = epoch
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is at its end."""
        epochs = self.epoch - (self.best_epoch or 0.0)
        return 0 < self.patience <= self.count or 0 < self.patience_epochs <= epochs

    @property
    def why(self) -> str:
        """Why the patience is at its end, to be read."""
        of = f"{self.watched.split} {self.watched.metric}" if self.watched else "no metric"
        best = "without a value" if self.best is None else f"not better than {self.best:.4g}"
        return f"{of} {best} for {self.count} evaluation{'s' if self.count > 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Returns what the checkpoint must hold."""
        watched = dataclasses.asdict(self.watched) if self.watched else None
        state = {name: getattr(self, name) for name in ("best", "count", "epoch", "best_epoch")}
        return state | {"watched": watched}

    def from_dict(self, saved: Mapping[str, Any]) -> str | None:
        """Takes what `to_dict` returned; starts anew, and says so, where that watched other scores.

        Returns the line to be shown to the user, or None.
        """
        was = saved.get("watched")
        if was and self.watched and not self.watched.is_that_of(was):
            return (
                f"this run was scored on {was['split']} ({was['metric']}) before: the best "
                f"checkpoint and the patience start anew with {self.watched.split} "
                f"({self.watched.metric})"
            )
        self.best, self.count = saved["best"], saved["count"]
        self.epoch, self.best_epoch = saved.get("epoch", 0.0), saved.get("best_epoch")
        return None


class Interrupted(Exception):
    """Work was left because the run was asked to: `Interruption.check` raises it."""


class Interruption:
    """Hears SIGTERM and Ctrl-C, which ask a run to save and leave, while it is entered.

    The second Ctrl-C ends the process at once, with status 130; leaving brings the earlier handlers
    back. A signal that comes while the main thread is in a long call (a compilation) is heard when
    that call returns.

    All processes of a run hear of it at the same point of their work: after
    jax.distributed.initialize JAX agrees among them on one a little ahead of all of them (and hears
    of cloud maintenance too). So all of them must ask equally often.
    """

    def __init__(self):
        self._received: list[int] = []
        self._asked = False
        self._points = 0  # how often it was asked: what the processes agree on
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            numbers = [signal.SIGINT]
            if not jax.distributed.is_initialized():  # there, SIGTERM is JAX's
                numbers.append(signal.SIGTERM)
            self._before = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not of Python

    def asked(self) -> bool:
        """Whether the run must save and leave now: to be asked after every step and batch."""
        if not self._asked:
            self._points += 1
            if jax.distributed.is_initialized():
                self._asked = multihost_utils.reached_preemption_sync_point(self._points)
            else:
                self._asked = bool(self._received)
        return self._asked

    def check(self) -> None:
        """Raises Interrupted where the run must save and leave now."""
        if self.asked():
            raise Interrupted

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = number in self._received
        self._received.append(number)  # first of all: the next one may come at any time
        if number != signal.SIGINT:
            return
        if again:
            os._exit(130)
        with contextlib.suppress(OSError):  # print could meet itself in a signal's handler
            os.write(2, b"\ninterrupted: saves and leaves; Ctrl-C again leaves at once\n")
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # which tells the other processes
