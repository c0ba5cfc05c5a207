"""A workdir as a bundle: the best checkpoint of a run, as it was trained."""

import pathlib

import flax.traverse_util

from speech_jax import experiment, files
from speech_jax.bundle.format import Bundle, with_decoder
from speech_jax.training import checkpoint
from speech_jax.workdir import Workdir


def open_workdir(folder: pathlib.Path) -> Bundle:
    """Opens a workdir, with the settings of the decoder that it was tuned to.

    Raises:
      UserError: it was not trained in, or what it holds is damaged.
    """
    workdir = Workdir(folder)
    config = workdir.recorded()
    if workdir.decoder.exists():
        config = with_decoder(config, files.read_json(workdir.decoder), str(workdir.decoder))
    weights = "ema" if config.train.ema_decay else "params"
    found = checkpoint.load_best(workdir.checkpoints, (weights, "model_state"))
    tree = flax.traverse_util.unflatten_dict(found, sep="/")
    parts = experiment.restore_parts(config, workdir.folder)
    return Bundle(config, parts, tree.get(weights, {}), tree.get("model_state", {}))
