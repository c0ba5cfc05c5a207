"""The encoder that a run starts from: that of any bundle."""

import json
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from ml_collections import ConfigDict

from speech_jax import bundle, files, models
from speech_jax.bundle.format import place
from speech_jax.errors import UserError
from speech_jax.workdir import Workdir

# Settings of an encoder that change neither its parameters nor what they mean.
_TRAINING = re.compile(r"drop|mask|gradient|padding|scan|remat|dtype")


class PretrainedError(UserError):
    """A folder that this run cannot start from; the message names what differs."""


def with_encoder(params: Any, state: Any, config: ConfigDict) -> tuple[Any, Any]:
    """A task's `params` and `state` (arrays) with the encoder of `config.init.folder` in them.

    That is `params["encoder"]` and, with batch norm, its statistics.

    Raises:
      PretrainedError: there is no such model, or it is not of `config.model`, naming the setting.
    """
    folder = files.expand(config.init.folder)
    found = bundle.open(folder)
    theirs = found.config
    settings = {
        "model": theirs.model,
        "data": {"sample_rate": theirs.data.sample_rate},
        "features": theirs.features,
    }
    if models.listens(theirs.model.name) == "waveform":
        settings["features"] = {"normalize": theirs.features.normalize}
    for section, values in settings.items():
        _compare(folder, section, values, config)
    fit = lambda theirs, ours: _fit(folder, theirs["encoder"], ours["encoder"], config.model.scan)
    params = {**params, "encoder": fit(found.params, params)}
    if "batch_stats" in state:
        statistics = fit(found.state["batch_stats"], state["batch_stats"])
        state = {**state, "batch_stats": {**state["batch_stats"], "encoder": statistics}}
    return params, state


def start_from(config: ConfigDict, folder: str) -> None:
    """Sets `config` to start from the encoder of a model: its settings, and what it hears.

    Raises:
      UserError: there is no model in the folder.
    """
    path = files.expand(folder)
    run = Workdir(path)
    theirs = run.recorded() if run.config.exists() and run.checkpoints.is_dir() else None
    theirs = theirs or bundle.open(path).config
    config.init.folder = str(folder)
    config.model = theirs.model
    config.features = theirs.features
    config.data.sample_rate = theirs.data.sample_rate


def _fit(folder: pathlib.Path, found: Any, ours: Any, scan: bool) -> Any:
    """What was found in a folder, placed and stacked as ours."""
    found = models.stack_layers(found) if scan else models.unstack_layers(found)
    old, new = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (ours, found))
    for name in sorted(old.keys() | new.keys()):
        shapes = [tree[name].shape if name in tree else None for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise PretrainedError(
                f"{folder}: parameter {name} has the shape {shapes[1]}, and config.model asks for "
                f"{shapes[0]}"
            )
    return jax.tree.map(
        lambda value, like: place(np.asarray(value, like.dtype), like.sharding), found, ours
    )


def _compare(folder: pathlib.Path, section: str, theirs: Any, config: ConfigDict) -> None:
    theirs = json.loads(ConfigDict(theirs).to_json())
    ours = json.loads(config[section].to_json())
    for key, value in theirs.items():
        if not _TRAINING.search(key) and ours.get(key) != value:
            raise PretrainedError(
                f"{folder} has {section}.{key}={value!r}, and this run "
                f"config.{section}.{key}={ours.get(key)!r}: make them equal"
            )
