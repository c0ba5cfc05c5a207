"""Checkpoints of a run: {state, data position, stopper, config}, asynchronous, atomic, verified.

Orbax writes each checkpoint in the background and renames it into place when it is whole, so a run
that is killed at any moment finds its previous checkpoint intact. What orbax does not do is notice
that bytes have changed since: the digest of every file is stored with the checkpoint and verified
before anything is parsed. A checkpoint that is damaged is reported and the one before it is used:
weights are never silently wrong.

This module sees pytrees of jax.Array and plain dicts, never models, tasks or data. All processes of
a run call its functions together, on a directory that all of them see; one run writes to it.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging as std_logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from speech_jax.errors import UserError

_DIGESTS = "digests.json"  # in each checkpoint's directory


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names it and the cure."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the `state` pytree after update `step`, and the plain dicts saved with it."""

    step: int
    state: Any
    data: dict
    stopper: dict
    config: dict


class Checkpoints:
    """The checkpoints of one run, in `directory`/<step>.

    Keeps the newest `keep` of them, and the one whose `metrics[best_metric]` is best ('min' or
    'max'). A context manager: leaving it waits for the save in progress.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: str = "min",
    ):
        """Opens or creates `directory`; raises CheckpointError where that cannot be."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least 1 checkpoint.")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode is {best_mode!r}: use 'min' or 'max'.")
        self.directory = epath.Path(directory).absolute()  # orbax refuses relative paths
        self._keep = keep
        self._best = {"metric": best_metric, "mode": best_mode}
        self._writing: int | None = None
        self._damaged: set[int] = set()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Policy(self._kept),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # no parsing of bookkeeping that may be damaged
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        logging.get_absl_logger().addFilter(_not_an_orbax_error)
        try:
            self._manager = _Manager(
                self.directory,
                options=options,
                item_handlers={"state": _state_handler(), "record": ocp.JsonCheckpointHandler()},
            )
        except Exception as error:
            raise CheckpointError(
                f"Cannot keep checkpoints in {self.directory}: {_brief(error)}. "
                "Name a directory that exists or can be created, and that is writable."
            ) from error
        self._scores = _scores(self.directory, self._manager.all_steps(), best_metric)

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

        Returns when the state has left the devices, so that it may be donated to the next step;
        files are written behind. A step that is saved already is left as it is. Raises
        CheckpointError where this save, or the one before it, fails; earlier ones are intact.
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
            "best": self._best,
            "leaves": {name: _signature(leaf) for name, leaf in leaves.items()},
        }
        score = _score(record, self._best["metric"])
        if score is not None:
            self._scores[step] = score
        self._writing = step
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_numbers(leaves)), record=ocp.args.JsonSave(record)
        )
        self._run(self._manager.save, step, args=args, force=True)

    def restore(self, abstract_state: Any) -> Restored | None:
        """Returns the newest good checkpoint, or None where there is none at all.

        `abstract_state` is a pytree of jax.ShapeDtypeStruct whose shardings say where the arrays
        go, on any mesh and any number of processes. Raises CheckpointError where every checkpoint
        is damaged, or where one is of another model (naming the first leaf that differs).
        """
        self.wait()
        found = _newest_good(
            self.directory,
            self._manager.all_steps(),
            lambda step: _read(self.directory / str(step), abstract_state, prefix="", whole=True),
            self._damaged.add,
        )
        if found is None:
            return None
        step, (record, state) = found
        return Restored(step, state, record["data"], record["stopper"], record["config"])

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

    def _write_digests(self) -> None:
        """Called by orbax in its thread, when all files are written and not yet in their place."""
        names = [f"{self._writing}{ocp.utils.TMP_DIR_SUFFIX}", f"{self._writing}"]  # no rename: gs
        path = next(path for path in map(self.directory.joinpath, names) if path.exists())
        (path / _DIGESTS).write_text(json.dumps(_digests(path)))

    def _kept(self, steps: Sequence[int]) -> list[bool]:
        good = sorted(set(steps) - self._damaged)
        kept = {*good[-self._keep :], *_best_step(good, self._scores, self._best["mode"])}
        return [step in kept for step in steps]


def restore_params(
    directory: str, abstract_params: Any, *, which: str = "best", prefix: str = "params"
) -> Any:
    """Returns parameters alone from a run's checkpoints, for fine-tuning and evaluation.

    `abstract_params` (as in `Checkpoints.restore`) may be a part of the tree under `prefix`, the
    place of the parameters in the saved state ('params', 'ema', 'params/encoder'). `which` is
    'best' (by the metric that the run tracked; the newest where it tracked none) or 'latest'.
    Changes nothing in `directory`. Raises CheckpointError where there is no good checkpoint, or a
    parameter is absent or of another shape.
    """
    if which not in ("best", "latest"):
        raise ValueError(f"which is {which!r}: use 'best' or 'latest'.")
    directory = epath.Path(directory).absolute()
    try:
        steps = sorted(ocp.utils.checkpoint_steps(directory))
    except OSError as error:
        raise CheckpointError(f"Cannot read {directory}: {_brief(error)}.") from error
    if which == "best":
        steps = _by_score(directory, steps)
    found = _newest_good(
        directory,
        steps,
        lambda step: _read(directory / str(step), abstract_params, prefix=prefix, whole=False),
    )
    if found is None:
        raise CheckpointError(
            f"No checkpoint in {directory}: train first, or name a run's checkpoint directory."
        )
    return found[1][1]


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


# Which checkpoint: the newest good one, agreed among the processes.


