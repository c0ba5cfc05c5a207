"""A workdir as a bundle: the best checkpoint of a run, as it was trained."""

import pathlib

import flax.traverse_util

from speech_jax import experiment, files
from speech_jax.bundle.format import Bundle, with_decoder
from speech_jax.training import checkpoint
from speech_jax.workdir import Workdir


def open_workdir(folder: pathlib.Path) -> Bundle:
    """Opens a workdir, with the factors of LoRA beside the kernels and its decoder as tuned.

    Raises:
      UserError: it was not trained in, or what it holds is damaged.
    """
    workdir = Workdir(folder)
    config = workdir.recorded()
    if workdir.decoder.exists():
        config = with_decoder(config, files.read_json(workdir.decoder), workdir.decoder)
    # Averages, where they are kept, are of what is not frozen.
    kinds = ("params", "model_state") + (("ema",) if config.train.ema_decay else ())
    found = checkpoint.load_best(workdir.checkpoints, kinds)
    averages = {name for name in found if name.startswith("ema/")}
    found |= {f"params{name.removeprefix('ema')}": found.pop(name) for name in averages}
    tree = flax.traverse_util.unflatten_dict(found, sep="/")
    parts = experiment.restore_parts(config, workdir.folder)
    return Bundle(config, parts, tree.get("params", {}), tree.get("model_state", {}))
