"""The class of an utterance: the value of one of its tags."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from absl import logging

from speech_jax import files
from speech_jax.data.batch import Field, Fields
from speech_jax.data.parts import PartError
from speech_jax.data.sources import Source, Utterance

# Classes that a message names.
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Category:
    """The index of the utterance's class, int32; -1 where it is not one of `classes`.

    Attributes:
      classes: names, by their index.
      tag: the tag of an utterance that holds the name.
      unseen: whether splits that are evaluated may hold classes that training did not have.
      strict: whether an utterance without a known class is refused; else its index is -1.
      examples: how many training utterances there were of each class; empty where nobody knows.
    """

    classes: tuple[str, ...]
    name: str = "target"
    tag: str = "label"
    unseen: bool = False
    strict: bool = True
    examples: tuple[int, ...] = ()

    stretched = ()
    longest = float("inf")

    @property
    def fields(self) -> Fields:
        return {self.name: Field("int32", fill=-1)}

    @property
    def count(self) -> int:
        return len(self.classes)

    @classmethod
    def make(
        cls,
        source: Source,
        name: str,
        *,
        tag: str = "label",
        unseen: bool = False,
        on_error: str = "raise",
    ) -> Self:
        """The part with the classes of `source`, in alphabetical order.

        Raises:
          PartError: no utterance has the tag, fewer than two classes are left, or a class has one
            example alone and `on_error` is 'raise'; with 'skip' that class is left out.
        """
        found: dict[str, list[str]] = {}
        for one in source.utterances:
            if one.tags.get(tag, "") != "":
                found.setdefault(str(one.tags[tag]), []).append(one.id)
        if not found:
            there = sorted({key for one in source.utterances for key in one.tags})
            raise PartError(
                f"no utterance of the training splits has the tag {tag!r}, which "
                f"config.parts.{name}.tag names; there are {', '.join(there) or 'no tags'}"
            )
        for value, ids in sorted(found.items()):
            if len(ids) == 1 and on_error == "raise":
                raise PartError(
                    f"utterance {ids[0]} is the only one of the training splits with the {tag} "
                    f"{value!r}: add others, or leave such classes out with on_error='skip'"
                )
            if len(ids) == 1:
                logging.warning(
                    "left out: the %s %r, whose only utterance is %s", tag, value, ids[0]
                )
                del found[value]
        if len(found) < 2:
            raise PartError(
                f"the training splits have {len(found)} {'class' if len(found) == 1 else 'classes'}"
                f" of the tag {tag!r} with two examples or more: a class is chosen out of two at "
                f"least; add others, or name another tag in config.parts.{name}.tag"
            )
        classes = tuple(sorted(found))
        examples = tuple(len(found[value]) for value in classes)
        return cls(classes, name, tag, unseen, examples=examples)

    @classmethod
    def restore(
        cls, folder: pathlib.Path, name: str, *, tag: str = "label", unseen: bool = False
    ) -> Self:
        path = folder / _file(name)
        saved = files.read_sealed(path)
        classes, examples = saved.get("classes"), saved.get("examples", [])
        if (
            not classes
            or not isinstance(classes, list)
            or not all(isinstance(one, str) for one in classes)
            or not isinstance(examples, list)
            or len(examples) not in (0, len(classes))
            or not all(isinstance(one, int) for one in examples)
        ):
            raise PartError(f"{path} holds no class names: bring it back or train anew")
        return cls(tuple(classes), name, tag, unseen, examples=tuple(examples))

    def save(self, folder: pathlib.Path) -> None:
        counted = {"examples": list(self.examples)} if self.examples else {}
        files.write_sealed(folder / _file(self.name), {"classes": list(self.classes), **counted})

    def for_evaluation(self) -> Self:
        return dataclasses.replace(self, strict=not self.unseen)

    def sizes(self, utterance: Utterance) -> dict[str, int]:
        self.index(utterance)
        return {}

    def load(
        self, source: Source, index: int, rng: np.random.Generator, speed: float
    ) -> dict[str, np.ndarray]:
        del rng, speed
        return {self.name: np.asarray(self.index(source.utterances[index]), np.int32)}

    def read(self, row: Mapping[str, Any]) -> str:
        index = int(row[self.name])
        return self.classes[index] if index >= 0 else ""

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    def index(self, utterance: Utterance) -> int:
        """The index of an utterance's class, or -1 where it is not strict about it."""
        value = str(utterance.tags.get(self.tag, ""))
        if value in self._indices:
            return self._indices[value]
        if not self.strict:
            return -1
        if not value:
            raise PartError(f"no {self.tag}: the utterance has no tag {self.tag!r}")
        known = ", ".join(self.classes[:_NAMED])
        if self.count > _NAMED:
            known += f", ... ({self.count} in all)"
        raise PartError(f"unknown {self.tag}: {value!r} is not one of {known}")


def _file(name: str) -> str:
    return f"{name}.classes.json"
