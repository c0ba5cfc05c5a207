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


def with_encoder(params, config: ConfigDict):
    """`params` (arrays, {"encoder": ..., ...}) with the encoder of `config.init.folder`.

    The folder is a workdir (its best checkpoint, averaged if it was trained so), a model folder or
    a Hugging Face folder (deploy/hf.py). Running statistics of batch norm start anew.

    Raises:
      PretrainedError: there is no such model, or it is not of `config.model`, naming the setting.
    """
    folder = pathlib.Path(config.init.folder).expanduser()
    if (folder / "checkpoints").is_dir():
        run = evaluate.open_run(folder)
        _compare(folder, "model", run.config.model, config)
        if run.task.encoder.frontend == "log_mel":
            _compare(folder, "features", run.config.features, config)
        encoder = run.params["encoder"]
    else:
        model = _read_hugging_face(folder)
        _compare(folder, "model", model.encoder, config)
        encoder = model.params["encoder"]
    encoder = models.stack_layers(encoder) if config.model.scan else models.unstack_layers(encoder)
    old, new = (
        flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params["encoder"], encoder)
    )
    for name in sorted(old.keys() | new.keys()):
        shapes = [tree[name].shape if name in tree else None for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise PretrainedError(
                f"{folder}: parameter {name} has the shape {shapes[1]}, and config.model asks for "
                f"{shapes[0]}"
            )
    return {**params, "encoder": jax.tree.map(_place, encoder, params["encoder"])}


def _place(value, like: jax.Array) -> jax.Array:
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _read_hugging_face(folder):
    try:
        from speech_jax.deploy import hf
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
