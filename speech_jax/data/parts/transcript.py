"""A stand-in until the parts land: a transcript as the ids of a tokenizer."""

import dataclasses
import pathlib

from speech_jax.data import text


@dataclasses.dataclass(frozen=True)
class Transcript:
    tokenizer: text.Tokenizer
    name: str = "labels"

    def save(self, folder: pathlib.Path) -> None:
        self.tokenizer.save(folder / "tokenizer.json")

    @classmethod
    def restore(cls, folder: pathlib.Path) -> "Transcript":
        return cls(text.load_tokenizer(folder / "tokenizer.json"))
