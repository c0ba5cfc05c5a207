"""A trained model as plain data. Everything that uses a model takes a bundle and nothing else.

bundle.open(folder)        a workdir, a saved bundle, or a Hugging Face folder
bundle.save(model, folder) a folder that stands for itself

What was trained on a frozen base can be kept alone, and opens as a whole: see bundle/base.py.
"""

import os

from speech_jax import files
from speech_jax.bundle.format import (
    DESCRIPTION,
    Bundle,
    BundleError,
    checked,
    for_use,
    keep_files,
    of_use,
    on_mesh,
    open_saved,
    save,
)

__all__ = [
    "Bundle",
    "BundleError",
    "for_use",
    "keep_files",
    "of_use",
    "on_mesh",
    "open",
    "save",
]


def open(folder: str | os.PathLike) -> Bundle:
    """Opens a workdir (its best checkpoint), a saved bundle, or a Hugging Face folder.

    What LoRA has learned is in the kernels, as in any other model.

    Raises:
      UserError: there is no model in the folder, or it is damaged or of a newer version.
    """
    # Not before: `python -m speech_jax.bundle.huggingface` imports this package, then itself.
    from speech_jax.bundle import base, huggingface, runs

    folder = files.expand(folder)
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {why}: name a workdir, a saved model or a Hugging Face folder")
    if (folder / DESCRIPTION).exists():
        return checked(base.whole(open_saved(folder), folder), folder)
    if (folder / "checkpoints").is_dir():
        return checked(base.merged(runs.open_workdir(folder)), folder)
    if (folder / "model.json").exists():
        return huggingface.read_model_folder(folder)
    if (folder / "config.json").exists():
        if {"task", "train"} <= files.read_json(folder / "config.json").keys():  # ours
            raise BundleError(
                f"{folder} is a workdir without checkpoints: train there first, or bring its "
                "checkpoints/ back"
            )
        return huggingface.read(folder)
    raise BundleError(
        f"{folder} holds no model: a workdir has checkpoints/, a saved model {DESCRIPTION}, a "
        "Hugging Face folder config.json and weights"
    )
