"""A workdir as a bundle: the best checkpoint of a run, as it was trained."""

import pathlib

import flax.traverse_util

from speech_jax import experiment
from speech_jax.bundle.format import Bundle
from speech_jax.training import checkpoint
from speech_jax.workdir import Workdir


def open_workdir(folder: pathlib.Path) -> Bundle:
    """Opens a workdir.

    Raises:
      UserError: it was not trained in, or what it holds is damaged.
    """
    workdir = Workdir(folder)
    config = workdir.recorded()
    weights = "ema" if config.train.ema_decay else "params"
    found = checkpoint.load_best(workdir.checkpoints, (weights, "model_state"))
    tree = flax.traverse_util.unflatten_dict(found, sep="/")
    parts = experiment.restore_parts(config, workdir.folder)
    return Bundle(config, parts, tree.get(weights, {}), tree.get("model_state", {}))
