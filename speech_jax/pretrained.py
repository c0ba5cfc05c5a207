"""The encoder that a run starts from: that of an earlier run, or wav2vec2 of Hugging Face."""

import json
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from speech_jax import checkpoint, models
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
    folder = pathlib.Path(config.init.folder)
    if (folder / "checkpoints").is_dir():
        encoder = _from_workdir(folder, config)
    else:
        encoder = _from_hugging_face(folder, config)
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


def _from_workdir(folder, config) -> dict[str, Any]:
    try:
        source = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{folder / 'config.json'} cannot be read: {error}") from error
    _compare(folder, "model", source["model"], config)
    encoder = models.make_encoder(**source["model"])
    inputs = jax.ShapeDtypeStruct((1, config.data.sample_rate), jnp.float32)
    if encoder.frontend == "log_mel":
        _compare(folder, "features", source["features"], config)
        inputs = jax.ShapeDtypeStruct((1, 100, config.features.mels), jnp.float32)
    shapes = jax.eval_shape(
        lambda x, n: encoder.init(jax.random.key(0), x, n, True)["params"],
        inputs,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    prefix = "ema" if source["train"]["ema_decay"] else "params"
    return checkpoint.restore_params(
        str(folder / "checkpoints"), {"encoder": abstract}, prefix=prefix
    )["encoder"]


def _from_hugging_face(folder, config) -> dict[str, Any]:
    try:
        from speech_jax.deploy import hf
    except ImportError:
        raise PretrainedError(
            f"reading {folder} needs safetensors: pip install 'speech_jax[hf]' (a workdir of ours "
            "has checkpoints/ in it)"
        ) from None
    model = hf.load(folder)
    _compare(folder, "model", model.encoder, config)
    return model.params["encoder"]


def _compare(folder, section, theirs, config) -> None:
    ours = json.loads(config[section].to_json())
    for key, value in theirs.items():
        value = list(value) if isinstance(value, tuple) else value
        if not _TRAINING.search(key) and ours.get(key) != value:
            raise PretrainedError(
                f"{folder} has {section}.{key}={value!r}, and this run "
                f"config.{section}.{key}={ours.get(key)!r}: make them equal"
            )
