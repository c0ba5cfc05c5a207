"""A workdir as a bundle: the best checkpoint of a run, as it was trained."""

import pathlib
from typing import Any

import jax
import numpy as np

from speech_jax import experiment
from speech_jax.bundle.format import Bundle
from speech_jax.data.batch import Bucket, size_names
from speech_jax.training import checkpoint, sharding
from speech_jax.workdir import Workdir


def open_workdir(folder: pathlib.Path) -> Bundle:
    """Opens a workdir.

    Raises:
      UserError: it was not trained in, or what it holds is damaged.
    """
    workdir = Workdir(folder)
    config = workdir.recorded()
    parts = experiment.make_parts(config, folder)
    task = experiment.make_task(config, parts)
    fields = {name: field for part in parts.values() for name, field in part.fields.items()}
    # A second of everything: what is initialized from it does not depend on how long it is.
    bucket = Bucket(1, tuple((name, config.data.sample_rate) for name in size_names(fields)))
    mesh = sharding.make_mesh()
    probe = experiment.batch_shapes(fields, bucket, mesh)
    shapes = jax.eval_shape(task.init, jax.random.key(0), probe)
    weights = "ema" if config.train.ema_decay else "params"
    abstract = dict(zip((weights, "model_state"), shapes, strict=True))
    whole = sharding.replicated(mesh)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), abstract
    )
    found = checkpoint.restore_best(workdir.checkpoints, placed).state
    return Bundle(config, parts, _to_host(found[weights]), _to_host(found["model_state"]))


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), tree)
