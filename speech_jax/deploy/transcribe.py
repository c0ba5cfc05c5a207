"""A trained model that is given a recording and says what it hears."""

import dataclasses
import math
import numbers
import os
import pathlib

import jax
import numpy as np

from speech_jax import bundle
from speech_jax.data import audio, decoders
from speech_jax.data.batch import Bucket, collate
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.sources.pieces import quiet_pieces
from speech_jax.errors import UserError

# Recordings are padded to one of a few lengths, a fourth root of 2 apart, so that few programs are
# compiled; what a model hears does not depend on padding.
_SHORTEST_SECONDS, _STEP = 1.0, 2**0.25
# Longer recordings are heard in pieces: attention takes memory with the square of the length.
_LONGEST_SECONDS = 30.0


class TranscriptionError(UserError):
    """Audio that cannot be transcribed, or a model that cannot do it; the message says why."""


@dataclasses.dataclass(frozen=True)
class Transcription:
    """What was said in a recording that lasts `seconds`."""

    text: str
    seconds: float

    def __str__(self) -> str:
        return self.text


def load(folder: str | os.PathLike) -> "Model":
    """Opens a trained model for use: a workdir, a saved bundle or a folder of Hugging Face.

    Raises:
      UserError: the folder holds no model, or one that gives no text; the message says which.
    """
    return Model(bundle.open(folder))


class Model:
    """A trained model, ready for use. `speech_jax.load` makes one.

    Attributes:
      bundle: the model as plain data.
    """

    def __init__(self, model: bundle.Bundle):
        """Raises TranscriptionError for a model that gives no text."""
        self.bundle = model
        task = model.task()
        labels = model.parts.get("labels")
        if not isinstance(labels, Transcript) or "audio" not in model.parts:
            raise TranscriptionError(
                f"this model is of the task {model.config.task.name!r} and gives no text of audio: "
                "load one that was trained to recognize speech"
            )
        self._labels = labels
        self._fields = model.parts["audio"].fields
        self._predict = jax.jit(task.predict)
        self._params, self._state = jax.device_put((model.params, model.state))

    @property
    def sample_rate(self) -> int:
        """Samples a second of the audio that the model hears."""
        return self.bundle.config.data.sample_rate

    def transcribe(
        self, recording: str | os.PathLike | np.ndarray, sample_rate: int | None = None
    ) -> Transcription:
        """Writes down what is said in a recording.

        Args:
          recording: an audio file of any rate and number of channels; or samples [T] or, with
            channels, [T, C]: floats within -1 and 1, or int16.
          sample_rate: of samples that are given as an array; by default that of the model.

        Raises:
          AudioError: the file cannot be read.
          TranscriptionError: the array is no audio.
        """
        samples = self._samples(recording, sample_rate)
        texts = map(self._text, _cut(samples, self.sample_rate))
        return Transcription(" ".join(filter(None, texts)), len(samples) / self.sample_rate)

    def _text(self, samples: np.ndarray) -> str:
        """What is said in samples int16 [T]."""
        bucket = Bucket(1, (("samples", _padded(len(samples), self.sample_rate)),))
        batch = collate(self._fields, bucket, [(0, {"audio": samples})])
        found = jax.device_get(self._predict(self._params, self._state, batch))
        return self._labels.read({name: rows[0] for name, rows in found.items()})

    def _samples(self, recording, sample_rate: int | None) -> np.ndarray:
        """int16 [T] at the model's rate."""
        if isinstance(recording, (str, os.PathLike)):
            if sample_rate is not None:
                raise TranscriptionError("a file says its own sample rate: leave sample_rate out")
            return audio.decode(str(pathlib.Path(recording).expanduser()), self.sample_rate)
        rate = self.sample_rate if sample_rate is None else sample_rate
        low, high = decoders.RATES
        if not isinstance(rate, numbers.Integral) or not low <= rate <= high:
            raise TranscriptionError(
                f"sample_rate={rate!r} must be a whole number of Hz from {low} to {high}"
            )
        return audio.resample(_to_int16(recording), int(rate), self.sample_rate)


def _to_int16(recording: np.ndarray) -> np.ndarray:
    """int16 [T] of samples of any type and number of channels; TranscriptionError for no audio."""
    try:
        samples = np.asarray(recording)
    except (ValueError, TypeError) as error:  # lists of several lengths; what is on no CPU
        raise TranscriptionError(f"this is no array of samples: {error}") from error
    channels = samples.shape[1] if samples.ndim == 2 else 1
    if samples.ndim not in (1, 2) or not samples.size or channels > len(samples):
        raise TranscriptionError(
            f"samples of shape {list(samples.shape)} are no audio: give [T], or [T, channels] "
            "(transpose what has the channels first)"
        )
    if samples.dtype.newbyteorder("=") != np.int16:
        if not np.issubdtype(samples.dtype, np.floating):
            raise TranscriptionError(
                f"samples of type {samples.dtype} are no audio: give floats within -1 and 1, or "
                "int16"
            )
        if not np.isfinite(samples).all():
            raise TranscriptionError("the samples are not all finite: mend the recording")
        peak = float(np.abs(samples).max())
        if peak > 8:
            raise TranscriptionError(
                f"the samples reach {peak:g}, and floats must be within -1 and 1: divide them by "
                "32768 if they are in units of int16"
            )
        samples = np.clip(np.rint(samples * 32768.0), -32768, 32767)
    if samples.ndim == 2:
        samples = np.rint(samples.astype(np.float32).mean(axis=1))
    return samples.astype(np.int16)


def _cut(samples: np.ndarray, rate: int) -> list[np.ndarray]:
    """The samples in pieces that a model takes, cut where they are quietest."""
    if len(samples) <= _LONGEST_SECONDS * rate:
        return [samples]
    cuts = [
        round(piece.offset * rate) for piece in quiet_pieces("", samples, rate, _LONGEST_SECONDS)
    ]
    return np.split(samples, cuts[1:])


def _padded(length: int, rate: int) -> int:
    """The length that `length` samples are padded to."""
    shortest = _SHORTEST_SECONDS * rate
    steps = max(0, math.ceil(math.log(length / shortest, _STEP) - 1e-9))
    return math.ceil(shortest * _STEP**steps)
