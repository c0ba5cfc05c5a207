"""A watchdog: a run that makes no progress ends, so that a launcher can restart it."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator
from typing import Self


class Watchdog:
    """Ends the process when nothing beats for `seconds` (0: never): a hung collective or disk.

    While entered, each `beat()` starts the time again: one must come after every step and every
    batch of an evaluation. When the time is up, the stacks of all threads go to stderr under the
    line "Timeout (...)!" and the process exits with status 1. It is faulthandler's own thread that
    does so, without the interpreter: whatever holds the GIL.
    """

    LONG = 20  # times as long may what gives no beats take

    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError(f"The watchdog's seconds are {seconds}: 0 turns it off.")
        self._seconds = seconds

    def beat(self, busy: bool = False) -> None:
        """Says that the run makes progress; with `busy`, that what follows may take long."""
        self._arm(self._seconds * (self.LONG if busy else 1))

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Around work that gives no beats, however well it goes: to compile, to restore, to save.

        It may take LONG times the seconds of a step.
        """
        self.beat(busy=True)
        yield
        self.beat()

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, seconds: float) -> None:
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
