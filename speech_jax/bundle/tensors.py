"""The weights in Hugging Face folders, read without PyTorch; nothing in them is ever run.

What is read is at most a few times as large as the files: no header, shape or stride is believed
before the bytes are there.
"""

import math
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import safetensors

from speech_jax.bundle import schema
from speech_jax.bundle.schema import ModelFolderError, short


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a model by name, of one file or several, safetensors or torch archives."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_torch)):
        if os.path.exists(folder / name):
            return read(folder / name)
        if os.path.exists(folder / f"{name}.index.json"):
            return _read_parts(folder / f"{name}.index.json", read)
    raise ModelFolderError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_parts(index: pathlib.Path, read: Callable) -> dict[str, np.ndarray]:
    found = schema.read(index, {"weight_map": schema.table(schema.TEXT)})
    names = sorted(set(found.get("weight_map", {}).values()))
    if not names:
        raise ModelFolderError(f"{index} names no files: its weight_map is empty or missing")
    tensors = {}
    for name in names:
        if "\0" in name or pathlib.PurePath(name).name != name:
            raise ModelFolderError(
                f"{index} names {short(name)}, which is not a file of its folder"
            )
        part = read(index.parent / name)
        if twice := part.keys() & tensors.keys():
            raise ModelFolderError(f"{index}: tensor {short(min(twice))} is in two of its files")
        tensors |= part
    return tensors


def to_float32(tensor: np.ndarray, name: str, folder: object = "") -> np.ndarray:
    """A tensor as contiguous float32.

    Raises ModelFolderError where it holds no finite numbers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.ascontiguousarray(tensor, np.float32)
    if not np.isfinite(converted).all():
        raise ModelFolderError(
            f"{folder}: tensor {name!r} holds NaN or numbers that float32 cannot hold"
        )
    return converted


# ---- safetensors -------------------------------------------------------------------------------

_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of one file by name, floats of any size."""
    try:
        found = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: is this the whole folder?") from None
    except (OSError, MemoryError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read: {_line(error)}") from error
    tensors = {}
    for name, tensor in found:
        if name.endswith(".num_batches_tracked"):  # an integer; see names.is_unused
            continue
        if tensor["dtype"] not in _SAFETENSORS:
            raise ModelFolderError(
                f"{path}: tensor {short(name)} is of type {tensor['dtype']}, not a float"
            )
        flat = np.frombuffer(tensor["data"], _SAFETENSORS[tensor["dtype"]])
        tensors[name] = flat.reshape(tensor["shape"])
    return tensors


# ---- torch.save --------------------------------------------------------------------------------

_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
}  # fmt: skip


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a torch.save archive. Nothing that the pickle names is imported or called."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path.stat().st_size)
            names = archive.namelist()
            (main,) = (n for n in names if n.count("/") == 1 and n.endswith("/data.pkl"))
            root = main.rpartition("/")[0]
            order = f"{root}/byteorder"
            if order in names and archive.read(order) != b"little":
                raise ModelFolderError("it was saved on a big-endian machine: save it again")
            with archive.open(main) as stream:
                reader = _Unpickler(stream, archive, root)
                tensors = reader.load()
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: is this the whole folder?") from None
    except zipfile.BadZipFile:
        raise ModelFolderError(
            f"{path} is not an archive of torch.save (version 1.6 or newer), or is cut short: "
            f"save the model again, with safe_serialization=True"
        ) from None
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise ModelFolderError(f"{path} is damaged: {_line(error)}") from error
    is_tensor = lambda item: isinstance(item[0], str) and isinstance(item[1], np.ndarray)
    if not isinstance(tensors, dict) or not all(map(is_tensor, tensors.items())):
        raise ModelFolderError(f"{path} does not hold a dict of tensors")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * reader.bytes_read:
        raise ModelFolderError(f"{path}: its tensors are much larger than what it stores")
    return {name: t for name, t in tensors.items() if not name.endswith(".num_batches_tracked")}


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    # torch.save never compresses; entries that overlap, or grow, are somebody's trick.
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise ModelFolderError("it holds compressed or overlapping entries, as torch.save does not")


class _Unpickler(pickle._Unpickler):
    """Builds dicts of arrays and refuses everything else a pickle can ask for.

    It is Python's own reader in Python: the one in C takes memory for whatever number a memo or a
    byte array names. Of its operations there are those that torch.save writes.
    """

    _OPERATIONS = (
        "APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE "
        "EMPTY_DICT EMPTY_LIST EMPTY_TUPLE FRAME GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE "
        "NEWFALSE NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS SHORT_BINUNICODE STACK_GLOBAL STOP "
        "TUPLE TUPLE1 TUPLE2 TUPLE3"
    )
    dispatch: ClassVar = {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (getattr(pickle, name) for name in _OPERATIONS.split())
    }
    # Attributes, of which a state dict has some for torch's eyes alone.
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()

    def __init__(self, stream, archive: zipfile.ZipFile, root: str):
        super().__init__(stream)
        self._archive, self._root, self._storages = archive, root, {}

    @property
    def bytes_read(self) -> int:
        """The size of all storages that were asked for, each counted once."""
        return sum(map(len, self._storages.values()))

    def find_class(self, module: str, name: str) -> Any:
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
        asked = short(f"{module}.{name}")
        raise ModelFolderError(f"the pickle asks for {asked}, which is not run")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in _STORAGES:
            raise ModelFolderError(f"the pickle asks for {short(pid)}, which is not a storage")
        if key not in self._storages:
            self._storages[key] = self._archive.read(f"{self._root}/data/{key}")
        values = np.frombuffer(self._storages[key], _STORAGES[storage])
        if len(values) < count:
            raise ModelFolderError(f"storage {short(key)} is cut short")
        return values


def _strided(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """A view of a storage, strides in elements; it has no more elements than the storage."""
    span = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
    size = math.prod(shape)
    if min((offset, *shape, *strides)) < 0 or size > len(storage) or (size and span > len(storage)):
        raise ModelFolderError("a tensor reaches past its storage")
    steps = tuple(step * storage.itemsize for step in strides)
    return np.ndarray(shape, storage.dtype, storage, offset * storage.itemsize, steps)


def _line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
