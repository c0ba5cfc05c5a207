"""What a run learns from its data, assumed where there is no data: parts, and batch shapes."""

import math
from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax import experiment, tasks
from speech_jax.data import parts as part_kinds
from speech_jax.data import pipeline
from speech_jax.data.batch import Bucket, Fields
from speech_jax.data.parts import Part
from speech_jax.data.sources import Utterance
from speech_jax.data.text import CharacterTokenizer
from speech_jax.tasks import Task

CHARACTERS = 32  # in the vocabulary
CLASSES = 32
LABELS_PER_SECOND = {"characters": 16, "sentencepiece": 5}


class _Source:
    """Utterances without audio, all as long as training takes them."""

    def __init__(self, config: ConfigDict, count: int):
        labels = config.data.max_seconds * LABELS_PER_SECOND[config.text.tokenizer]
        text = ("ab" * math.ceil(labels))[: math.ceil(labels)]
        tags = {"label": "0"} | {
            settings.tag: text for settings in config.parts.values() if "tag" in settings
        }
        one = Utterance("assumed", config.data.max_seconds, text, tags)
        self.utterances, self.skipped = [one] * count, {}


def make_parts(config: ConfigDict, vocabulary_size: int | None = None) -> dict[str, Part]:
    """The parts of the configured task, as training data of usual speech would make them.

    `vocabulary_size`, the blank included, is that of the configuration if it is None.
    """
    if vocabulary_size is None:
        pieces = config.text.tokenizer == "sentencepiece"
        vocabulary_size = config.text.vocabulary_size if pieces else CHARACTERS
    alphabet = "ab" + "".join(chr(0x4E00 + i) for i in range(max(vocabulary_size - 3, 0)))
    mels = config.features.mels
    unit = {"mean": np.zeros(mels, np.float32), "std": np.ones(mels, np.float32)}
    audio = {
        "sample_rate": config.data.sample_rate,
        "statistics": unit if config.features.normalize == "global" else None,
    }
    settings = {
        "audio": audio,
        "crop": audio | {"longest": config.data.max_seconds},
        "category": {"classes": tuple(str(i) for i in range(CLASSES))},
        "transcript": {"tokenizer": CharacterTokenizer(alphabet)},
    }
    return {
        name: part_kinds.constructor(kind)(name=name, **settings[kind])
        for name, kind in tasks.constructor(config.task.name).parts.items()
    }


def fields_of(parts: Mapping[str, Part]) -> Fields:
    """The arrays of a batch of these parts."""
    return {name: field for part in parts.values() for name, field in part.fields.items()}


def longest_bucket(config: ConfigDict, task: Task, parts: Mapping[str, Part], mesh: Mesh) -> Bucket:
    """The batch shape of the longest utterances at the slowest speed, as a corpus would have it."""
    rows = math.ceil(config.data.batch_seconds / config.data.max_seconds) + mesh.size
    source = _Source(config, rows * config.train.accumulate)
    corpus = pipeline.make_corpus(source, parts, max_speed=max(config.data.speeds))
    return experiment.training_plan(config, corpus, task, mesh).buckets[-1]
