"""A watchdog: a run that makes no progress ends, so that a launcher can restart it."""

import faulthandler
import sys
from typing import Self


class Watchdog:
    """Ends the process when nothing beats for `seconds` (0: never): a hung collective or disk.

    While entered, each `beat()` starts the time again: one must come after every step, and within
    every longer work (evaluation, compilation, saving). When the time is up, the stacks of all
    threads go to stderr under the line "Timeout (...)!" and the process exits with status 1. It is
    faulthandler's own thread that does so, without the interpreter: whatever holds the GIL.
    """

    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError(f"The watchdog's seconds are {seconds}: 0 turns it off.")
        self._seconds = seconds

    def beat(self) -> None:
        """Says that the run makes progress."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
