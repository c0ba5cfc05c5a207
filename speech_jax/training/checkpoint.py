"""Checkpoints of a run: {state, data position, stopper, config}, asynchronous, atomic, verified.

Orbax writes each checkpoint in the background and renames it into place when it is whole, so a run
that is killed at any moment finds its previous checkpoint intact. What orbax does not do is notice
that bytes have changed since: the digest of every file is stored with the checkpoint, and nothing
of it is believed before its digest is verified. A checkpoint that is damaged is reported, and the
next one is used: weights are never silently wrong.

This module sees pytrees of jax.Array and plain dicts, never models, tasks or data. All processes of
a run call its functions together, on a directory that all of them see; one run writes to it.
"""

import contextlib
import dataclasses
import functools
import logging as std_logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from speech_jax import files
from speech_jax.training import saved, sharding
from speech_jax.training.saved import CheckpointError
from speech_jax.training.stopping import Watched

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the `state` pytree after update `step`, and the plain dicts saved with it."""

    step: int
    state: Any
    data: dict
    stopper: dict


# Ends the name of a checkpoint whose replacement is being written.
_ASIDE = ".replaced"


class Checkpoints:
    """The checkpoints of one run, in `directory`/<step>.

    Keeps the newest `keep` of them, and the one that is best by what is `watched`. A context
    manager: leaving it waits for the save in progress.
    """

    def __init__(
        self, directory: str | os.PathLike, *, keep: int = 3, watched: Watched | None = None
    ):
        """Opens or creates `directory`; raises CheckpointError where that cannot be."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least 1 checkpoint.")
        self.directory = _absolute(directory)
        self._keep, self._watched = keep, watched
        self._writing: int | None = None
        self._smallest: dict[str, jax.ShapeDtypeStruct] = {}
        self._damaged: set[int] = set()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Policy(self._kept),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # no parsing of bookkeeping that may be damaged
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._seal,
                # Where a directory cannot be made, threads that wait for it would hold the process
                # for five minutes.
                create_directories_asynchronously=False,
            ),
        )
        _quieten()
        try:
            sharding.from_first(self._bring_back)  # before any process looks at what is there
            self._manager = _Manager(
                self.directory,
                options=options,
                item_handlers={
                    "state": saved.state_handler(self.directory),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )
        except Exception as error:
            raise CheckpointError(
                f"Cannot keep checkpoints in {self.directory}: {saved.brief(error)}. "
                "Name a directory that exists or can be created, and that is writable."
            ) from error
        self._scores = _scores(_records(self.directory, self._manager.all_steps()), watched)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: dict,
        stopper: dict,
        config: dict,
        metrics: dict | None = None,
    ) -> None:
        """Starts saving `state` (a pytree of jax.Array) and plain dicts as checkpoint `step`.

        `metrics` are an evaluation's, of the split that is watched. Returns when the state has left
        the devices, so that it may be donated to the next step; files are written behind. A step
        that is saved already is left as it is, unless it was so before it was evaluated. Raises
        CheckpointError where this save, or the one before it, fails; earlier ones are intact.
        """
        self.wait()
        if step in self._damaged:
            self._run(self._manager.delete, step)
            self._damaged.remove(step)
        if step in self._manager.all_steps():
            if not metrics or step in self._scores:
                return
            self._run(self._set_aside, step)
        leaves = saved.leaves_of(state)
        record = {
            "step": step,
            "data": data,
            "stopper": stopper,
            "config": config,
            "metrics": metrics or {},
            "best": dataclasses.asdict(self._watched) if self._watched else None,
            "leaves": {name: saved.signature(leaf) for name, leaf in leaves.items()},
        }
        score = self._watched and self._watched.score(record["metrics"])
        if score is not None:
            self._scores[step] = score
        name, leaf = min(leaves.items(), key=lambda pair: pair[1].size)
        self._smallest = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
        self._writing = step
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves), record=ocp.args.JsonSave(record)
        )
        self._run(self._manager.save, step, args=args, force=True)

    def check(self) -> None:
        """Raises CheckpointError if the save behind the steps has failed; waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, abstract_state: Any) -> Restored | None:
        """Returns the newest good checkpoint, or None where there is none at all.

        `abstract_state` is a pytree of jax.ShapeDtypeStruct whose shardings say where the arrays
        go, on any mesh and any number of processes. Raises CheckpointError where every checkpoint
        is damaged, or where one is of another model (naming the first leaf that differs).
        """
        self.wait()
        return _last_good(
            self.directory,
            sorted(self._manager.all_steps()),
            lambda path: _restored(path, abstract_state),
            self._damaged.add,
        )

    def wait(self) -> None:
        """Blocks until the save in progress is on disk; raises CheckpointError where it failed."""
        self._run(self._manager.wait_until_finished)
        self._run(self._bring_back)

    def _set_aside(self, step: int) -> None:
        """Keeps a checkpoint under another name until the one that replaces it is whole."""
        old = self.directory / str(step)

        def rename() -> None:
            with files.writing(old):
                old.rename(self.directory / f"{step}{_ASIDE}")

        sharding.from_first(rename)  # the others look only when it is done
        self._manager.reload()

    def _bring_back(self) -> None:
        """Ends what `_set_aside` began: removes the old checkpoint, or brings it back."""
        if jax.process_index():
            return
        with files.writing(self.directory):
            for path in list(self.directory.iterdir()) if self.directory.exists() else []:
                if path.name.endswith(_ASIDE):
                    place = self.directory / path.name.removesuffix(_ASIDE)
                    path.rmtree() if place.exists() else path.rename(place)

    def close(self) -> None:
        """Waits for the save in progress and ends the threads."""
        self._run(self._manager.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            logging.error("%s", failure)  # the first error is the one to raise

    def _run(self, function: Callable, *args, **kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            why = saved.brief(error)
            raise CheckpointError(
                f"Cannot write checkpoint {self._writing} in {self.directory}: {why}. "
                "Check free space and permissions, then run the same command again: "
                "earlier checkpoints are intact."
            ) from error

    def _seal(self) -> None:
        """Called by orbax in its thread, when all files are written and not yet in their place."""
        names = [f"{self._writing}{ocp.utils.TMP_DIR_SUFFIX}", f"{self._writing}"]  # no rename: gs
        path = next(path for path in map(self.directory.joinpath, names) if path.exists())
        saved.seal(path, self._smallest)

    def _kept(self, steps: Sequence[int]) -> list[bool]:
        good = sorted(set(steps) - self._damaged)
        best = _by_score(good, self._scores, self._watched)[-1:] if self._scores else []
        kept = {*good[-self._keep :], *best}
        return [step in kept for step in steps]


def load_best(directory: str | os.PathLike, under: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns arrays of a run's best checkpoint by name, on the host: {'params/kernel': array}.

    They are those `under` these names ('params' is under 'params', and so is 'params/kernel'). The
    best is so by what the run watched, and the newest where it watched nothing; where it is
    damaged, the next best is used, and a warning says so. Changes nothing in `directory`. Raises
    CheckpointError where there is no good checkpoint, or it holds nothing under one of the names.
    """
    directory = _absolute(directory)
    try:
        steps = sorted(ocp.utils.checkpoint_steps(directory))
    except OSError as error:
        raise CheckpointError(f"Cannot read {directory}: {saved.brief(error)}.") from error
    records = _records(directory, steps)
    for step in steps:
        if step not in records:
            logging.warning("Checkpoint %d in %s is damaged, not used.", step, directory)
    best = records[max(records)]["best"] if records else None
    watched = Watched(**({"split": ""} | best)) if best and best["metric"] else None
    steps = _by_score(steps, _scores(records, watched), watched)
    found = _last_good(directory, steps, lambda path: (int(path.name), saved.load(path, under)))
    if found is None:
        raise CheckpointError(
            f"No checkpoint in {directory}: train first, or name a run's checkpoint directory."
        )
    step, arrays = found
    if step != steps[-1]:
        score = records[step]["metrics"]
        logging.warning("Checkpoint %d, %s, is used in the place of the best.", step, score)
    return arrays


