"""Archives of torch.save: nothing in them is run, and they do not grow."""

import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from speech_jax.bundle import tensors
from speech_jax.bundle.schema import ModelFolderError


class Rebuild:
    """What torch.save writes for a tensor."""

    def __init__(self, count, shape, strides, key="0"):
        self.arguments = (Storage(count, key), 0, shape, strides, False, None)


class Storage:
    def __init__(self, count, key):
        self.id = ("storage", Name("torch", "FloatStorage"), key, "cpu", count)


class Name:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Pickler(pickle._Pickler):
    """Names functions that are not there to be named."""

    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Rebuild):
            self.save(Name("torch._utils", "_rebuild_tensor_v2"))
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def archive(path, content, storage=bytes(4_000), how=zipfile.ZIP_STORED):
    if not isinstance(content, bytes):
        with open(path.with_name("data.pkl"), "wb") as stream:
            Pickler(stream, 2).dump(content)
        content = path.with_name("data.pkl").read_bytes()
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("model/data.pkl", content)
        file.writestr("model/data/0", storage)


BOMBS = {
    "a stride of 0": ({"a": Rebuild(1_000, (1 << 30,), (0,))}, {}, "past its storage"),
    "a stride of 0 within": (
        {"a": Rebuild(1_000, (1 << 20, 1_000), (0, 1))},
        {},
        "past its storage",
    ),
    "a storage for all": (
        {f"{i}": Rebuild(1_000, (1_000,), (1,)) for i in range(9)},
        {},
        "much larger than what it stores",
    ),
    "compressed": (
        {"a": Rebuild(1 << 22, (1 << 22,), (1,))},
        {"storage": bytes(1 << 24), "how": zipfile.ZIP_DEFLATED},
        "compressed or overlapping",
    ),
    "an array of bytes": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b".", {}, "is damaged"),
    "a text of billions": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 36) + b".", {}, "is damaged"),
    "a deep list": (
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        {},
        "a dict of tensors",
    ),
    "no dict": ([1, 2], {}, "a dict of tensors"),
    "no tensors": ({"a": 1}, {}, "a dict of tensors"),
    "no names": ({1: Rebuild(10, (10,), (1,))}, {}, "a dict of tensors"),
    "no storage": ({"a": Rebuild(10, (10,), (1,), key="9")}, {}, "is damaged"),
    "a storage that is cut": ({"a": Rebuild(1_001, (10,), (1,))}, {}, "is cut short"),
    "a shape of text": ({"a": Rebuild(10, ("x",), (1,))}, {}, "is damaged"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_an_archive_does_not_grow(case, tmp_path):
    content, more, message = BOMBS[case]
    archive(tmp_path / "pytorch_model.bin", content, **more)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFolderError, match=message) as caught:
            tensors.read_tensors(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(tmp_path / "pytorch_model.bin"))


def test_a_number_in_a_memo_takes_no_memory(tmp_path):
    archive(tmp_path / "pytorch_model.bin", b"\x80\x02}r\xff\xff\xff\x7f.")
    tracemalloc.start()
    try:
        assert tensors.read_tensors(tmp_path) == {}
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_an_archive_of_tensors_is_read(tmp_path):
    """Those above are refused for what is wrong with them."""
    values = np.arange(1_000, dtype=np.float32)
    content = {"a": Rebuild(1_000, (10, 100), (1, 10)), "b": Rebuild(1_000, (2,), (1,))}
    archive(tmp_path / "pytorch_model.bin", content, storage=values.tobytes())
    found = tensors.read_tensors(tmp_path)
    np.testing.assert_array_equal(found["a"], values.reshape(100, 10).T)
    np.testing.assert_array_equal(found["b"], values[:2])


class Malice:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_wants_to_run_code_does_not(tmp_path, protocol):
    witness = tmp_path / "witness"
    for malice in (
        Malice(exec, f"open({str(witness)!r}, 'w')"),
        Malice(open, str(witness), "w"),
        Malice(getattr, "text", "upper"),
    ):
        archive(tmp_path / "pytorch_model.bin", pickle.dumps({"a": malice}, protocol))
        with pytest.raises(ModelFolderError, match="which is not run"):
            tensors.read_tensors(tmp_path)
        assert not witness.exists()


def test_a_tensor_that_reaches_past_its_storage_is_refused():
    storage = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(tensors._strided(storage, 0, (2, 2), (1, 2)), [[0, 2], [1, 3]])
    for offset, shape, strides in ((0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (1, 9))):
        with pytest.raises(ModelFolderError, match="past its storage"):
            tensors._strided(storage, offset, shape, strides)
    with pytest.raises(ModelFolderError, match="past its storage"):
        tensors._strided(storage, 3, (2,), (-1,))
