"""Checkpoints of a run: {state, data position, stopper, config}, asynchronous, atomic, verified.

Orbax writes each checkpoint in the background and renames it into place when it is whole, so a run
that is killed at any moment finds its previous checkpoint intact. What orbax does not do is notice
that bytes have changed since: the digest of every file is stored with the checkpoint, and nothing
of it is believed before its digest is verified. A checkpoint that is damaged is reported, and the
next one is used: weights are never silently wrong.

This module sees pytrees of jax.Array and plain dicts, never models, tasks or data. All processes of
a run call its functions together, on a directory that all of them see; one run writes to it.
"""

import concurrent.futures
import contextlib
import dataclasses
import glob
import hashlib
import json
import logging as std_logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from speech_jax.errors import UserError
from speech_jax.training.stopping import Watched

_DIGESTS = "digests.json"  # {file: SHA-256}, in each checkpoint's directory
_RECORD = "record/metadata"
_CURE = "Use the configuration that the checkpoint was trained with, or another directory."


Result = TypeVar("Result")


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names it and the cure."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the `state` pytree after update `step`, and the plain dicts saved with it."""

    step: int
    state: Any
    data: dict
    stopper: dict


class Checkpoints:
    """The checkpoints of one run, in `directory`/<step>.

    Keeps the newest `keep` of them, and the one that is best by what is `watched`. A context
    manager: leaving it waits for the save in progress.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, watched: Watched | None = None):
        """Opens or creates `directory`; raises CheckpointError where that cannot be."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least 1 checkpoint.")
        self.directory = epath.Path(directory).absolute()  # orbax refuses relative paths
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
        logging.get_absl_logger().addFilter(_not_an_orbax_error)
        try:
            self._manager = _Manager(
                self.directory,
                options=options,
                item_handlers={
                    "state": _state_handler(self.directory),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )
        except Exception as error:
            raise CheckpointError(
                f"Cannot keep checkpoints in {self.directory}: {_brief(error)}. "
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
        that is saved already is left as it is. Raises CheckpointError where this save, or the one
        before it, fails; earlier ones are intact.
        """
        self.wait()
        if step in self._damaged:
            self._run(self._manager.delete, step)
            self._damaged.remove(step)
        if step in self._manager.all_steps():
            return
        leaves = _leaves(state)
        record = {
            "step": step,
            "data": data,
            "stopper": stopper,
            "config": config,
            "metrics": metrics or {},
            "best": dataclasses.asdict(self._watched) if self._watched else None,
            "leaves": {name: _signature(leaf) for name, leaf in leaves.items()},
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
            lambda path: _read(path, abstract_state),
            self._damaged.add,
        )

    def wait(self) -> None:
        """Blocks until the save in progress is on disk; raises CheckpointError where it failed."""
        self._run(self._manager.wait_until_finished)

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
            raise CheckpointError(
                f"Cannot write checkpoint {self._writing} in {self.directory}: {_brief(error)}. "
                "Check free space and permissions, then run the same command again: "
                "earlier checkpoints are intact."
            ) from error

    def _seal(self) -> None:
        """Called by orbax in its thread, when all files are written and not yet in their place.

        Reads them back: every byte for its digest, and the smallest array as a restore would.
        """
        names = [f"{self._writing}{ocp.utils.TMP_DIR_SUFFIX}", f"{self._writing}"]  # no rename: gs
        path = next(path for path in map(self.directory.joinpath, names) if path.exists())
        digests = _digests(path)
        _read_leaves(path, self._smallest)
        (path / _DIGESTS).write_text(json.dumps(digests))

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
    directory = epath.Path(directory).absolute()
    try:
        steps = sorted(ocp.utils.checkpoint_steps(directory))
    except OSError as error:
        raise CheckpointError(f"Cannot read {directory}: {_brief(error)}.") from error
    records = _records(directory, steps)
    for step in steps:
        if step not in records:
            logging.warning("Checkpoint %d in %s is damaged, not used.", step, directory)
    saved = records[max(records)]["best"] if records else None
    watched = Watched(**({"split": ""} | saved)) if saved and saved["metric"] else None
    steps = _by_score(steps, _scores(records, watched), watched)
    found = _last_good(directory, steps, lambda path: _load(path, under))
    if found is None:
        raise CheckpointError(
            f"No checkpoint in {directory}: train first, or name a run's checkpoint directory."
        )
    step, arrays = found
    if step != steps[-1]:
        score = records[step]["metrics"]
        logging.warning("Checkpoint %d, %s, is used in the place of the best.", step, score)
    return arrays


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
        except _Damaged as error:
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
        with contextlib.suppress(_Damaged):
            records[step] = _read_record(directory / str(step))
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


# One checkpoint: reading and verifying.


class _Damaged(Exception):
    """This checkpoint's files are not what was saved: the message says how."""


def _read(path: epath.Path, abstract: Any) -> Restored:
    """Returns the checkpoint with the arrays that `abstract` describes, verified.

    Raises _Damaged in every process if it is damaged for any, and CheckpointError where `abstract`
    asks for other leaves than were saved.
    """
    wanted = _named(abstract)
    record = _verified(path)
    _check_leaves(path, wanted, record["leaves"])
    leaves = _together(lambda: _read_leaves(path, wanted))
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
    return Restored(int(path.name), state, record["data"], record["stopper"])


def _load(path: epath.Path, under: Sequence[str]) -> tuple[int, dict[str, np.ndarray]]:
    """Returns the step and the arrays under some names, verified; raises as `_read` does."""
    record = _verified(path)
    wanted = {}
    for name, signature in record["leaves"].items():
        if any(name == one or name.startswith(f"{one}/") for one in under):
            kind, _, shape = signature[:-1].partition("[")
            sizes = [int(size) for size in shape.split(",") if size]
            wanted[name] = jax.ShapeDtypeStruct(sizes, jnp.dtype(kind))
    if not wanted:
        raise CheckpointError(
            f"Checkpoint {path} holds nothing under {' or '.join(under)}. {_CURE}"
        )
    return int(path.name), _together(lambda: _read_leaves(path, wanted, on_host=True))


def _verified(path: epath.Path) -> dict:
    """Returns the record of a checkpoint all of whose files are as they were saved."""
    _together(lambda: _check_files(path) if jax.process_index() == 0 else None)
    return _together(lambda: _read_record(path))


def _together(read: Callable[[], Any]) -> Any:
    """Returns read(); raises _Damaged in all processes if it does in one, so that none waits."""
    result, failure = None, None
    try:
        result = read()
    except _Damaged as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failure is None and failed.any():
            failure = _Damaged(f"process {int(failed.argmax())} cannot read it")
    if failure is not None:
        raise failure
    return result


def _digests(path: epath.Path) -> dict[str, str]:
    """Returns {file: SHA-256} for all files of a checkpoint's two items."""
    files = [
        folder / name
        for item in ("record", "state")
        for folder, _, names in (path / item).walk()
        for name in names
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        digests = list(pool.map(_digest, files))
    return {
        str(file.relative_to(path)): digest for file, digest in zip(files, digests, strict=True)
    }


def _digest(file: epath.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _saved_digests(path: epath.Path) -> dict[str, str]:
    try:
        saved = json.loads((path / _DIGESTS).read_bytes())
        if _RECORD not in saved or not all(isinstance(digest, str) for digest in saved.values()):
            raise ValueError("they are not those of a checkpoint")
    except Exception as error:  # damaged bytes make JSON of any type, or none
        raise _Damaged(f"its digests cannot be read ({_brief(error)})") from error
    return saved


def _check_files(path: epath.Path) -> None:
    saved = _saved_digests(path)
    try:
        found = _digests(path)
    except OSError as error:
        raise _Damaged(f"its files cannot be read ({_brief(error)})") from error
    for name, digest in saved.items():
        if found.get(name) != digest:
            raise _Damaged(f"{name} has changed since it was saved")


def _read_record(path: epath.Path) -> dict:
    """Returns the record, which is parsed only if its bytes are those that were saved."""
    saved = _saved_digests(path)[_RECORD]
    try:
        data = (path / _RECORD).read_bytes()
        if hashlib.sha256(data).hexdigest() != saved:
            raise ValueError("it has changed since it was saved")
        return json.loads(data)
    except (OSError, ValueError) as error:  # or just deleted by the run that wrote it
        raise _Damaged(f"its record cannot be read ({_brief(error)})") from error


def _read_leaves(
    path: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], on_host: bool = False
) -> dict[str, Any]:
    """Returns the arrays by name, as numpy's where they are to be `on_host`.

    One that says no place goes to this process's first device.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        for name, leaf in wanted.items()
    }
    how = ocp.checkpoint_utils.construct_restore_args(places)
    if on_host:
        how = dict.fromkeys(places, ocp.RestoreArgs(restore_type=np.ndarray))
    args = ocp.args.PyTreeRestore(places, restore_args=how, partial_restore=True)
    try:
        # The handler alone, without a Checkpointer: it has no barriers, so that a process which
        # fails does not leave the others waiting.
        found = jax.block_until_ready(_state_handler(path).restore(path / "state", args=args))
    except Exception as error:  # tensorstore and orbax raise many types
        raise _Damaged(f"its arrays cannot be read ({_brief(error)})") from error
    return {name: _as_key(found[name], leaf) for name, leaf in wanted.items()}


def _as_key(numbers: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a random key of its data, as which orbax writes it; other arrays as they are."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return numbers
    kind = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(numbers, impl=kind)


def _state_handler(path: epath.Path) -> ocp.PyTreeCheckpointHandler:
    # Orbax would have each replica of an array write a slice of it, at the price of compiling those
    # slices, shape by shape, within the first save; and compression hardly shrinks weights. It
    # takes a path with [ in it for a pattern when it merges arrays into one file: there, each array
    # gets a file of its own.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        use_ocdbt=not glob.has_magic(str(path)),
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        ),
    )


def _check_leaves(path: epath.Path, wanted: Mapping[str, Any], saved: Mapping[str, str]) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"Checkpoint {path} has no {name}: this model needs it. {_CURE}")
        if _signature(leaf) != saved[name]:
            raise CheckpointError(
                f"Checkpoint {path} has {name} as {saved[name]}, and this model needs "
                f"{_signature(leaf)}. {_CURE}"
            )
    extra = [name for name in saved if name not in wanted]
    if extra:
        raise CheckpointError(f"Checkpoint {path} has {extra[0]}, unknown to this model. {_CURE}")


def _brief(error: Exception) -> str:
    """Returns the error on one line of bounded length: orbax's and tensorstore's run over many."""
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _not_an_orbax_error(record: std_logging.LogRecord) -> bool:
    """A log filter: orbax logs pages of traceback for an error that it then raises."""
    return record.levelno < std_logging.ERROR or "orbax" not in record.pathname


# Leaves: names, shapes, shardings.


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name, in tree order: {'params/encoder/kernel': leaf}.

    Saved under these names, a checkpoint does not depend on the classes of the containers.
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        raise ValueError('Two leaves of the state have the same name: a key has a "/" in it.')
    return named


def _leaves(state: Any) -> dict[str, jax.Array]:
    named = _named(state)
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name} is a {type(leaf).__name__}: make it a jax.Array to save it.")
    return named


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
