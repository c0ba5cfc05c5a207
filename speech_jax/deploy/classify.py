"""A trained classifier that is given recordings and says which class they are of.

A recording is heard whole; a longer one than the model has learned from is heard in pieces, whose
probabilities are averaged by their length.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from speech_jax import bundle
from speech_jax.data import audio
from speech_jax.data.parts.category import Category
from speech_jax.deploy.acoustic import FILES, path_of
from speech_jax.deploy.inputs import File, open_recording, padded
from speech_jax.errors import UserError

# The longest piece is what the model has learned from, but within these seconds.
_LONGEST_SECONDS = (10.0, 30.0)


class ClassifierError(UserError):
    """A model that names no classes, or audio that has none; the message says why."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """The class of a recording that lasts `seconds`.

    Attributes:
      classes: (name, probability) of every class, the most probable first.
    """

    seconds: float
    classes: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.classes[0][0]

    @property
    def probability(self) -> float:
        """That of the most probable class."""
        return self.classes[0][1]


def is_classifier(model: bundle.Bundle) -> bool:
    """Whether a model names the class of audio."""
    return isinstance(model.parts.get("target"), Category) and "audio" in model.parts


def open_classifier(path: str | os.PathLike) -> "Classifier":
    """Opens a classifier.

    Raises:
      UserError: there is no model at `path`, or one that names no classes; the message says which.
    """
    path = path_of(path)
    if path.suffix.lower() in FILES:
        raise ClassifierError(
            f"{path} is an exported recognizer and names no classes: python -m "
            "speech_jax.transcribe writes down what is said"
        )
    return Classifier(bundle.open(path))


class Classifier:
    """A trained classifier, ready for use. `speech_jax.load` makes one."""

    def __init__(self, model: bundle.Bundle):
        """Raises ClassifierError for a model that names no classes."""
        if not is_classifier(model):
            raise ClassifierError(
                f"this model is of the task {model.config.task.name!r} and names no classes: "
                "python -m speech_jax.transcribe writes down what is said, where it was trained to "
                "recognize speech"
            )
        self.sample_rate: int = model.config.data.sample_rate
        self.classes: tuple[str, ...] = model.parts["target"].classes
        low, high = _LONGEST_SECONDS
        longest = min(max(float(model.config.data.max_seconds), low), high)
        self._longest = round(longest * self.sample_rate)
        # One that compares voices knows the classes of its training all the same.
        task = dataclasses.replace(model.task(), verify=False)
        self._unusable = task.unusable
        self._params, self._state = jax.device_put((model.params, model.state))
        self._predict = jax.jit(functools.partial(_probabilities, task))

    def classify(
        self, recording: File | np.ndarray, sample_rate: int | None = None
    ) -> Classification:
        """The class of a recording of any length.

        Args:
          recording: an audio file, or an open one, of any rate and number of channels; or samples
            [T] or, with channels, [T, C]: floats within -1 and 1, or int16.
          sample_rate: of samples that are given as an array; by default that of the model.

        Raises:
          UserError: it cannot be read, is digital silence, or is too short.
        """
        name, opened = open_recording(recording, sample_rate, self.sample_rate)
        return self._classify(name, opened, lambda samples: None)

    def classify_all(
        self,
        recordings: Iterable[File],
        progress: Callable[[float, float], None] = lambda files, seconds: None,
    ) -> Iterator[Classification | UserError]:
        """Yields what `classify` returns or raises for each file.

        `progress` is told how many files and how many seconds of audio were heard.
        """
        heard = 0
        for number, recording in enumerate(recordings):

            def tell(samples: int, number: int = number) -> None:
                nonlocal heard
                heard += samples
                progress(number, heard / self.sample_rate)

            try:
                yield self._classify(*open_recording(recording, None, self.sample_rate), tell)
            except UserError as error:
                yield error
            progress(number + 1, heard / self.sample_rate)

    def transcribe(self, *_: Any, **__: Any) -> None:
        """Raises ClassifierError: a classifier gives no text."""
        raise ClassifierError(
            "this model names the class of a recording and gives no text: use classify, or load "
            "one that was trained to recognize speech"
        )

    def _classify(self, name: str, opened: Any, tell: Callable[[int], None]) -> Classification:
        total, heard, samples, peak = 0.0, 0, 0, 0
        with opened as (blocks, _):
            for piece in _pieces(blocks, self._longest):
                samples += len(piece)
                peak = max(peak, int(np.abs(piece.astype(np.int32)).max(initial=0)))
                if not self._unusable({"samples": np.asarray([len(piece)])}):
                    total = total + len(piece) * self._heard(piece)
                    heard += len(piece)
                tell(len(piece))
        seconds = samples / self.sample_rate
        if not samples:
            raise audio.AudioError(f"{name}: holds no samples")
        if not peak:
            raise ClassifierError(
                f"{name}: digital silence, every sample is 0: check the recording"
            )
        if not heard:
            raise ClassifierError(
                f"{name}: {seconds:.4f} s of sound, too short for a class: check the recording"
            )
        shares = total / heard
        order = np.argsort(-shares, kind="stable")
        ranked = tuple((self.classes[place], float(shares[place])) for place in order)
        return Classification(seconds, ranked)

    def _heard(self, piece: np.ndarray) -> np.ndarray:
        """Probabilities float32 [K] of samples int16 [T]."""
        row = np.zeros((1, padded(len(piece), self.sample_rate)), np.int16)
        row[0, : len(piece)] = piece
        length = np.asarray([len(piece)], np.int32)
        return jax.device_get(self._predict(self._params, self._state, row, length))[0]


def _probabilities(task: Any, params: Any, state: Any, samples: Any, lengths: Any) -> jax.Array:
    batch = {"audio": samples, "audio_length": lengths}
    return task.predict(params, state, batch)["probabilities"]


def _pieces(blocks: Iterable[np.ndarray], longest: int) -> Iterator[np.ndarray]:
    """Blocks of samples as pieces of `longest` samples, of which the last may be shorter."""
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        while sum(map(len, waiting)) >= longest:
            joined = np.concatenate(waiting)
            yield joined[:longest]
            waiting = [joined[longest:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)
