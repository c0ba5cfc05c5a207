"""The hidden states of an utterance, which a frozen encoder made once (speech_jax/hidden.py).

It takes the place of the audio in a batch; no task names it as its part.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from speech_jax import files
from speech_jax.data.batch import Field, Fields
from speech_jax.data.parts import PartError
from speech_jax.data.sources import Source, Utterance

_INDEX, _STATES = "index.json", "states.npy"


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Frames float32 [frames, *sizes] out of folders that `write` wrote, one for each split.

    Attributes:
      folders: that are read; they are mapped into memory when they are asked for.
      sizes_of_frame: the dimensions of a frame.
      rate: frames in a second of audio.
    """

    folders: tuple[pathlib.Path, ...]
    sizes_of_frame: tuple[int, ...]
    rate: float
    name: str = "hidden"

    count = 0
    stretched = ()
    longest = float("inf")

    @property
    def fields(self) -> Fields:
        return {self.name: Field("float32", ("frames", *self.sizes_of_frame))}

    def for_evaluation(self) -> Self:
        return self

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int, int]]:
        """Folder, first frame and frames of each utterance."""
        found = {}
        for number, folder in enumerate(self.folders):
            for name, (first, frames) in files.read_json(folder / _INDEX)["frames"].items():
                found[name] = number, first, frames
        return found

    @functools.cached_property
    def _states(self) -> list[np.ndarray]:
        return [np.load(folder / _STATES, mmap_mode="r") for folder in self.folders]

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        if utterance.id not in self._places:
            raise PartError("not read: its audio has no hidden states")
        return {"frames": self._places[utterance.id][2]}

    def load(
        self, source: Source, index: int, rng: np.random.Generator, speed: float
    ) -> dict[str, np.ndarray]:
        del rng, speed
        folder, first, frames = self._places[source.utterances[index].id]
        return {self.name: np.asarray(self._states[folder][first : first + frames])}

    def read(self, row: Mapping[str, Any]) -> str:
        return f"{row[f'{self.name}_length']} frames"


def shape(folders: Sequence[pathlib.Path]) -> tuple[int, tuple[int, ...]]:
    """(frames in all, the dimensions of one) of what `write` wrote into folders."""
    states = [np.load(folder / _STATES, mmap_mode="r") for folder in folders]
    return sum(map(len, states)), states[0].shape[1:]


def is_there(folder: pathlib.Path) -> bool:
    """Whether `write` came to its end there: the index is written last."""
    return (folder / _INDEX).exists()


def write(folder: pathlib.Path, states: Mapping[str, np.ndarray], order: Sequence[str]) -> None:
    """Writes the states [frames, ...] of utterances by id, those that are there, in an order."""
    order = [name for name in order if name in states]
    frames = np.asarray([len(states[name]) for name in order], int)
    starts = np.cumsum(frames) - frames
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / _STATES, np.concatenate([states[name] for name in order]))
    places = {
        name: [int(first), int(count)]
        for name, first, count in zip(order, starts, frames, strict=True)
    }
    files.write_atomically(folder / _INDEX, files.dump_json({"frames": places}))
