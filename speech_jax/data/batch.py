"""What a batch is: the one place that says which arrays it has, and how rows become arrays.

A batch is a dict of numpy arrays with a row for each utterance, padded on the right:

    audio int16 [B, samples], audio_length int32 [B], labels int32 [B, labels], labels_length int32
    [B], ... as the parts of the task say, and always
    weight float32 [B], 0 for a filler row, and index int32 [B], the utterance's index in its
    source, -1 for a filler row.

The training step, initialization, preflight and benchmarks ask for `shapes`; the loader makes
batches with `collate`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# What the loader gives for one utterance: its arrays by field, without padding.
Example = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch.

    Attributes:
      dtype: a numpy dtype by name.
      sizes: the dimensions behind the rows: names of padded ones, which a bucket gives a size, and
        numbers. If the first is a name, the batch also holds each row's own length along it, as
        NAME_length int32 [B].
      fill: what padding, filler rows and rows without this part hold.
    """

    dtype: str
    sizes: tuple[str | int, ...] = ()
    fill: float = 0

    @property
    def has_length(self) -> bool:
        """Whether rows have lengths of their own."""
        return bool(self.sizes) and isinstance(self.sizes[0], str)


Fields = Mapping[str, Field]

_ROW: Fields = {"weight": Field("float32"), "index": Field("int32", fill=-1)}
_LENGTH = Field("int32")


class Bucket(NamedTuple):
    """The shape of a batch: `rows` utterances, and how long each named dimension is."""

    rows: int
    sizes: tuple[tuple[str, int], ...]

    def size(self, name: str) -> int:
        """The length of the dimension `name`."""
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        return f"{self.rows} rows of " + " and ".join(f"{size} {name}" for name, size in self.sizes)


def length_key(name: str) -> str:
    """The key of the rows' own lengths of a field."""
    return f"{name}_length"


def size_names(fields: Fields) -> tuple[str, ...]:
    """The named dimensions of `fields`, each once."""
    named = (size for field in fields.values() for size in field.sizes if isinstance(size, str))
    return tuple(dict.fromkeys(named))


def shapes(fields: Fields, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of every array of a batch."""
    return {
        name: (_shape(field, bucket), np.dtype(field.dtype)) for name, field in _all(fields).items()
    }


def collate(
    fields: Fields, bucket: Bucket, rows: Sequence[tuple[int, Example] | None]
) -> dict[str, np.ndarray]:
    """Makes a batch of examples.

    Args:
      rows: (index in the source, arrays by field) of each row, None for a filler row. An array that
        is longer than the bucket is cut; a field that an example lacks has the length 0.
    """
    batch = {
        name: np.full(_shape(field, bucket), field.fill, field.dtype)
        for name, field in _all(fields).items()
    }
    for row, content in enumerate(rows):
        if content is None:
            continue
        index, example = content
        batch["weight"][row] = 1
        batch["index"][row] = index
        for name in fields.keys() & example.keys():
            into = batch[name][row]
            if fields[name].has_length:
                array = example[name][: len(into)]
                into[tuple(map(slice, array.shape))] = array
                batch[length_key(name)][row] = len(array)
            else:
                batch[name][row] = example[name]
    return batch


def signature(batch: Mapping[str, Any]) -> tuple:
    """What tells the shapes of two batches apart, whatever share of the rows they hold."""
    return tuple(sorted((name, array.shape[1:]) for name, array in batch.items()))


def _all(fields: Fields) -> dict[str, Field]:
    whole = {}
    for name, field in fields.items():
        whole[name] = field
        if field.has_length:
            whole[length_key(name)] = _LENGTH
    return whole | _ROW


def _shape(field: Field, bucket: Bucket) -> tuple[int, ...]:
    sizes = (bucket.size(size) if isinstance(size, str) else size for size in field.sizes)
    return (bucket.rows, *sizes)
