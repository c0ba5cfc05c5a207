"""The hidden states of an utterance, which a frozen encoder made once (speech_jax/hidden.py).

It takes the place of the audio in a batch; no task names it as its part.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, BinaryIO, Self

import numpy as np

from speech_jax import files
from speech_jax.data.batch import Field, Fields
from speech_jax.data.parts import PartError
from speech_jax.data.sources import Source, Utterance
from speech_jax.errors import UserError

_INDEX, _STATES = "index.json", "states.float32"
# The name of the training data among the folders; others are named by their split.
TRAINING = ""


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Frames float32 [frames, *size] out of a folder that a `Writer` wrote.

    Attributes:
      folders: by the split whose utterances they are of; ids may be anew in each.
      size: the dimensions of a frame.
      rate: frames in a second of audio.
      split: whose folder is read.
    """

    folders: Mapping[str, pathlib.Path]
    size: tuple[int, ...]
    rate: float
    split: str = TRAINING
    name: str = "hidden"

    count = 0
    stretched = ()
    longest = float("inf")

    @property
    def fields(self) -> Fields:
        return {self.name: Field("float32", ("frames", *self.size))}

    def of(self, split: str) -> Self:
        """The part for the utterances of a split."""
        return dataclasses.replace(self, split=split)

    def for_evaluation(self) -> Self:
        return self

    @functools.cached_property
    def _index(self) -> dict[str, Any]:
        return _read(self.folders[self.split])

    @functools.cached_property
    def _states(self) -> np.ndarray:
        shape = (self._index["count"], *self.size)
        if not shape[0]:
            return np.zeros(shape, np.float32)
        return np.memmap(self.folders[self.split] / _STATES, np.float32, "r", shape=shape)

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        if utterance.id not in self._index["frames"]:
            raise PartError(self._index["left_out"].get(utterance.id, "not read: its audio failed"))
        return {"frames": self._index["frames"][utterance.id][1]}

    def load(
        self, source: Source, index: int, rng: np.random.Generator, speed: float
    ) -> dict[str, np.ndarray]:
        del rng, speed
        first, frames = self._index["frames"][source.utterances[index].id]
        return {self.name: np.asarray(self._states[first : first + frames])}

    def read(self, row: Mapping[str, Any]) -> str:
        return f"{row[f'{self.name}_length']} frames"


class Writer:
    """Writes the states of utterances, one after another, to a folder.

    It is a context manager. The folder is there once `finish` is called; what was written until
    then is elsewhere, and removed where that is not.
    """

    def __init__(self, folder: pathlib.Path):
        """Raises UserError, as all methods do, where nothing can be written there."""
        self._folder = folder
        self._scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
        self._frames: dict[str, tuple[int, int]] = {}
        self._count, self._size = 0, ()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        with files.writing(self._folder):
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._file = (self._scratch / _STATES).open("wb")
        return self

    def add(self, name: str, states: np.ndarray) -> None:
        """Adds the states float32 [frames, *size] of the utterance with the id `name`."""
        with files.writing(self._folder):
            self._file.write(np.ascontiguousarray(states, np.float32).data)
        self._frames[name] = self._count, len(states)
        self._count += len(states)
        self._size = states.shape[1:]

    def finish(self, left_out: Mapping[str, str]) -> None:
        """Puts the folder in its place; `left_out` says why other utterances have no states."""
        if not self._frames:
            why = ": ".join(next(iter(left_out.items()), ("it is empty",)))
            raise UserError(f"config.data.cache_hidden: no utterance of a split is read ({why})")
        index = {
            "count": self._count,
            "size": self._size,
            "frames": self._frames,
            "left_out": dict(left_out),
        }
        with files.writing(self._folder):
            self._file.close()
            files.write_atomically(self._scratch / _INDEX, files.dump_json(index))
            try:
                self._scratch.rename(self._folder)
            except OSError:
                if not is_there(self._folder):  # another run may have been faster
                    raise

    def __exit__(self, *_: object) -> None:
        self._file.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def is_there(folder: pathlib.Path) -> bool:
    """Whether a `Writer` came to its end there."""
    return (folder / _INDEX).exists()


def shape(folder: pathlib.Path) -> tuple[int, tuple[int, ...]]:
    """(frames in all, the dimensions of one) of what a `Writer` wrote."""
    index = _read(folder)
    return index["count"], tuple(index["size"])


def _read(folder: pathlib.Path) -> dict[str, Any]:
    index = files.read_json(folder / _INDEX)
    size = 4 * index["count"] * int(np.prod(index["size"]))
    states = folder / _STATES
    if not states.exists() or states.stat().st_size != size:
        raise UserError(f"{folder} is damaged: remove it, and its states are computed anew")
    return index
