"""Tasks, a part, a source and evaluators that speech_jax does not know: all of them are here.

Each learns next to nothing with a handful of numbers; they prove that the walls hold. `register`
puts them into the tables, as a line in each table would.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax import tasks
from speech_jax.data import parts, sources
from speech_jax.data.batch import Field, Fields
from speech_jax.data.sources import Source, Utterance
from speech_jax.evaluators import Row
from speech_jax.evaluators.errors import Errors
from speech_jax.ops.masking import length_mask

TABLES = {
    "tasks": {
        name.lower(): f"new_tasks:{name}" for name in ("Spell", "Watch", "Sort", "Say", "Verify")
    },
    "parts": {"frames": "new_tasks:Frames"},
    "sources": {"pictured": "new_tasks:open_pictured"},
}


def register() -> None:
    """A line in each table."""
    tasks.TASKS.update(TABLES["tasks"])
    parts.PARTS.update(TABLES["parts"])
    sources.SOURCES.update(TABLES["sources"])


# ---- Data --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A manifest whose tag `video` names an array of frames, where there is one."""

    audio: Source
    folder: pathlib.Path

    @property
    def utterances(self):
        return self.audio.utterances

    @property
    def skipped(self):
        return self.audio.skipped

    def open(self, index: int, stream: str = "audio"):
        if stream == "video":
            return str(self.folder / self.utterances[index].tags["video"])
        return self.audio.open(index)


def open_pictured(root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path) -> Pictured:
    audio = sources.open_source("manifest", root=root, split=split, on_error=on_error, cache=cache)
    return Pictured(audio, pathlib.Path(root))


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frames of four pixels, uint8 [frames, 4], so many a second; none where there is no video."""

    name: str = "video"
    rate: float = 10.0

    count = 0
    stretched = ()
    longest = float("inf")

    @property
    def fields(self) -> Fields:
        return {self.name: Field("uint8", ("frames", 4))}

    @classmethod
    def make(cls, source: Source, name: str, **settings: Any) -> Self:
        del source
        return cls(name, **settings)

    @classmethod
    def restore(cls, folder: pathlib.Path, name: str, **settings: Any) -> Self:
        del folder
        return cls(name, **settings)

    def save(self, folder: pathlib.Path) -> None:
        """Nothing is learned."""

    def for_evaluation(self) -> Self:
        return self

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        seen = "video" in utterance.tags
        return {"frames": math.ceil(utterance.duration * self.rate) if seen else 0}

    def load(self, source: Source, index: int, rng: np.random.Generator, speed: float):
        del rng, speed
        longest = self.sizes(source.utterances[index])["frames"]
        return {self.name: np.load(source.open(index, "video"))[:longest]} if longest else {}

    def read(self, row: Mapping[str, np.ndarray]) -> str:
        return f"{row[f'{self.name}_length']} frames"


# ---- Tasks -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """What the five share: every parameter is a `kernel`, there is no state, all can be used."""

    counts: Mapping[str, int]
    width: int = 4

    along: ClassVar = "samples"
    rules: ClassVar = ((r"kernel", ()),)

    def unusable(self, sizes):
        return {}

    def figures(self, sums):
        return {"loss": sums["loss"] / max(sums["weight"], 1.0)}

    def check(self, figures, step):
        pass


def _kernels(rng: jax.Array, **shapes: tuple[int, ...]):
    keys = jax.random.split(rng, len(shapes))
    return {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }, {}


def _mean(values: jax.Array, lengths: jax.Array) -> jax.Array:
    """The mean of values [B, N, D] over each row's own length: [B, D]; 0 of nothing."""
    valid = length_mask(lengths, values.shape[1])[:, :, None]
    count = jnp.maximum(lengths, 1).astype(jnp.float32)[:, None]
    return jnp.where(valid, values, 0.0).sum(1) / count


def _heard(batch) -> jax.Array:
    """How loud and how high an utterance is: [B, 2], about 0 to 1."""
    wave = batch["audio"].astype(jnp.float32)[:, :, None] / 32768.0
    change = jnp.abs(jnp.diff(wave, axis=1, prepend=wave[:, :1]))
    return 4.0 * _mean(jnp.concatenate([jnp.abs(wave), change], -1), batch["audio_length"])


