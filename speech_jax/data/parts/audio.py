"""The audio of an utterance: int16 samples at the model's rate, with statistics of its features."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from absl import logging

from speech_jax import files
from speech_jax.data import audio
from speech_jax.data.batch import Field, Fields
from speech_jax.data.parts import PartError
from speech_jax.data.sources import Source, Utterance

# The largest difference between the length that a source states and that of the decoded audio:
# codecs, resampling and rounded manifests differ by milliseconds, a truncated file by more.
LENGTH_TOLERANCE_SECONDS = 0.1
# Utterances that feature statistics are measured on: enough for two moments.
_MEASURED = 1000

# Samples int16 [T] to (frames, sum over frames [mels], sum of squares [mels]).
Moments = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Files of noise, the fraction of utterances that get it, and the range of ratios in dB."""

    files: tuple[str, ...]
    probability: float
    snr_db: tuple[float, float]


def open_noise(folder: str, *, probability: float, snr_db: tuple[float, float]) -> Noise:
    """Lists the noise files in a folder and below it.

    Raises:
      PartError: the folder is missing or holds no audio files, or the values make no sense.
    """
    low, high = snr_db
    if not 0 <= probability <= 1 or low > high:
        raise PartError(
            "noise needs a probability between 0 and 1 and an ascending range of dB, got "
            f"{probability} and {snr_db}"
        )
    if not os.path.isdir(folder):
        raise PartError(f"noise folder {folder} does not exist")
    found = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
        and os.path.splitext(name)[1].lower().removeprefix(".") in audio.EXTENSIONS
    )
    if not found:
        raise PartError(f"noise folder {folder} holds no audio files")
    return Noise(tuple(found), probability, (low, high))


