"""The compiled steps of a run, made in threads while the run goes on."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import jax


class Program(NamedTuple):
    """A compiled step and its arithmetic."""

    run: Callable
    flops: float


class Programs:
    """Programs by the updates after which they are used, and by batch shape.

    They are made in the order in which they are given, so a run can begin as soon as there is the
    one for its first batch; the others are compiled beside it. On a GPU all are there before it
    begins: XLA tries kernels there, for which the device must be free.
    """

    def __init__(self, makers: Iterable[tuple[int, Hashable, Callable[[], Program]]]):
        """`makers` are (update, shape, function that makes the program)."""
        # One compilation keeps about two cores busy.
        self._pool = concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
        self._made: dict[int, dict[Hashable, concurrent.futures.Future]] = {}
        for start, shape, make in makers:
            self._made.setdefault(start, {})[shape] = self._pool.submit(make)
        self._pool.shutdown(wait=jax.default_backend() == "gpu")  # takes no more than these

    def at(self, step: int, shape: Hashable) -> Program:
        """What makes update number `step`, of which the first is 1; waits for it.

        Raises what was raised in making it, or another one that is there by now: a batch that does
        not fit in memory is heard of as soon as possible.
        """
        for programs in self._made.values():
            for program in programs.values():
                if program.done():
                    program.result()
        return self._future(step, shape).result()

    def has(self, step: int, shape: Hashable) -> bool:
        """Whether `at` need not wait."""
        return self._future(step, shape).done()

    def _future(self, step: int, shape: Hashable) -> concurrent.futures.Future:
        start = max((start for start in self._made if start < step), default=min(self._made))
        return self._made[start][shape]

    def close(self) -> None:
        """Leaves what nobody has begun to compile."""
        self._pool.shutdown(wait=False, cancel_futures=True)
