"""Parts: what an utterance brings to a batch. Adding a kind is a file and a line here.

A task names its parts, batch name -> kind, such as {"audio": "audio", "labels": "transcript"}. A
part says which arrays it puts into a batch (`fields`), how long they will be before anything is
loaded (`sizes`), loads them, and reads a prediction of itself back as text (`read`). What must be
learned from training data (a vocabulary, class names, feature statistics) is made once, kept in the
workdir and in bundles by `save`, and found there again by `restore`.
"""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np

from speech_jax import registry
from speech_jax.data.batch import Fields
from speech_jax.data.sources import Source, Utterance
from speech_jax.errors import UserError

PARTS = {
    "audio": "speech_jax.data.parts.audio:Audio",
    "category": "speech_jax.data.parts.category:Category",
    "crop": "speech_jax.data.parts.audio:Crop",
    "transcript": "speech_jax.data.parts.transcript:Transcript",
}


class PartError(UserError):
    """An utterance, or a whole corpus, that lacks what a part needs; the message names it."""


class Part(Protocol):
    """One thing of an utterance. Implementations can be read from any thread."""

    fields: Fields
    # How many symbols a prediction chooses from, the CTC blank included; 0 where there are none.
    count: int
    # The dimensions that get shorter when an utterance is played faster.
    stretched: tuple[str, ...]
    # Seconds of an utterance that are taken at most; what is longer is cropped.
    longest: float

    @classmethod
    def make(cls, source: Source, name: str, **settings: Any) -> Self:
        """The part called `name` in the batch, with what it learns from training data."""
        ...

    @classmethod
    def restore(cls, folder: pathlib.Path, name: str, **settings: Any) -> Self:
        """The part that `save` kept in `folder`; FileNotFoundError where it kept none."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Writes what was learned into `folder`, in files of its own."""
        ...

    def for_evaluation(self) -> Self:
        """The part without what is random, and without what would leave an utterance out."""
        ...

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        """The lengths of its arrays by dimension, and what else the task's `unusable` asks for.

        Raises:
          PartError: the utterance lacks this part. The message begins with the kind of reason and
            a colon.
        """
        ...

    def load(
        self, source: Source, index: int, rng: np.random.Generator, speed: float
    ) -> dict[str, np.ndarray]:
        """The arrays of utterance `index` by field; none for a part that it may lack.

        Raises:
          UserError: they cannot be loaded.
        """
        ...

    def read(self, row: Mapping[str, np.ndarray]) -> str:
        """The text of a row of a batch or of a prediction."""
        ...


def constructor(kind: str) -> type[Part]:
    """The class of a kind of part; an unknown kind is a UserError."""
    module, _, attribute = registry.lookup("part", PARTS, kind).partition(":")
    return getattr(importlib.import_module(module), attribute)
