"""The weights in Hugging Face folders, read without PyTorch; nothing in them is ever run."""

import json
import math
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from speech_jax.errors import UserError


class ModelFolderError(UserError):
    """A folder that cannot be converted; the message names the file or key at fault."""


def read_json(path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: is this the folder of a model?") from None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error


def read_tensors(folder) -> dict[str, np.ndarray]:
    """The tensors of a model by name: safetensors, in one file or several, or a torch archive."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(pathlib.Path(name).name != name for name in names):
            raise ModelFolderError(f"{index} names a file outside its folder")
        parts = [read_safetensors(folder / name) for name in names]
        return {name: value for part in parts for name, value in part.items()}
    if (folder / "pytorch_model.bin").exists():
        return _read_torch(folder / "pytorch_model.bin")
    raise ModelFolderError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read_safetensors(path) -> dict[str, np.ndarray]:
    """The tensors of one file by name, floats of any size."""
    try:
        found = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error
    tensors = {}
    for name, tensor in found:
        if name.endswith(".num_batches_tracked"):  # an integer; see hf_names.is_unused
            continue
        if tensor["dtype"] not in _SAFETENSORS:
            raise ModelFolderError(
                f"{path}: tensor {name!r} is of type {tensor['dtype']}, not a float"
            )
        flat = np.frombuffer(tensor["data"], _SAFETENSORS[tensor["dtype"]])
        tensors[name] = flat.reshape(tensor["shape"])
    return tensors


_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
}  # fmt: skip


def _read_torch(path) -> dict[str, np.ndarray]:
    """The tensors of a torch.save archive. Nothing that the pickle names is imported or called."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            (main,) = (n for n in names if n.count("/") == 1 and n.endswith("/data.pkl"))
            root = main.rpartition("/")[0]
            order = f"{root}/byteorder"
            if order in names and archive.read(order) != b"little":
                raise ModelFolderError(f"{path} was saved on a big-endian machine: save it again")
            with archive.open(main) as stream:
                tensors = _Unpickler(stream, archive, root).load()
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {error}") from None
    except zipfile.BadZipFile:
        raise ModelFolderError(
            f"{path} is not an archive of torch.save (version 1.6 or newer), or is cut short: "
            f"save the model again, with safe_serialization=True"
        ) from None
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise ModelFolderError(f"{path} is damaged: {error}") from error
    is_array = lambda tensor: isinstance(tensor, np.ndarray)
    if not isinstance(tensors, dict) or not all(map(is_array, tensors.values())):
        raise ModelFolderError(f"{path} does not hold a dict of tensors")
    return dict(tensors)


class _Unpickler(pickle.Unpickler):
    """Builds dicts of arrays and refuses everything else a pickle can ask for."""

    def __init__(self, stream, archive, root):
        super().__init__(stream)
        self._archive, self._root = archive, root

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _strided(
                storage, offset, shape, strides
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return name
        raise ModelFolderError(f"the pickle asks for {module}.{name}, which is not run")

    def persistent_load(self, pid):
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in _STORAGES:
            raise ModelFolderError(f"the pickle asks for {pid!r}, which is not a tensor's storage")
        values = np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), _STORAGES[storage])
        if len(values) < count:
            raise ModelFolderError(f"storage {key} is cut short")
        return values


def _strided(storage, offset, shape, strides):
    span = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
    if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and span > len(storage)):
        raise ModelFolderError("a tensor reaches past its storage")
    steps = tuple(step * storage.itemsize for step in strides)
    return np.ndarray(shape, storage.dtype, storage, offset * storage.itemsize, steps).copy()
