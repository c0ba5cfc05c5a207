"""The bundle: a model's configuration, parts, parameters and state; opening and saving one.

A saved bundle is a folder with

    bundle.json         {"version": 1, "config": the whole configuration}; version 2 has a "base"
                        too, which the parameters that are not here are of (bundle/base.py)
    params.safetensors  parameters and model state by path: "params/encoder/...", "state/..."
    tokenizer.json, features.json, ...   what its parts have learned (data/parts/)
    decoder-NAME        the files of its decoder: a language model, a list of words
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax import config as defaults
from speech_jax import experiment, files, tasks
from speech_jax.data.parts import Part
from speech_jax.decoding.decoder import Settings
from speech_jax.errors import UserError
from speech_jax.tasks import Task
from speech_jax.training import sharding

VERSION = 2
DESCRIPTION, _PARAMETERS = "bundle.json", "params.safetensors"
# Settings of the decoder that are paths.
FILES = ("lm", "lexicon")


class BundleError(UserError):
    """A folder that is not a model, or one that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained model as plain data.

    Attributes:
      config: the configuration that it was trained with, whole.
      parts: what its batches are made of, by name.
      params, state: nested dicts of numpy arrays; averaged parameters, if it was trained so.
      base: what the other parameters are of, in a folder that holds those that were trained alone.
    """

    config: ConfigDict
    parts: Mapping[str, Part]
    params: dict[str, Any]
    state: dict[str, Any]
    base: Mapping[str, Any] | None = None

    def task(self) -> Task:
        """The task, ready to be called with `params` and `state`."""
        return experiment.make_task(self.config, self.parts)


def save(model: Bundle, folder: str | os.PathLike) -> None:
    """Writes a bundle as a folder, which appears whole or not at all.

    Raises:
      BundleError: the folder is there already and not empty, or cannot be written.
    """
    tree = {"params": model.params, "state": model.state}
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    described = {"version": 1, "config": files.plain(model.config)}
    if model.base:
        described |= {"version": VERSION, "base": dict(model.base)}
    with appearing(folder) as partial:
        described["config"]["decoder"] |= keep_files(model.config.decoder, partial)
        files.write_atomically(partial / DESCRIPTION, files.dump_json(described))
        safetensors.numpy.save_file(tensors, partial / _PARAMETERS)
        for part in model.parts.values():
            part.save(partial)


def open_saved(folder: pathlib.Path) -> Bundle:
    """Opens what `save` wrote; BundleError where it is damaged or of a newer version."""
    if not (folder / DESCRIPTION).exists():
        raise BundleError(f"{folder} holds no {DESCRIPTION}: name a folder of a saved model")
    described = files.read_json(folder / DESCRIPTION)
    version = described.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise BundleError(
            f"{folder} is a model of version {version!r}, and this speech_jax reads up to "
            f"{VERSION}: install a newer one (pip install --upgrade speech_jax)"
        )
    if not isinstance(described.get("config"), dict):
        raise BundleError(f"{folder / DESCRIPTION} holds no configuration: bring the folder back")
    config = defaults.completed(described["config"], str(folder / DESCRIPTION))
    own = {key: config.decoder[key] for key in FILES if config.decoder[key]}
    config = with_decoder(config, own, folder / DESCRIPTION)
    try:
        tensors = safetensors.numpy.load_file(folder / _PARAMETERS)
    except (OSError, safetensors.SafetensorError) as error:
        raise BundleError(f"{folder / _PARAMETERS} cannot be read: {error}") from error
    tree = flax.traverse_util.unflatten_dict(tensors, sep="/")
    return Bundle(
        config,
        experiment.restore_parts(config, folder, whole=False),
        tree.get("params", {}),
        tree.get("state", {}),
        described.get("base"),
    )


# Task -> parameters, where a model has them, that are as long in a dimension as a part has symbols,
# and by so many more: (path, dimension, more, part).
_HEADS = {
    "attend": (("head/kernel", -1, 0, "labels"), ("decoder/output/kernel", -1, 1, "labels")),
    "recognize": (("head/kernel", -1, 0, "labels"),),
    "transduce": (("head/kernel", -1, 0, "labels"), ("predictor/embedding", 0, 0, "labels")),
    "translate": (("head/kernel", -1, 0, "labels"), ("decoder/output/kernel", -1, 1, "target")),
    "classify": (("classifier/kernel", -1, 0, "target"),),
}


def checked(model: Bundle, folder: pathlib.Path) -> Bundle:
    """The model; BundleError where a part has not the symbols that the head was trained for."""
    params = flax.traverse_util.flatten_dict(model.params, sep="/")
    for head, dimension, more, name in _HEADS.get(model.config.task.name, ()):
        if head not in params or name not in model.parts:
            continue
        trained, kept = np.shape(params[head])[dimension] - more, model.parts[name].count
        if trained != kept:
            raise BundleError(
                f"{folder}: what it keeps of {name!r} has {kept} symbols, and the model's head was "
                f"trained for {trained}: bring back the file that it had (tokenizer.json, of "
                "labels)"
            )
    return model


def kept_name(path: str | os.PathLike) -> str:
    """What a decoder's file is called beside its model."""
    return f"decoder-{files.expand(path).name.removeprefix('decoder-')}"


