"""What a run starts from: the encoder of any bundle, or all of a model of the same task."""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
from ml_collections import ConfigDict

from speech_jax import bundle, experiment, files, models, rules
from speech_jax.bundle.format import place
from speech_jax.data.parts import Part
from speech_jax.errors import UserError
from speech_jax.training import peft, sharding
from speech_jax.workdir import Workdir

# Settings of an encoder that change neither its parameters nor what they mean.
_TRAINING = re.compile(r"drop|mask|gradient|padding|scan|remat|dtype")


class PretrainedError(UserError):
    """A folder that this run cannot start from; the message names what differs."""


class Start(NamedTuple):
    """What a run takes of a bundle: names of parameters and statistics, and their sizes.

    `differing` are the settings that are not those of the bundle, in a line each.
    """

    folder: pathlib.Path
    taken: dict[str, int]
    new: dict[str, int]
    left_out: dict[str, int]
    differing: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The report, to be read."""
        yield f"starts from {self.folder}: takes {_listed(self.taken)}"
        yield f"new: {_listed(self.new)}"
        yield f"left out: {_listed(self.left_out)}"
        yield from self.differing


def with_bundle(params: Any, state: Any, config: ConfigDict) -> tuple[Any, Any, Start]:
    """A task's `params` and `state` (arrays) with what `config.init` takes of a bundle in them.

    That is `params["encoder"]` and, with batch norm, its statistics; of config.init.take='model',
    everything that the bundle has.

    Raises:
      PretrainedError: there is no such model, it is not of `config.model`, naming the setting, or
        something is there on one side alone or of another shape, and config.init.new does not name
        it.
    """
    folder = files.expand(config.init.folder)
    found = bundle.open(folder)
    differing = tuple(_differences(folder, found.config, config))
    ours, theirs = flat(params, state), flat(found.params, found.state, config.model.get("scan"))
    rules.check_used([(pattern, None) for pattern in config.init.new], params, "init.new")
    wanted = takes(config, theirs)
    taken, new = {}, {}
    for name, value in ours.items():
        if name in wanted and wanted[name].shape == value.shape:
            taken[name] = value.size
        elif _is_new(config, name) or not _asked(config, name) or _is_added(name, wanted):
            new[name] = value.size
        else:
            shape = wanted[name].shape if name in wanted else None
            raise PretrainedError(
                f"{folder}: parameter {_short(name)} has the shape {shape}, and config.model asks "
                f"for {value.shape}: name it in config.init.new to begin it anew"
            )
    left_out = {name: value.size for name, value in theirs.items() if name not in taken}
    for name in left_out:
        if name not in ours and name in wanted:
            raise PretrainedError(
                f"{folder}: parameter {_short(name)} has no place in config.model: name it in "
                "config.init.new to leave it out"
            )
    started = {
        name: place(np.asarray(wanted[name], value.dtype), value.sharding)
        if name in taken
        else value
        for name, value in ours.items()
    }
    tree = flax.traverse_util.unflatten_dict(started, sep="/")
    start = Start(folder, taken, new, left_out, differing)
    # A tree without a leaf, as some states are, is lost in a flat one.
    return {**params, **tree.pop("params")}, {**state, **tree}, start


def takes(config: ConfigDict, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a bundle's parameters and statistics, by name, that `config.init` takes."""
    return {
        name: value
        for name, value in theirs.items()
        if _asked(config, name) and not _is_new(config, name)
    }


def start_from(config: ConfigDict, folder: str, take: str = "encoder") -> None:
    """Sets `config` to start from a model: the encoder's settings, and what it hears.

    With `take` 'model', its task and what it writes too: a run goes on with all of it.

    Raises:
      UserError: there is no model in the folder.
    """
    theirs = settings_of(folder)
    config.init.folder = str(folder)
    config.init.take = take
    config.data.sample_rate = theirs.data.sample_rate
    sections = ("model", "features") + (("task", "text", "parts") if take == "model" else ())
    for section in sections:
        config[section] = theirs[section].copy_and_resolve_references()


