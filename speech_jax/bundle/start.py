"""The encoder that a run starts from: that of an earlier run, or wav2vec2 of Hugging Face."""

import json
import pathlib
import re

import flax.traverse_util
import jax
import numpy as np
from ml_collections import ConfigDict

from speech_jax import evaluate, models
from speech_jax.errors import UserError

# Settings of an encoder that change neither its parameters nor what they mean.
_TRAINING = re.compile(r"drop|mask|gradient|padding|scan|remat|dtype")


class PretrainedError(UserError):
    """A folder that this run cannot start from; the message names what differs."""


def with_encoder(params, state, config: ConfigDict):
    """A task's `params` and `state` (arrays) with the encoder of `config.init.folder` in them.

    That is `params["encoder"]` and, with batch norm, its statistics. The folder is a workdir (its
    best checkpoint, averaged if it was trained so), a model folder or a Hugging Face folder
    (deploy/hf.py).

    Raises:
      PretrainedError: there is no such model, or it is not of `config.model`, naming the setting.
    """
    folder = pathlib.Path(config.init.folder).expanduser()
    if (folder / "checkpoints").is_dir():
        found = evaluate.open_run(folder)
        model, rate = found.config.model, found.config.data.sample_rate
        features = found.config.features
        if found.task.encoder.listens == "waveform":
            features = {"normalize": features.normalize}
    else:
        found = _read_hugging_face(folder)
        model, rate, features = found.encoder, 16_000, {"normalize": found.normalize}
    theirs = {"model": model, "data": {"sample_rate": rate}, "features": features}
    for section, settings in theirs.items():
        _compare(folder, section, settings, config)
    fit = lambda theirs, ours: _fit(folder, theirs["encoder"], ours["encoder"], config.model.scan)
    params = {**params, "encoder": fit(found.params, params)}
    if "batch_stats" in state:
        statistics = fit(found.state["batch_stats"], state["batch_stats"])
        state = {**state, "batch_stats": {"encoder": statistics}}
    return params, state


def _fit(folder, found, ours, scan: bool):
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
    return jax.tree.map(_place, found, ours)


def _place(value, like: jax.Array) -> jax.Array:
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _read_hugging_face(folder):
    try:
        from speech_jax.bundle import huggingface as hf
    except ImportError:
        raise PretrainedError(
            f"reading {folder} needs safetensors: pip install 'speech_jax[hf]' (a workdir of ours "
            "has checkpoints/ in it)"
        ) from None
    return hf.load(folder)


def _compare(folder, section, theirs, config) -> None:
    theirs = json.loads(ConfigDict(theirs).to_json())
    ours = json.loads(config[section].to_json())
    for key, value in theirs.items():
        if not _TRAINING.search(key) and ours.get(key) != value:
            raise PretrainedError(
                f"{folder} has {section}.{key}={value!r}, and this run "
                f"config.{section}.{key}={ours.get(key)!r}: make them equal"
            )
