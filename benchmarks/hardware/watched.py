"""speech_jax.main, which also writes down how long it waits for its input.

  python -m benchmarks.hardware.watched HOW FILE FLAGS ...

HOW is what forms.choose takes: '' or +FORM+FORM. FILE gets a line of JSON every so many batches:
how many were taken, the seconds spent waiting for them, and the clock.
"""

import json
import runpy
import sys
import time

from benchmarks.hardware import forms

EVERY = 10


class _Timed:
    """An iterator over batches that says how long it was waited for."""

    def __init__(self, batches, file: str):
        self._batches, self._file = batches, file
        self._count, self._waited = 0, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        batch = next(self._batches)
        self._waited += time.monotonic() - start
        self._count += 1
        if self._count % EVERY == 0 or self._count == 1:
            line = {"count": self._count, "waited": self._waited, "clock": time.monotonic()}
            with open(self._file, "a") as file:
                file.write(json.dumps(line) + "\n")
        return batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def watch(file: str) -> None:
    """Has the batches of training, which have no end, timed in this process."""
    from speech_jax.data import pipeline

    original = pipeline.batches

    def batches(*args, **kwargs):
        made = original(*args, **kwargs)
        return _Timed(made, file) if kwargs.get("repeat", True) else made

    pipeline.batches = batches


if __name__ == "__main__":
    name, waits, *rest = sys.argv[1:]
    forms.choose(name)
    watch(waits)
    sys.argv[1:] = rest
    runpy.run_module("speech_jax.main", run_name="__main__", alter_sys=True)