def settings_of(folder: str) -> ConfigDict:
    """What a model was trained with; UserError where there is none in the folder."""
    path = files.expand(folder)
    run = Workdir(path)
    if run.config.exists() and run.checkpoints.is_dir():
        return run.recorded()
    return bundle.open(path).config


def parts(config: ConfigDict, folder: pathlib.Path) -> dict[str, Part]:
    """The parts of the bundle that a run goes on from (config.init.take='model'), kept in `folder`.

    Raises:
      PretrainedError: as `with_bundle` does for settings that differ.
      UserError: the folder cannot be written, or the bundle lacks a part.
    """
    origin = files.expand(config.init.folder)
    found = bundle.open(origin)
    tuple(_differences(origin, found.config, config))

    def save() -> None:
        with files.writing(folder):
            for part in found.parts.values():
                part.save(folder)

    sharding.from_first(save)
    return experiment.restore_parts(config, folder)


def flat(params: Any, state: Any, scan: bool | None = None) -> dict[str, Any]:
    """Parameters and statistics by name: 'params/encoder/...', 'batch_stats/encoder/...'.

    The layers of an encoder are kept as `scan` says, or as they are.
    """
    trees = {"params": params, **state}
    if scan is not None:
        kept = models.stack_layers if scan else models.unstack_layers
        trees = {
            name: tree | {"encoder": kept(tree["encoder"])} if "encoder" in tree else tree
            for name, tree in trees.items()
        }
    return flax.traverse_util.flatten_dict(trees, sep="/")


def _asked(config: ConfigDict, name: str) -> bool:
    """Whether a parameter or statistic is of what a run takes from a bundle that has it."""
    return config.init.take == "model" or name.split("/")[1:2] == ["encoder"]


def _is_new(config: ConfigDict, name: str) -> bool:
    return any(rules.matches(pattern, _short(name)) for pattern in config.init.new)


def _is_added(name: str, theirs: Mapping[str, Any]) -> bool:
    """Whether a parameter is of LoRA or an adapter that a bundle has not."""
    return name not in theirs and rules.matches(peft.ADDED, name)


def _short(name: str) -> str:
    return name.removeprefix("params/")


def _listed(sizes: Mapping[str, int]) -> str:
    """Parameters by the first name of their paths: 'encoder (1,523,200), head (3,483)'."""
    found: dict[str, int] = {}
    for name, size in sizes.items():
        first = _short(name).split("/")[0]
        found[first] = found.get(first, 0) + size
    return ", ".join(f"{name} ({size:,})" for name, size in found.items()) or "nothing"


def _differences(folder: pathlib.Path, theirs: ConfigDict, config: ConfigDict) -> Iterator[str]:
    """A line for each setting by which a model that is started from is another one.

    Raises:
      PretrainedError: for the first one, unless config.init.new says that parameters begin anew.
    """
    settings = {
        "model": theirs.model,
        "data": {"sample_rate": theirs.data.sample_rate},
        "features": theirs.features,
    }
    if models.listens(theirs.model.name) == "waveform":
        settings["features"] = {"normalize": theirs.features.normalize}
    if config.init.take == "model":
        settings |= {"task": {"name": theirs.task.name}, "text": theirs.text, "parts": theirs.parts}
    for section, values in settings.items():
        ours = json.loads(config[section].to_json())
        known = json.loads(ConfigDict(values).to_json())
        # First the name: an encoder of another kind has other settings.
        for key, value in sorted(known.items(), key=lambda item: item[0] != "name"):
            added = section == "model" and key == "adapter" and not value
            trains = section == "model" and _TRAINING.search(key)
            if added or trains or ours.get(key) == value:
                continue
            line = (
                f"{folder} has {section}.{key}={value!r}, and this run "
                f"config.{section}.{key}={ours.get(key)!r}"
            )
            if not config.init.new:
                raise PretrainedError(f"{line}: make them equal")
            yield line