@dataclasses.dataclass(frozen=True)
class Audio:
    """Samples [T] of the whole utterance, at the speed that the plan says, with noise or without.

    Attributes:
      sample_rate: of the batch, in Hz.
      noise: what is added in training; None for nothing.
      statistics: {"mean", "std"} float32 [mels] over training data, for features that are
        normalized with them; else None.
    """

    name: str = "audio"
    sample_rate: int = 16_000
    noise: Noise | None = None
    statistics: Mapping[str, np.ndarray] | None = None

    count = 0
    longest = float("inf")

    @property
    def fields(self) -> Fields:
        return {self.name: Field("int16", (self._dimension,))}

    @property
    def stretched(self) -> tuple[str, ...]:
        return (self._dimension,)

    @property
    def _dimension(self) -> str:
        return "samples" if self.name == "audio" else f"{self.name}_samples"

    @classmethod
    def make(
        cls,
        source: Source,
        name: str,
        *,
        moments: Moments | None = None,
        known: pathlib.Path | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """The part; with `moments`, feature statistics are taken from `known` or measured.

        Args:
          moments: of the features of an utterance; None where no statistics are wanted.
          known: the folder of a model that the statistics are taken over from, if it has any.
        """
        part = cls(name, **settings)
        if moments is None:
            return part
        statistics = None
        if known is not None:
            with contextlib.suppress(FileNotFoundError):
                statistics = _load_statistics(known / _file(name))
        statistics = statistics or _measure(source, part.sample_rate, moments, seed)
        return dataclasses.replace(part, statistics=statistics)

    @classmethod
    def restore(
        cls,
        folder: pathlib.Path,
        name: str,
        *,
        moments: Moments | None = None,
        known: pathlib.Path | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        del known, seed  # these are for `make`
        statistics = _load_statistics(folder / _file(name)) if moments else None
        return cls(name, statistics=statistics, **settings)

    def save(self, folder: pathlib.Path) -> None:
        if self.statistics:
            lists = {name: np.asarray(values).tolist() for name, values in self.statistics.items()}
            files.write_sealed(folder / _file(self.name), lists)

    def for_evaluation(self) -> Self:
        return dataclasses.replace(self, noise=None)

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        seconds = min(utterance.duration, self.longest)
        samples = int(np.ceil(np.round(seconds * self.sample_rate, 3)))
        if samples < 1:
            raise PartError(f"too short: {utterance.duration:.2f} s")
        return {self._dimension: samples}

    def load(
        self, source: Source, index: int, rng: np.random.Generator, speed: float
    ) -> dict[str, np.ndarray]:
        utterance = source.utterances[index]
        samples = audio.decode(source.open(index), self.sample_rate)
        stated = utterance.duration * self.sample_rate
        if abs(len(samples) - stated) > LENGTH_TOLERANCE_SECONDS * self.sample_rate:
            raise audio.AudioError(
                f"utterance {utterance.id}: its audio lasts {len(samples) / self.sample_rate:.2f} "
                f"s, its source states {utterance.duration:.2f} s; correct the one that is wrong"
            )
        samples = audio.change_speed(self._cut(samples, utterance, rng), speed)
        if self.noise is not None and rng.random() < self.noise.probability:
            file = self.noise.files[rng.integers(len(self.noise.files))]
            extra = _decode_noise(file, self.sample_rate)
            snr_db = rng.uniform(*self.noise.snr_db)
            if len(extra):
                samples = audio.add_noise(samples, extra, snr_db, int(rng.integers(len(extra))))
        return {self.name: samples}

    def _cut(
        self, samples: np.ndarray, utterance: Utterance, rng: np.random.Generator
    ) -> np.ndarray:
        del utterance, rng
        return samples

    def read(self, row: Mapping[str, np.ndarray]) -> str:
        seconds = row[f"{self.name}_length"] / self.sample_rate
        return f"{seconds:.2f} s of audio"


@dataclasses.dataclass(frozen=True)
class Crop(Audio):
    """At most `longest` seconds of an utterance, at another place in each epoch.

    For tasks without transcripts, to which a part of an utterance is as good as the whole.
    """

    longest: float = float("inf")

    def for_evaluation(self) -> Self:
        return dataclasses.replace(self, noise=None, longest=float("inf"))

    def _cut(
        self, samples: np.ndarray, utterance: Utterance, rng: np.random.Generator
    ) -> np.ndarray:
        length = self.sizes(utterance)[self._dimension]
        if len(samples) > length:
            samples = samples[rng.integers(len(samples) - length + 1) :][:length]
        return samples


# White noise beside a large noise corpus: nearly every row would decode minutes of it anew.
@functools.lru_cache(maxsize=64)
def _decode_noise(file: str, sample_rate: int) -> np.ndarray:
    """The samples of a noise; none of one that cannot be read, which costs no speech."""
    try:
        return audio.decode(file, sample_rate)
    except audio.AudioError as error:
        logging.warning("this noise is not used: %s", error)
        return np.zeros(0, np.int16)


def _file(name: str) -> str:
    return "features.json" if name == "audio" else f"{name}.features.json"


def _load_statistics(path: pathlib.Path) -> dict[str, np.ndarray]:
    values = files.read_sealed(path)
    try:
        found = {name: np.asarray(values[name], np.float32) for name in ("mean", "std")}
        good = found["mean"].shape == found["std"].shape and found["mean"].ndim == 1
        good = good and values.keys() == found.keys()  # one by another name may be a seal
        good = good and np.isfinite([*found.values()]).all() and (found["std"] > 0).all()
    except (KeyError, TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise PartError(f"{path} holds no mean and standard deviation of bands: bring it back")
    return found


def _measure(source: Source, rate: int, moments: Moments, seed: int) -> dict[str, np.ndarray]:
    """Mean and standard deviation of features over utterances drawn from `source`."""
    count, total = 0.0, np.zeros((2, 1))
    order = np.random.default_rng(seed).permutation(len(source.utterances))
    for index in order[:_MEASURED]:
        try:
            samples = audio.decode(source.open(int(index)), rate)
        except audio.AudioError:
            continue  # training names it
        frames, first, second = moments(samples)
        count += float(frames)
        total = total + np.stack([first, second]).astype(np.float64)
    if not count:
        raise PartError(
            "no utterance of the training splits can be read, so their features have no mean: "
            "look at the files, or set config.features.normalize='utterance'"
        )
    mean = total[0] / count
    return {
        "mean": mean.astype(np.float32),
        "std": np.sqrt(total[1] / count - mean**2 + 1e-5).astype(np.float32),
    }
