"""What makes logits of samples, wherever it came from: all that transcription asks of a model.

`open_acoustic` opens a workdir, a saved model, a Hugging Face folder, or a file of a kind that
`FILES` lists. A new kind of file is a module and a line in that table.
"""

import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from speech_jax import bundle, experiment, files
from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.decoding.decoder import OF_CTC, Settings, alternatives
from speech_jax.decoding.words import Decoded, Word
from speech_jax.errors import UserError

# Models that are one file: how its name ends -> "module:function" that opens it.
FILES: dict[str, str] = {
    ".onnx": "speech_jax.deploy.exported:open_onnx",
    ".sjx": "speech_jax.deploy.exported:open_sjx",
}
_WANTED = (
    "name a workdir, a saved model, a Hugging Face folder or an exported file "
    f"({' or '.join(reversed(FILES))})"
)


class AcousticError(UserError):
    """A model that gives no text, or a file that is none; the message says why."""


class Acoustic(Protocol):
    """A recognizer up to its logits; one that is not exported may have a `search` besides.

    Attributes:
      sample_rate: of the samples that it hears, in Hz.
      frame_seconds: from one frame of logits to the next.
      longest_seconds: of the utterances that it has learned from; it is heard best up to there.
      transcript: reads label ids (data/parts/transcript.py).
      decoder: settings of the decoder that it came with.
    """

    sample_rate: int
    frame_seconds: float
    longest_seconds: float
    transcript: Transcript
    decoder: Mapping[str, Any]

    def logits(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits of a batch of recordings, each as if it were alone and not padded.

        Args:
          samples: int16 [B, S], padded on the right, a window of the features or longer.
          lengths: int32 [B], samples of each row.

        Returns:
          (float32 [B, T, K], the blank at 0; frames int32 [B]).
        """
        ...


def path_of(path: str | os.PathLike) -> pathlib.Path:
    """The path of a model, a folder or a file of `FILES`; AcousticError where there is neither."""
    path = files.expand(path)
    if not path.exists():
        raise AcousticError(f"{path} does not exist: {_WANTED}")
    if path.suffix.lower() not in FILES and not path.is_dir():
        raise AcousticError(f"{path} is not a model: {_WANTED}")
    return path


def open_acoustic(path: str | os.PathLike) -> Acoustic:
    """Opens a model for transcription.

    Raises:
      UserError: there is no model at `path`, or one that gives no text; the message says which.
    """
    path = path_of(path)
    if opener := FILES.get(path.suffix.lower()):
        module, _, function = opener.partition(":")
        return getattr(importlib.import_module(module), function)(path)
    return BundleAcoustic(bundle.open(path))


class BundleAcoustic:
    """The acoustic model of a bundle.

    Attributes:
      bundle: the model as plain data.
      target: reads translations; None where the model makes none.
      transcribes: whether it also writes what was said, which a translator without CTC, or with
        CTC on its translations, does not.
      function: (params, state, samples, lengths) -> (logits, frames), as `logits` but traceable.
      frames: how many frames come of so many samples.
    """

    def __init__(self, model: bundle.Bundle):
        """Raises AcousticError for a model that gives no text."""
        task = model.task()
        labels = model.parts.get("labels")
        if not isinstance(labels, Transcript) or "audio" not in model.parts:
            cure = "load one that was trained to recognize speech"
            if isinstance(model.parts.get("target"), Category):
                cure = "python -m speech_jax.classify names the class of a recording"
            raise AcousticError(
                f"this model is of the task {model.config.task.name!r} and gives no text of audio: "
                f"{cure}"
            )
        self.bundle = model
        self.transcript = labels
        self.target = model.parts.get(getattr(task, "translates", ""))
        self.transcribes = not self.target or (bool(task.ctc_weight) and not labels.tag)
        self.sample_rate = model.config.data.sample_rate
        self.longest_seconds = float(model.config.data.max_seconds)
        config = model.config
        self.decoder = dict(config.decoder)
        self.decoder |= experiment.decoder_settings(config.task, config.decoder)
        self.frames = lambda samples: task.encoder.output_lengths(task.frontend.lengths(samples))
        self.frame_seconds = experiment.frame_seconds(model.config, task.encoder, task.frontend)
        self._params, self._state = jax.device_put((model.params, model.state))
        self.function = functools.partial(_logits, task)
        self._logits = jax.jit(self.function)

    def logits(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Acoustic says."""
        return jax.device_get(self._logits(self._params, self._state, samples, lengths))

    def translation(
        self, settings: Mapping[str, Any]
    ) -> Callable[[np.ndarray, np.ndarray], list[Decoded]]:
        """What translates the recordings of a batch, which is given as to `logits`.

        Words have the seconds that they would have if they were spoken evenly, and each is as sure
        as the whole. `settings` are of the decoder.

        Raises:
          UserError: this model has no such search.
        """
        search = self.search(settings)

        def translate(samples: np.ndarray, lengths: np.ndarray) -> list[Decoded]:
            found = search(samples, lengths)
            rows = ({name: of[row] for name, of in found.items()} for row in range(len(lengths)))
            return [self._translated(*one) for one in zip(rows, lengths, strict=True)]

        return translate

    def _translated(self, row: Mapping[str, np.ndarray], samples: int) -> Decoded:
        text, score = self.target.read(row), float(row["score"])
        read = lambda labels: self.target.read({"target": labels, "target_length": len(labels)})
        words = _spread(text.split(), float(samples) / self.sample_rate, float(row["sure"]))
        return Decoded(text, words, score, alternatives(row, text, score, read))

    def search(self, settings: Mapping[str, Any]) -> Callable[..., dict[str, np.ndarray]] | None:
        """What finds the text of whole pieces, where no decoder of logits does: the task itself.

        Args:
          settings: of the decoder.

        Returns:
          A function of samples and lengths, as `logits` takes them, that gives what the task
          predicts, a row each; None where the decoder takes logits.

        Raises:
          UserError: this model has no such search.
        """
        name = Settings.of(settings).name
        config = self.bundle.config.copy_and_resolve_references()
        config.decoder.update(settings)
        task = experiment.make_task(config, self.bundle.parts)
        if name in OF_CTC:
            return None
        predict = jax.jit(functools.partial(_predict, task))
        return lambda *audio: jax.device_get(predict(self._params, self._state, *audio))


def _spread(words: list[str], seconds: float, sure: float) -> tuple[Word, ...]:
    """Words over so many seconds, each as long as its letters are many."""
    ends = np.cumsum([0, *map(len, words)]) * seconds / max(sum(map(len, words)), 1)
    return tuple(
        Word(word, float(start), float(end), sure)
        for word, start, end in zip(words, ends[:-1], ends[1:], strict=True)
    )


def _logits(task, params, state, samples, lengths):
    batch = {"audio": samples, "audio_length": lengths}
    logits, frames, _ = task.logits(params, state, batch)
    return logits, frames


def _predict(task, params, state, samples, lengths):
    return task.predict(params, state, {"audio": samples, "audio_length": lengths})
