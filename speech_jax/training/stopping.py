"""When a run ends before its last update: no more improvement, or a signal."""

import dataclasses
import math
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


@dataclasses.dataclass
class EarlyStopping:
    """Says when a metric has not improved for `patience` evaluations in a row (0: never).

    Plain state: `to_dict` goes into the checkpoint and `from_dict` brings it back.
    """

    patience: int
    mode: str = "min"
    best: float | None = None
    count: int = 0

    def update(self, value: float) -> bool:
        """Takes an evaluation's result (NaN is no improvement); returns whether it is the best."""
        sign = -1 if self.mode == "max" else 1
        improved = not math.isnan(value) and (self.best is None or sign * value < sign * self.best)
        self.best = value if improved else self.best
        self.count = 0 if improved else self.count + 1
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is at its end."""
        return 0 < self.patience <= self.count

    def to_dict(self) -> dict:
        """Returns what the checkpoint must hold."""
        return {"best": self.best, "count": self.count}

    def from_dict(self, saved: dict) -> None:
        """Takes what `to_dict` returned."""
        self.best, self.count = saved["best"], saved["count"]


def catch_preemption() -> Callable[[int], bool]:
    """From now on SIGTERM no longer kills; returns `reached(step)`, to be asked after every step.

    `reached` says that the run must save and leave now. All processes of a run ask with the same
    step and get the same answer: after jax.distributed.initialize JAX agrees among them on a step a
    little ahead of all of them (and hears of cloud maintenance too); without it, this process's
    signal is the answer.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return lambda step: bool(received)