def _restored(path: epath.Path, abstract_state: Any) -> Restored:
    record, state = saved.read(path, abstract_state)
    return Restored(int(path.name), state, record["data"], record["stopper"])


def _absolute(directory: str | os.PathLike) -> epath.Path:
    """As orbax wants its paths; one of a bucket (gs://) is so already."""
    path = epath.Path(directory)
    return path if "://" in str(path) else path.absolute()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax asks this for a statistic alone, and fails without times: see training/stopping.py.
        return False


class _Policy:
    """Orbax's form of "which checkpoints stay": a method that gets their infos."""

    def __init__(self, kept: Callable[[Sequence[int]], list[bool]]):
        self._kept = kept

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        return self._kept([info.step for info in checkpoints])


# Which checkpoint: the last good one of a list, agreed among the processes.


def _last_good(
    directory: epath.Path,
    steps: Sequence[int],
    read: Callable[[epath.Path], Result],
    on_damaged: Callable[[int], Any] = lambda step: None,
) -> Result | None:
    """Returns what `read` makes of the last good one of `steps`; None where there are none."""
    failures = []
    for step in _agreed(steps):
        try:
            return read(directory / str(step))
        except saved.Damaged as error:
            logging.warning("Checkpoint %d in %s is damaged, not used: %s", step, directory, error)
            failures.append(f"checkpoint {step}: {error}")
            on_damaged(step)
    if not failures:
        return None
    raise CheckpointError(
        f"None of the {len(failures)} checkpoints in {directory} can be used ({failures[0]}). "
        "Bring the directory back from a copy, or move it away to start anew."
    )