def _newest_good(
    directory: epath.Path,
    steps: Sequence[int],
    read: Callable[[int], Any],
    on_damaged: Callable[[int], Any] = lambda step: None,
) -> tuple[int, Any] | None:
    """Returns (step, read(step)) of the last good one of `steps`; None where there are none."""
    steps, failures = list(steps), []
    for step in _agreed_steps(steps):
        try:
            return step, read(step)
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


def _agreed_steps(steps: list[int]) -> Iterator[int]:
    """Yields process 0's `steps` from the last to the first, the same in every process.

    A file system shared by hosts may for a moment list differently on each.
    """
    if jax.process_count() == 1:
        yield from reversed(steps)
        return
    for place in range(1, 1 + int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))):
        own = steps[-place] if place <= len(steps) else -1
        yield int(multihost_utils.broadcast_one_to_all(np.int32(own)))


def _scores(directory: epath.Path, steps: Sequence[int], metric: str | None) -> dict[int, float]:
    scores = {}
    for step in steps:
        try:
            score = _score(_read_record(directory / str(step)), metric)
        except _Damaged:
            continue  # reported when it is restored
        if score is not None:
            scores[step] = score
    return scores


def _score(record: dict, metric: str | None) -> float | None:
    score = record["metrics"].get(metric)
    return None if score is None or math.isnan(score) else score


def _best_step(steps: Sequence[int], scores: dict[int, float], mode: str) -> list[int]:
    """Returns the best scored of `steps` as a list of one (the newest of equals), or of none."""
    scored = [step for step in steps if step in scores]
    sign = 1 if mode == "max" else -1
    return [max(scored, key=lambda step: (sign * scores[step], step))] if scored else []


def _by_score(directory: epath.Path, steps: list[int]) -> list[int]:
    """Returns `steps` with the best one last, by the metric that the newest good record names."""
    for step in reversed(steps):
        try:
            best = _read_record(directory / str(step))["best"]
        except _Damaged:
            continue
        last = _best_step(steps, _scores(directory, steps, best["metric"]), best["mode"])
        return [step for step in steps if step not in last] + last
    return steps


# One checkpoint: reading and verifying.


class _Damaged(Exception):
    """This checkpoint's files are not what was saved: the message says how."""


def _read(path: epath.Path, abstract: Any, *, prefix: str, whole: bool) -> tuple[dict, Any]:
    """Returns the record, and the arrays that `abstract` describes, from under `prefix`; verified.

    Raises _Damaged in every process if it is damaged for any, and CheckpointError where `abstract`
    asks for other leaves than were saved (or, if `whole`, for fewer).
    """
    wanted = {
        f"{prefix}/{name}" if prefix else name: leaf for name, leaf in _named(abstract).items()
    }
    _together(lambda: _check_files(path) if jax.process_index() == 0 else None)
    record = _together(lambda: _read_record(path))
    _check_leaves(path, wanted, record["leaves"], whole)
    leaves = _together(lambda: _read_leaves(path, wanted))
    return record, jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())


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


def _check_files(path: epath.Path) -> None:
    try:
        saved, found = json.loads((path / _DIGESTS).read_text()), _digests(path)
        damaged = [name for name, digest in saved.items() if found.get(name) != digest]
    except Exception as error:  # damaged bytes make JSON of any type, or none
        raise _Damaged(f"its digests cannot be verified ({_brief(error)})") from error
    if damaged:
        raise _Damaged(f"{damaged[0]} has changed since it was saved")


def _read_record(path: epath.Path) -> dict:
    try:
        return ocp.JsonCheckpointHandler().restore(path / "record")
    except Exception as error:  # damaged, or just deleted by the run that wrote it
        raise _Damaged(f"its record cannot be read ({_brief(error)})") from error


def _read_leaves(path: epath.Path, wanted: dict) -> dict[str, jax.Array]:
    numbers = {name: _abstract_number(leaf) for name, leaf in wanted.items()}
    args = ocp.args.PyTreeRestore(
        numbers,
        restore_args=ocp.checkpoint_utils.construct_restore_args(numbers),
        partial_restore=True,
    )
    try:
        # The handler alone, without a Checkpointer: it has no barriers, so that a process which
        # fails does not leave the others waiting.
        leaves = jax.block_until_ready(_state_handler().restore(path / "state", args=args))
    except Exception as error:  # tensorstore and orbax raise many types
        raise _Damaged(f"its arrays cannot be read ({_brief(error)})") from error
    return {name: _from_numbers(leaves[name], leaf) for name, leaf in wanted.items()}


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    # Orbax would have each replica of an array write a slice of it, at the price of compiling those
    # slices, shape by shape, within the first save; and compression hardly shrinks weights.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )


def _check_leaves(path: epath.Path, wanted: dict, saved: dict, whole: bool) -> None:
    cure = "Use the configuration that the checkpoint was trained with, or another directory."
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"Checkpoint {path} has no {name}: this model needs it. {cure}")
        if _signature(leaf) != saved[name]:
            raise CheckpointError(
                f"Checkpoint {path} has {name} as {saved[name]}, and this model needs "
                f"{_signature(leaf)}. {cure}"
            )
    extra = [name for name in saved if name not in wanted]
    if whole and extra:
        raise CheckpointError(f"Checkpoint {path} has {extra[0]}, unknown to this model. {cure}")


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


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the leaves as arrays of numbers: random keys as their data."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()
    }


def _from_numbers(numbers: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if not _is_key(like):
        return numbers
    kind = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(numbers, impl=kind)


def _abstract_number(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns `leaf` as `_numbers` saves it, on this process's first device if it does not say."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
