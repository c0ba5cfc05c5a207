"""JSON of other programs, checked: tables of what may stand under which key.

A schema is {key: Kind}. Keys that it does not name hold what they like, and keys that are absent
are not missed: who needs one has a default for it.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from speech_jax import files
from speech_jax.errors import UserError

_MOST_BYTES = 16 << 20
_DEEPEST = 50  # nested lists and objects: what is written again must not exhaust the stack


class ModelFolderError(UserError):
    """A folder that cannot be converted; the message names the file or key at fault."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    """An integer from `low` to `high`, no boolean."""
    return Kind(
        f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high
    )


def several(kind: Kind, least: int = 1, most: int = 1 << 16) -> Kind:
    """A list of `least` to `most` values of a kind."""
    return Kind(
        f"a list of {least} to {most} values, each {kind.words}",
        lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(kind.fits, x)),
    )


def table(kind: Kind) -> Kind:
    """An object with values of a kind."""
    return Kind(
        f"an object of values, each {kind.words}",
        lambda x: isinstance(x, dict) and all(map(kind.fits, x.values())),
    )


def one_of(*values: Any) -> Kind:
    """One of a few values."""
    return Kind(" or ".join(map(json.dumps, values)), lambda x: x in values)


def optional(kind: Kind) -> Kind:
    """A value of a kind, or null."""
    return Kind(f"null or {kind.words}", lambda x: x is None or kind.fits(x))


TEXT = Kind("a text", lambda x: isinstance(x, str))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))


def read(path: pathlib.Path, schema: Mapping[str, Kind]) -> dict[str, Any]:
    """The JSON object in a file, of the schema; it can be written again.

    Raises:
      ModelFolderError: it is missing, damaged, too large, no object, or not of the schema.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelFolderError(f"{path} is larger than {_MOST_BYTES >> 20} MiB: is it JSON?")
        values = files.read_json(path)
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: is this the folder of a model?") from None
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise ModelFolderError(str(error)) from error
    check(path, values, schema)
    return values


def check(where: object, values: dict[str, Any], schema: Mapping[str, Kind]) -> None:
    """Raises ModelFolderError, which begins with `where`, for values that are not of the schema."""
    if _depth(values) > _DEEPEST:
        raise ModelFolderError(f"{where} is nested deeper than {_DEEPEST} levels")
    for key, kind in schema.items():
        if key in values and not kind.fits(values[key]):
            raise ModelFolderError(
                f"{where}: {key}={short(values[key])} is not supported: it must be {kind.words}"
            )
    if lone := re.search("[\ud800-\udfff]", json.dumps(values, ensure_ascii=False)):
        raise ModelFolderError(
            f"{where} holds {lone[0]!r}, half of a character, which UTF-8 cannot write"
        )


def short(value: Any) -> str:
    """A value in an error: its first characters, on one line."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = []
        for values in level:
            if isinstance(values, list | dict):
                inner += values.values() if isinstance(values, dict) else values
        level = inner
    return depth
