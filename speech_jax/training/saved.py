"""One checkpoint on disk: a record, arrays, and the digests that vouch for both.

    digests.json       {file: SHA-256} of all that follows
    record/metadata    JSON: data position, stopper, configuration, metrics, what was watched, and
                       the type and shape of every array by its name
    state/             the arrays, as orbax writes them

Nothing is believed before its digest is verified. What fails is `Damaged`, in all processes if it
is in one, so that they go on to another checkpoint together.
"""

import concurrent.futures
import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from speech_jax.errors import UserError
from speech_jax.files import parse_json

_DIGESTS = "digests.json"
_RECORD = "record/metadata"
_AVERAGES = "ema/"
_CURE = "Use the configuration that the checkpoint was trained with, or another directory."
_OPTIMIZER = (
    "Only the state of the optimizer is another (of other settings, or of an earlier version): "
    "start a new run, in another directory, from its encoder (config.init.folder)."
)


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names it and the cure."""


class Damaged(Exception):
    """This checkpoint's files are not what was saved: the message says how."""


def read(path: epath.Path, abstract: Any) -> tuple[dict, Any]:
    """Returns the record, and the arrays that `abstract` describes, verified.

    Earlier versions averaged frozen parameters too: what was saved of these averages is left out.

    Raises Damaged in every process if it is damaged for any, and CheckpointError where `abstract`
    asks for other leaves than were saved.
    """
    wanted = named(abstract)
    record = _verified(path)
    averages = any(name.startswith(_AVERAGES) for name in wanted)
    left_out = {
        name
        for name in record["leaves"].keys() - wanted.keys()
        if averages and name.startswith(_AVERAGES) and f"params/{name[len(_AVERAGES) :]}" in wanted
    }
    _check_leaves(path, wanted, {k: v for k, v in record["leaves"].items() if k not in left_out})
    leaves = _together(lambda: _read_leaves(path, wanted))
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
    return record, state


def load(path: epath.Path, under: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the arrays under some names, verified; raises as `read` does."""
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
    return _together(lambda: _read_leaves(path, wanted, on_host=True))


def seal(path: epath.Path, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Reads back what was written: every byte for its digest, and `leaves` as a restore would."""
    digests = _digests(path)
    _read_leaves(path, leaves, on_host=True)
    (path / _DIGESTS).write_text(json.dumps(digests))


# Files and digests.


def _verified(path: epath.Path) -> dict:
    """Returns the record of a checkpoint all of whose files are as they were saved."""
    _together(lambda: _check_files(path) if jax.process_index() == 0 else None)
    return _together(lambda: read_record(path))


def _together(read: Callable[[], Any]) -> Any:
    """Returns read(); raises Damaged in all processes if it does in one, so that none waits."""
    result, failure = None, None
    try:
        result = read()
    except Damaged as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failure is None and failed.any():
            failure = Damaged(f"process {int(failed.argmax())} cannot read it")
    if failure is not None:
        raise failure
    return result


def _digests(path: epath.Path) -> dict[str, str]:
    """Returns {file: SHA-256} for all files of a checkpoint's two items."""
    files = [file for item in ("record", "state") for file in _files(path / item)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
        digests = list(pool.map(_digest, files))
    return {
        str(file.relative_to(path)): digest for file, digest in zip(files, digests, strict=True)
    }


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():  # epath's walk loses the gs:// of a bucket
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _digest(file: epath.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _saved_digests(path: epath.Path) -> dict[str, str]:
    try:
        saved = parse_json((path / _DIGESTS).read_bytes())
        if _RECORD not in saved or not all(isinstance(digest, str) for digest in saved.values()):
            raise ValueError("they are not those of a checkpoint")
    except Exception as error:  # damaged bytes make JSON of any type, or none
        raise Damaged(f"its digests cannot be read ({brief(error)})") from error
    return saved


def _check_files(path: epath.Path) -> None:
    saved = _saved_digests(path)
    try:
        found = _digests(path)
    except OSError as error:
        raise Damaged(f"its files cannot be read ({brief(error)})") from error
    for name, digest in saved.items():
        if found.get(name) != digest:
            raise Damaged(f"{name} has changed since it was saved")


def read_record(path: epath.Path) -> dict:
    """Returns the record, which is parsed only if its bytes are those that were saved."""
    saved = _saved_digests(path)[_RECORD]
    try:
        data = (path / _RECORD).read_bytes()
        if hashlib.sha256(data).hexdigest() != saved:
            raise ValueError("it has changed since it was saved")
        return parse_json(data)
    except (OSError, ValueError) as error:  # or just deleted by the run that wrote it
        raise Damaged(f"its record cannot be read ({brief(error)})") from error


# Arrays: names, types, places.


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
        found = jax.block_until_ready(state_handler(path).restore(path / "state", args=args))
    except Exception as error:  # tensorstore and orbax raise many types
        raise Damaged(f"its arrays cannot be read ({brief(error)})") from error
    return found if on_host else {k: _as_key(found[k], leaf) for k, leaf in wanted.items()}


def _as_key(numbers: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a random key of its data, as which orbax writes it; other arrays as they are."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return numbers
    kind = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(numbers, impl=kind)


def state_handler(path: epath.Path) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of the arrays of a checkpoint that is under `path`."""
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
    asked = {name: signature(leaf) for name, leaf in wanted.items()}
    other = [name for name in asked | dict(saved) if asked.get(name) != saved.get(name)]
    if not other:
        return
    name = other[0]
    if name not in saved:
        what = f"has no {name}: this model needs it"
    elif name not in asked:
        what = f"has {name}, unknown to this model"
    else:
        what = f"has {name} as {saved[name]}, and this model needs {asked[name]}"
    cure = _OPTIMIZER if all(one.startswith("opt_state/") for one in other) else _CURE
    raise CheckpointError(f"Checkpoint {path} {what}. {cure}")


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name, in tree order: {'params/encoder/kernel': leaf}.

    Saved under these names, a checkpoint does not depend on the classes of the containers.
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        raise ValueError('Two leaves of the state have the same name: a key has a "/" in it.')
    return named


def leaves_of(state: Any) -> dict[str, jax.Array]:
    """The leaves of a state by name; raises TypeError for one that is no jax.Array."""
    leaves = named(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name} is a {type(leaf).__name__}: make it a jax.Array to save it.")
    return leaves


def signature(leaf: Any) -> str:
    """The type and shape of an array: 'float32[2,3]'."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def brief(error: Exception) -> str:
    """Returns the error on one line of bounded length: orbax's and tensorstore's run over many."""
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
