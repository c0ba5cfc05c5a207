"""A stand-in until the bundle's own format lands: a trained model as plain data."""

import dataclasses
import json
import pathlib
from typing import Any

import flax.traverse_util
import safetensors.numpy
from ml_collections import ConfigDict

from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript


@dataclasses.dataclass(frozen=True)
class Bundle:
    config: ConfigDict
    parts: dict[str, Any]
    params: dict
    state: dict


def save(bundle: Bundle, folder) -> None:
    from speech_jax.bundle import huggingface

    with huggingface.appearing(folder) as partial:
        (partial / "bundle.json").write_text(bundle.config.to_json(), "utf-8")
        tree = {"params": bundle.params, "state": bundle.state}
        safetensors.numpy.save_file(
            flax.traverse_util.flatten_dict(tree, sep="/"), partial / "params.safetensors"
        )
        for part in bundle.parts.values():
            part.save(partial)


def open(folder) -> Bundle:
    from speech_jax.bundle import huggingface, tensors

    folder = pathlib.Path(folder)
    if (folder / "model.json").exists():
        return huggingface.read_model_folder(folder)
    if not (folder / "bundle.json").exists():
        return huggingface.read(folder)
    config = ConfigDict(json.loads((folder / "bundle.json").read_text("utf-8")))
    tree = flax.traverse_util.unflatten_dict(
        tensors.read_safetensors(folder / "params.safetensors"), sep="/"
    )
    parts = {}
    if (folder / "tokenizer.json").exists():
        parts["labels"] = Transcript.restore(folder)
    if (folder / "target.json").exists():
        parts["target"] = Category.restore(folder)
    return Bundle(config, parts, tree["params"], tree.get("state", {}))
