"""Portions of a split by name, such as 'train-clean-5[:60%]' and 'train-clean-5[60%:]'.

A corpus that comes without a split for a task is cut in the configuration: no file is written, and
the portions of a split never overlap. What must stay together (the utterances of a chapter, or of a
speaker) does, and what must be in every portion (each speaker, each class) is, as far as there is
enough of it. What could not be read has no tags: it is counted in one portion, by its name.
"""

import bisect
import dataclasses
import re
from collections.abc import Callable, Sequence

from speech_jax.data.sources.base import Source, SourceError, Utterance, select

_NAME = re.compile(r"(?P<split>.+)\[(?P<low>\d{1,3}%)?:(?P<high>\d{1,3}%)?\]")


def parse(name: str) -> tuple[str, float, float]:
    """(split, from, to) of a name: 'dev[20%:]' is ('dev', 0.2, 1.0), 'dev' is ('dev', 0.0, 1.0).

    Raises:
      SourceError: percentages that are not a portion.
    """
    found = _NAME.fullmatch(name)
    if not found:
        return name, 0.0, 1.0
    low = float((found["low"] or "0%")[:-1]) / 100
    high = float((found["high"] or "100%")[:-1]) / 100
    if not low < high <= 1:
        raise SourceError(
            f"{name} is not a portion of {found['split']}: write, for example, [20%:80%]"
        )
    return found["split"], low, high


def portion(
    source: Source, low: float, high: float, *, within: str = "", together: str = ""
) -> Source:
    """The utterances between two shares of a source, in the order of their ids.

    Args:
      within: a tag; each of its values is cut alone, so that it is in every portion.
      together: a tag; utterances of one value go to one portion. Where there is but one value to be
        cut (a speaker with one chapter), its utterances are cut, one after the other.
    """
    if (low, high) == (0.0, 1.0):
        return source
    utterances = source.utterances
    for tag in filter(None, (within, together)):
        if utterances and not any(tag in utterance.tags for utterance in utterances):
            known = sorted({name for utterance in utterances for name in utterance.tags})
            raise SourceError(
                f"no utterance has the tag {tag!r} that a portion is to be cut by; there are "
                f"{', '.join(known) or 'none'}"
            )
    order = sorted(range(len(utterances)), key=lambda index: utterances[index].id)
    chosen: list[int] = []
    for group in _groups(order, lambda index: _value(utterances[index], within)):
        units = _groups(group, lambda index: _value(utterances[index], together))
        if not together or len(units) == 1:
            units = [[index] for index in group]
        for place, unit in enumerate(units):
            if low <= (place + 0.5) / len(units) < high:
                chosen += unit
    part = select(source, sorted(chosen))
    return dataclasses.replace(part, skipped=_skipped(source, order, low, high))


def _skipped(source: Source, order: Sequence[int], low: float, high: float) -> dict[str, str]:
    """What a source has skipped between two shares, by its place among the ids: in one portion."""
    ids = [source.utterances[index].id for index in order]
    place = lambda name: (bisect.bisect(ids, name) + 0.5) / (len(ids) + 1)
    return {name: why for name, why in source.skipped.items() if low <= place(name) < high}


def _value(utterance: Utterance, tag: str) -> str:
    return utterance.tags.get(tag, "") if tag else ""


def _groups(indices: Sequence[int], key: Callable[[int], str]) -> list[list[int]]:
    """Lists of indices with the same key, in the order of their first ones."""
    found: dict[str, list[int]] = {}
    for index in indices:
        found.setdefault(key(index), []).append(index)
    return list(found.values())
