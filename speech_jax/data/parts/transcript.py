"""A text of an utterance as label ids."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from speech_jax.data import text
from speech_jax.data.batch import Field, Fields, length_key
from speech_jax.data.parts import PartError
from speech_jax.data.sources import Source, Utterance


@dataclasses.dataclass(frozen=True)
class Transcript:
    """Label ids int32 [N] of what was said, or of another text in a tag of the utterance.

    Attributes:
      tokenizer: text to ids and back (data/text.py).
      tag: the tag that holds the text, such as `translation`; empty for the transcript.
      strict: whether a text with unknown characters is refused; else it has no labels.
    """

    tokenizer: text.Tokenizer
    name: str = "labels"
    tag: str = ""
    strict: bool = True

    stretched = ()
    longest = float("inf")

    @property
    def fields(self) -> Fields:
        return {self.name: Field("int32", (self.name,))}

    @property
    def count(self) -> int:
        return self.tokenizer.vocabulary_size

    @classmethod
    def make(
        cls,
        source: Source,
        name: str,
        *,
        tokenizer: str,
        normalizer: str,
        vocabulary_size: int,
        tag: str = "",
    ) -> Self:
        texts = [_text(utterance, tag) for utterance in source.utterances]
        if not any(texts):
            what = f"the tag {tag!r}" if tag else "a transcript"
            there = sorted({key for one in source.utterances for key in one.tags})
            tags = f" (tags are {', '.join(there) or 'none'})" if tag else ""
            first = f"; the first is {source.utterances[0].id}" if source.utterances else ""
            raise PartError(
                f"no utterance of the training splits has {what}, which config.task needs{tags}"
                f"{first}: add it to the data, name a tag that has text as "
                f"config.parts.{name}.tag, or choose another task"
            )
        try:
            made = text.make_tokenizer(
                tokenizer, texts, normalizer=normalizer, vocabulary_size=vocabulary_size
            )
        except text.TextError as error:
            if not tag:
                raise
            raise PartError(f"config.parts.{name}, of the tag {tag!r}: {error}") from error
        return cls(made, name, tag)

    @classmethod
    def restore(cls, folder: pathlib.Path, name: str, *, tag: str = "", **settings: Any) -> Self:
        del settings  # the tokenizer's file holds them
        path = folder / _file(name)
        if not path.exists():
            raise FileNotFoundError(path)
        return cls(text.load_tokenizer(path), name, tag)

    def save(self, folder: pathlib.Path) -> None:
        self.tokenizer.save(folder / _file(self.name))

    def for_evaluation(self) -> Self:
        return dataclasses.replace(self, strict=False)

    def text(self, utterance: Utterance) -> str:
        """The text of an utterance, normalized as the vocabulary is."""
        return self.tokenizer.normalize(_text(utterance, self.tag))

    def dropped(self, utterances: Iterable[Utterance]) -> Counter[str]:
        """Counts the letters, marks and numbers of texts that the normalizer loses."""
        texts = (_text(utterance, self.tag) for utterance in utterances)
        return text.dropped(texts, self.tokenizer.normalizer)

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        """The number of labels, and of the frames that a CTC alignment of them takes at least.

        Between two equal labels an alignment needs a blank: `NAME_aligned` is labels + repeats.
        """
        labels = self._encode(utterance)
        repeats = int((labels[1:] == labels[:-1]).sum())
        return {self.name: len(labels), f"{self.name}_aligned": len(labels) + repeats}

    def load(
        self, source: Source, index: int, rng: np.random.Generator, speed: float
    ) -> dict[str, np.ndarray]:
        del rng, speed
        return {self.name: self._encode(source.utterances[index])}

    def read(self, row: Mapping[str, np.ndarray]) -> str:
        return self.tokenizer.decode(row[self.name][: row[length_key(self.name)]])

    def _encode(self, utterance: Utterance) -> np.ndarray:
        try:
            return np.asarray(self.tokenizer.encode(_text(utterance, self.tag)), np.int32)
        except text.UnknownCharacterError as error:
            if self.strict:
                raise PartError(f"unknown character: {error}") from error
            return np.zeros(0, np.int32)


def _text(utterance: Utterance, tag: str) -> str:
    return str(utterance.tags.get(tag, "")) if tag else utterance.text


def _file(name: str) -> str:
    return "tokenizer.json" if name == "labels" else f"{name}.tokenizer.json"