def keep_files(decoder: Mapping[str, Any], folder: pathlib.Path) -> dict[str, str]:
    """Copies a decoder's files into a model's folder; their names there by setting."""
    kept = {}
    for key in FILES:
        if decoder.get(key):
            path = files.expand(decoder[key])
            kept[key] = kept_name(path)
            if path != folder / kept[key]:
                (folder / kept[key]).write_bytes(path.read_bytes())
    return kept


def with_decoder(
    config: ConfigDict, settings: Mapping[str, Any], where: pathlib.Path
) -> ConfigDict:
    """A configuration with other settings of the decoder, which were found in a file.

    Files that they name are in its folder, unless their names say otherwise.

    Raises:
      UserError: they are no such settings.
    """
    try:
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
        given |= {key: str(where.parent / given[key]) for key in FILES if given.get(key)}
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.decoder.update(given)
        return defaults.completed(files.plain(changed), str(where))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise BundleError(f"{where} holds no settings of a decoder: {error}") from error


# Sections that say how, on what and where a model is used; all others are as it was trained, but
# for what a task names as `of_use`.
_OF_USE = ("data", "decoder", "mesh", "robustness")
# Settings of the data that belong to a model, not to what it is used on.
_OWN = ("sample_rate", "max_seconds")


def of_use(key: str, task: str) -> bool:
    """Whether `for_use` takes a setting such as 'data.root' of the configuration it is given.

    `task` is the name of the model's task.
    """
    section, _, name = key.partition(".")
    if section == "task":
        return name in tasks.of_use(task)
    return section in _OF_USE and not (section == "data" and name in _OWN)


def for_use(model: Bundle, config: ConfigDict) -> ConfigDict:
    """The configuration to use a model with: its own, on the data and mesh that `config` names.

    What `config.decoder` says goes before what the model's own does.

    Raises:
      BundleError: `config` is for another task or encoder.
      DecoderError: a file of the decoder is not there.
    """
    for section in ("task", "model"):
        theirs, ours = model.config[section].name, config[section].name
        if theirs != ours:
            raise BundleError(
                f"this model was trained with config.{section}.name={theirs!r}, and --config says "
                f"{ours!r}: name the recipe that it was trained with"
            )
    merged = model.config.copy_and_resolve_references()
    with merged.unlocked():
        for section in ("mesh", "robustness"):
            merged[section] = config[section]
        given = {key: value for key, value in config.decoder.items() if value is not None}
        merged.decoder.update(given)
        kept = {key: merged.data[key] for key in _OWN}
        merged.data = config.data.copy_and_resolve_references()
        merged.data.update(kept)
        asked = (key for key in tasks.of_use(merged.task.name) if key in config.task)
        merged.task.update({key: config.task[key] for key in asked})
    Settings.of(merged.decoder).check_files()
    return merged.lock()


def on_mesh(model: Bundle, mesh: Mesh) -> tuple[Any, Any]:
    """(parameters, model state) on the devices: parameters as the task's rules say, state whole."""
    split = sharding.shard_params(model.params, mesh, model.task().rules)
    whole = sharding.replicated(mesh)
    return jax.tree.map(place, model.params, split), jax.tree.map(
        lambda x: place(x, whole), model.state
    )


def place(value: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array of the host on the devices."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


@contextlib.contextmanager
def appearing(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A scratch folder that becomes `folder` at the end; nothing is left where that fails.

    Raises:
      BundleError: the folder is there already and not empty, or cannot be written.
    """
    folder = files.expand(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder} exists and is not empty: name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error}") from error
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        for path in (partial, *partial.iterdir()):  # safetensors gives its files to their owner
            path.chmod((0o777 if path is partial else 0o666) & ~umask)
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | UnicodeError | safetensors.SafetensorError):
            raise BundleError(f"cannot write {folder}: {error}") from error
        raise
