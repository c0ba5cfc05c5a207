"""Models kept as what was trained alone, on a named base: LoRA's factors, adapters, a head.

  python -m speech_jax.bundle.base split RUN SMALL    # what RUN has trained, a few MB
  python -m speech_jax.bundle.base merge SMALL WHOLE  # a model that needs no base any more
  python -m speech_jax.bundle.base merge SMALL WHOLE --base=DIR  # the base is elsewhere by now

A small folder is a saved bundle (bundle/format.py) whose bundle.json names its base: the folder
that the run started from, and a digest of what stood still. `bundle.open` opens it as a whole
model. A base that has changed since is refused.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from speech_jax import bundle, experiment, files
from speech_jax.bundle import runs, start
from speech_jax.bundle.format import Bundle, BundleError, open_saved
from speech_jax.errors import UserError
from speech_jax.training import groups, peft


def split(run: str | os.PathLike) -> Bundle:
    """What a run has trained, and the name of the base that the rest is of.

    Raises:
      UserError: the run froze nothing, or its base is not there or not what it was.
    """
    model = runs.open_workdir(files.expand(run))
    config = model.config
    mask = groups.trainable(model.params, experiment.frozen(config))
    learned, still = groups.split(model.params, mask)
    still = start.flat(still, {})
    still = {name: value for name, value in still.items() if value is not None}
    if not still or not config.init.folder:
        raise BundleError(
            f"{run} trained all of its parameters: there is no base to leave them to, save it whole"
        )
    folder = files.expand(config.init.folder)
    theirs = _taken(bundle.open(folder), config)
    for name, value in still.items():
        if name not in theirs or not np.array_equal(theirs[name], value):
            raise BundleError(
                f"{run} kept {name.removeprefix('params/')} as it was, and {folder} has another: "
                "bring back the base that the run started from, or save the run whole"
            )
    params = flax.traverse_util.flatten_dict(learned, sep="/")
    params = {name: value for name, value in params.items() if value is not None}
    return dataclasses.replace(
        model,
        params=flax.traverse_util.unflatten_dict(params, sep="/"),
        base={"folder": str(folder.absolute()), "digest": digest(still)},
    )


def whole(model: Bundle, folder: pathlib.Path, base: str | os.PathLike | None = None) -> Bundle:
    """A bundle with the parameters of its base, and LoRA in its kernels; others as they are.

    Args:
      folder: where it was opened from.
      base: the folder of its base, if that is not where it was.

    Raises:
      BundleError: the base is not there, or has changed.
    """
    if model.base is None:
        return merged(model)
    try:
        place = files.expand(base or model.base["folder"])
        expected = model.base["digest"]
    except (KeyError, TypeError) as error:
        raise BundleError(f"{folder} names no base ({error!r}): bring it back") from error
    cure = (
        "bring it back, or name another place or a copy: python -m speech_jax.bundle.base merge "
        f"{folder} WHOLE --base=DIR"
    )
    if not place.is_dir():
        raise BundleError(f"{folder} needs its base, and there is no folder {place}: {cure}")
    learned = start.flat(model.params, {})
    theirs = _taken(bundle.open(place), model.config)
    still = {name: value for name, value in theirs.items() if name not in learned}
    if digest(still) != expected:
        raise BundleError(
            f"{place} is not, or no longer, the base that {folder} was trained on (its digest is "
            f"{digest(still)[:12]}, and was {expected[:12]}): {cure}"
        )
    tree = flax.traverse_util.unflatten_dict(still | learned, sep="/")
    return merged(dataclasses.replace(model, params=tree["params"], base=None))


def merged(model: Bundle) -> Bundle:
    """A bundle whose kernels hold what LoRA has learned beside them."""
    lora = peft.LoRA(**model.config.lora)
    if not lora.rank:
        return model
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.lora.rank = 0
    params = jax.tree.map(np.asarray, peft.merged(model.params, lora))
    return dataclasses.replace(model, config=config.lock(), params=params)


def digest(arrays: Mapping[str, Any]) -> str:
    """The SHA-256 of arrays with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        found.update(value.tobytes())
    return found.hexdigest()


def _taken(base: Bundle, config: Any) -> dict[str, np.ndarray]:
    """The parameters of a base that a run takes, by name."""
    found = start.takes(config, start.flat(base.params, {}, config.model.get("scan")))
    return {name: np.asarray(value) for name, value in found.items()}


def main(argv: list[str] | None = None) -> None:
    """The two commands above."""
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.bundle.base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("split", "merge"))
    parser.add_argument("source", help="split: a workdir; merge: a folder that split has written")
    parser.add_argument("target", help="a new folder")
    parser.add_argument("--base", help="merge: where the base is by now")
    arguments = parser.parse_args(argv)
    if arguments.base and arguments.command == "split":
        parser.error("--base is for merge: split finds the base where the run started from it")
    try:
        if arguments.command == "split":
            model = split(arguments.source)
        else:
            folder = files.expand(arguments.source)
            model = whole(open_saved(folder), folder, arguments.base)
        bundle.save(model, arguments.target)
    except UserError as error:
        sys.exit(f"error: {error}")
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"{arguments.target}: {count:,} parameters")


if __name__ == "__main__":
    main()