def _agreed(steps: Sequence[int]) -> Iterator[int]:
    """Yields process 0's `steps` from the last to the first, the same in every process.

    A file system shared by hosts may for a moment list differently on each.
    """
    if jax.process_count() == 1:
        yield from reversed(steps)
        return
    for place in range(1, 1 + int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))):
        own = steps[-place] if place <= len(steps) else -1
        yield int(multihost_utils.broadcast_one_to_all(np.int32(own)))


def _records(directory: epath.Path, steps: Sequence[int]) -> dict[int, dict]:
    """Returns the records that are as they were saved; others are reported when they are used."""
    records = {}
    for step in steps:
        with contextlib.suppress(saved.Damaged):
            records[step] = saved.read_record(directory / str(step))
    return records


def _scores(records: Mapping[int, dict], watched: Watched | None) -> dict[int, float]:
    """Returns the scores of those that were saved while the same was watched."""
    found = {
        step: watched.score(record["metrics"])
        for step, record in records.items()
        if watched and watched.is_that_of(record["best"])
    }
    return {step: score for step, score in found.items() if score is not None}


def _by_score(
    steps: Sequence[int], scores: Mapping[int, float], watched: Watched | None
) -> list[int]:
    """Returns `steps` with the best scored last (the newest of equals), the unscored before."""
    sign = 1 if watched and watched.mode == "max" else -1
    return sorted(steps, key=lambda step: (step in scores, sign * scores.get(step, 0.0), step))


def _quieten() -> None:
    """Keeps what orbax raises from being shown as pages of traceback as well.

    It logs them itself; asyncio logs each task that failed beside the first one; and those that end
    after their loop was closed for that are exceptions that nobody can catch.
    """
    for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
        logger.addFilter(_not_an_orbax_error)
    before = sys.unraisablehook
    if getattr(before, "func", None) is not _unless_late:
        sys.unraisablehook = functools.partial(_unless_late, before)


def _not_an_orbax_error(record: std_logging.LogRecord) -> bool:
    is_orbax = "orbax" in record.pathname or "/orbax/" in record.getMessage()
    return record.levelno < std_logging.ERROR or not is_orbax


def _unless_late(hook: Callable[[Any], None], raised: Any) -> None:
    if str(raised.exc_value) != "Event loop is closed":
        hook(raised)
