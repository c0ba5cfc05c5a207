"""A stand-in until the bundle's own format lands: a trained model as plain data."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bundle:
    config: ConfigDict
    parts: dict[str, Any]
    params: dict
    state: dict


def save(bundle: Bundle, folder) -> None:
    with appearing(folder) as partial:
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


@contextlib.contextmanager
def appearing(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A scratch folder that becomes `folder` at the end; nothing is left where that fails."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        for path in (partial, *partial.iterdir()):
            path.chmod((0o777 if path is partial else 0o666) & ~mask)
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | UnicodeError | safetensors.SafetensorError):
            raise UserError(f"cannot write {folder}: {error}") from error
        raise