def _embedded(params, batch, name: str) -> jax.Array:
    """The mean embedding [B, D] of a text."""
    return _mean(params[name]["kernel"][batch[name]], batch[f"{name}_length"])


def _surprise(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of logits [..., K] and targets [...]."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -chosen[..., 0]


class Spell(_Task):
    """Text to audio: the first samples of each label; buckets are along the labels."""

    parts: ClassVar = {"labels": "transcript", "audio": "audio"}
    along: ClassVar = "labels"
    best: ClassVar = ("distance", "min")
    samples: ClassVar = 32  # for each label

    def init(self, rng, batch):
        return _kernels(rng, labels=(self.counts["labels"], self.samples))

    def _waveform(self, params, batch):
        """[B, labels * samples], full scale is 1, and its lengths."""
        spoken = params["labels"]["kernel"][batch["labels"]]
        return spoken.reshape(len(spoken), -1), self.samples * batch["labels_length"]

    def loss(self, params, state, batch, rng=None, step=0):
        wave, lengths = self._waveform(params, batch)
        count = min(wave.shape[1], batch["audio"].shape[1])
        target = batch["audio"][:, :count].astype(jnp.float32) / 32768.0
        lengths = jnp.minimum(lengths, batch["audio_length"])
        error = _mean(jnp.square(wave[:, :count] - target)[:, :, None], lengths)[:, 0]
        return (error * batch["weight"]).sum(), batch["weight"].sum(), {"state": state, "sums": {}}

    def predict(self, params, state, batch):
        wave, lengths = self._waveform(params, batch)
        wave = jnp.clip(jnp.round(wave * 32768.0), -32768.0, 32767.0).astype(jnp.int16)
        return {"audio": wave, "audio_length": lengths}

    def evaluator(self, parts):
        return Distance(parts["audio"])


class Watch(_Task):
    """Audio, video frames and a context, each of which may be missing, to a class."""

    parts: ClassVar = {
        "audio": "audio",
        "video": "frames",
        "context": "transcript",
        "target": "category",
    }
    best: ClassVar = ("accuracy", "max")

    def init(self, rng, batch):
        pixels, width = batch["video"].shape[-1], self.width
        head = (2 + pixels + width, self.counts["target"])
        return _kernels(rng, context=(self.counts["context"], width), head=head)

    def _logits(self, params, batch):
        seen = _mean(batch["video"].astype(jnp.float32) / 255.0, batch["video_length"])
        told = _embedded(params, batch, "context")
        return jnp.concatenate([_heard(batch), seen, told], -1) @ params["head"]["kernel"]

    def loss(self, params, state, batch, rng=None, step=0):
        known = jnp.where(batch["target"] >= 0, batch["weight"], 0.0)
        nats = _surprise(self._logits(params, batch), jnp.maximum(batch["target"], 0))
        return (nats * known).sum(), known.sum(), {"state": state, "sums": {}}

    def predict(self, params, state, batch):
        return {"target": self._logits(params, batch).argmax(-1)}

    def evaluator(self, parts):
        return Accuracy(parts["target"])


class Sort(_Task):
    """Audio to the class of an utterance."""

    parts: ClassVar = {"audio": "audio", "target": "category"}
    best: ClassVar = ("accuracy", "max")

    def init(self, rng, batch):
        return _kernels(rng, body=(2, self.width), head=(self.width, self.counts["target"]))

    def _embedding(self, params, batch):
        return jnp.tanh(_heard(batch) @ params["body"]["kernel"])

    def _logits(self, params, batch):
        return self._embedding(params, batch) @ params["head"]["kernel"]

    loss = Watch.loss
    predict = Watch.predict
    evaluator = Watch.evaluator


class Verify(Sort):
    """As `Sort` in training; what is measured are distances of pairs of utterances."""

    best: ClassVar = ("eer", "min")

    def predict(self, params, state, batch):
        return {"embedding": self._embedding(params, batch)}

    def evaluator(self, parts):
        return EqualErrors(parts["target"].tag)


class Say(_Task):
    """Audio and its transcript to the labels of a translation, one for one."""

    parts: ClassVar = {"audio": "audio", "labels": "transcript", "target": "transcript"}
    best: ClassVar = ("wer", "min")

    def init(self, rng, batch):
        count = self.counts["target"]
        return _kernels(rng, labels=(self.counts["labels"], count), audio=(2, count))

    def _logits(self, params, batch):
        heard = (_heard(batch) @ params["audio"]["kernel"])[:, None]
        words = params["labels"]["kernel"][batch["labels"]]
        return words + jnp.broadcast_to(heard, words.shape)

    def loss(self, params, state, batch, rng=None, step=0):
        logits = self._logits(params, batch)
        count = min(logits.shape[1], batch["target"].shape[1])
        lengths = jnp.minimum(batch["labels_length"], batch["target_length"])
        valid = length_mask(lengths, count).astype(jnp.float32) * batch["weight"][:, None]
        nats = _surprise(logits[:, :count], batch["target"][:, :count])
        return (nats * valid).sum(), valid.sum(), {"state": state, "sums": {}}

    def predict(self, params, state, batch):
        return {
            "target": self._logits(params, batch)[..., 1:].argmax(-1) + 1,
            "target_length": batch["labels_length"],
        }

    def evaluator(self, parts):
        return Errors(parts["target"])


# ---- Evaluators --------------------------------------------------------------------------------


class Distance:
    """The mean squared difference of waveforms, over what both have."""

    rates: ClassVar = ("distance",)

    def __init__(self, part):
        self._part, self._sum, self._count = part, 0.0, 0

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        count = min(int(row["audio_length"]) for row in (example, prediction))
        one, two = (row["audio"][:count] / 32768.0 for row in (example, prediction))
        self._sum += float(np.square(one - two).sum())
        self._count += count
        return {"text": utterance.text, "said": self._part.read(prediction)}

    def results(self) -> dict[str, float | None]:
        return {"distance": self._sum / self._count if self._count else None}

    def line(self) -> str:
        return f"distance {self._sum / self._count:.4f}" if self._count else "nothing was said"


class Accuracy:
    """The share of utterances whose class is found, of those that have a known one."""

    rates: ClassVar = ("accuracy",)

    def __init__(self, part):
        self._part, self._right, self._known = part, 0, 0

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        known = int(example["target"]) >= 0
        self._known += known
        self._right += known and int(example["target"] == prediction["target"])
        return {"is": self._part.read(example), "found": self._part.read(prediction)}

    def results(self) -> dict[str, float | None]:
        return {
            "accuracy": self._right / self._known if self._known else None,
            "known": self._known,
        }

    def line(self) -> str:
        return f"{self._right} of {self._known} classes"


class EqualErrors:
    """The equal error rate of all pairs of utterances, which it keeps: those of one tag belong."""

    rates: ClassVar = ("eer",)

    def __init__(self, tag: str):
        self._tag = tag
        self._rows: list[tuple[str, np.ndarray]] = []

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        who, embedding = utterance.tags.get(self._tag, ""), np.asarray(prediction["embedding"])
        self._rows.append((who, embedding))
        return {"who": who, "embedding": embedding.tolist()}

    def results(self) -> dict[str, float | None]:
        return {"eer": equal_error_rate(self._rows), "pairs": math.comb(len(self._rows), 2)}

    def line(self) -> str:
        found = equal_error_rate(self._rows)
        return "too few pairs" if found is None else f"EER {100 * found:.1f}%"


def equal_error_rate(rows: list[tuple[str, np.ndarray]]) -> float | None:
    """The smallest larger one of both error rates, over thresholds of the distance."""
    pairs = [
        (one[0] == two[0], float(np.linalg.norm(one[1] - two[1])))
        for number, one in enumerate(rows)
        for two in rows[:number]
    ]
    same = np.asarray([distance for belongs, distance in pairs if belongs])
    other = np.asarray([distance for belongs, distance in pairs if not belongs])
    if not len(same) or not len(other):
        return None
    thresholds = [-1.0, *sorted(distance for _, distance in pairs)]
    return float(min(max((same > t).mean(), (other <= t).mean()) for t in thresholds))
