"""N-gram language models with back-off: as arrays, as ARPA files, and what they say of a text.

An n-gram of n units is a node: the node of its first n - 1 units and a last unit. Level n holds the
nodes of n units, sorted by (node before, unit), so that many are looked up at once by bisection.

Files are in the ARPA format, plain or compressed (.gz), as KenLM, SRILM and others write them.
"""

import dataclasses
import gzip
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from speech_jax import files
from speech_jax.errors import UserError

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
SPACE = "\u2581"  # how the space is written where units are characters or pieces
_LN10 = math.log(10)
LOWEST = -99.0  # log10 of what never comes


class LanguageModelError(UserError):
    """A file that is no language model, or one that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Level:
    """The n-grams of one n, sorted by `before` and `unit`.

    before: int64 [N], the node of all units but the last, in the level below; 0 in the first level.
    unit: int32 [N]; log10: float32 [N], of the last unit's probability after the others;
    backoff: float32 [N], log10 of what the probability after a shorter context is multiplied by.
    """

    before: np.ndarray
    unit: np.ndarray
    log10: np.ndarray
    backoff: np.ndarray

    def __len__(self) -> int:
        return len(self.unit)


class NGrams:
    """A language model of `units`, the words of its vocabulary, with a level for each n."""

    def __init__(self, units: Sequence[str], levels: Sequence[Level]):
        self.units, self.levels = tuple(units), tuple(levels)
        self.ids = {unit: number for number, unit in enumerate(self.units)}
        self._keys = [level.before * len(self.units) + level.unit for level in self.levels]

    @property
    def named(self) -> tuple[str, ...]:
        """The units that are said: all but <s>, </s> and <unk>."""
        return tuple(unit for unit in self.units if unit not in (UNKNOWN, BEGIN, END))

    @property
    def order(self) -> int:
        """The units of the longest n-grams."""
        return len(self.levels)

    def find(self, n: int, before: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """Nodes of level n (1 to order) by (node before, unit), int64 [...]; -1 for none."""
        keys = self._keys[n - 1]
        wanted = np.asarray(before, np.int64) * len(self.units) + unit
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = (keys[place] == wanted) & (np.asarray(before) >= 0)
        return np.where(found, place, -1)

    def score(self, text: Sequence[str], end: bool = True) -> float:
        """Natural logarithm of the probability of a text's units, and of its end."""
        unknown = self.ids.get(UNKNOWN)
        spoken = [self.ids.get(unit, unknown) for unit in text]
        if end:
            spoken.append(self.ids[END])
        history, total = [self.ids[BEGIN], *spoken], 0.0
        for place, unit in enumerate(spoken, 1):
            total += self._log10(history[max(0, place - self.order + 1) : place], unit)
        return total * _LN10

    def _log10(self, context: list[int | None], unit: int | None) -> float:
        """Of a unit after a context that is shorter than the order; None is an unknown unit."""
        node = self._node([*context, unit])
        if node >= 0:
            return float(self.levels[len(context)].log10[node])
        if not context:
            return LOWEST
        node = self._node(context)
        backoff = float(self.levels[len(context) - 1].backoff[node]) if node >= 0 else 0.0
        return backoff + self._log10(context[1:], unit)

    def _node(self, units: list[int | None]) -> int:
        node = 0
        for n, unit in enumerate(units, 1):
            if unit is None:
                return -1
            node = int(self.find(n, np.asarray(node), np.asarray(unit)))
        return node

    def write(self, path: str | os.PathLike) -> None:
        """Writes an ARPA file, compressed if its name ends in .gz; it appears whole or not at all.

        Raises:
          LanguageModelError: it cannot be written.
        """
        path = pathlib.Path(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        opened = gzip.open if path.suffix == ".gz" else open
        try:
            with opened(scratch, "wt", encoding="utf-8", newline="\n") as file:
                file.write("\\data\\\n")
                file.writelines(f"ngram {n}={len(one)}\n" for n, one in enumerate(self.levels, 1))
                for n, lines in enumerate(self._lines(), 1):
                    file.write(f"\n\\{n}-grams:\n")
                    file.writelines(lines)
                file.write("\n\\end\\\n")
            scratch.replace(path)
        except OSError as error:
            raise LanguageModelError(f"{path} cannot be written: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

    def _lines(self) -> Iterable[list[str]]:
        texts: list[str] = [""]
        for n, level in enumerate(self.levels, 1):
            texts = [
                f"{texts[before]} {self.units[unit]}" if n > 1 else self.units[unit]
                for before, unit in zip(level.before.tolist(), level.unit.tolist(), strict=True)
            ]
            rows = zip(level.log10.tolist(), texts, level.backoff.tolist(), strict=True)
            if n < self.order:
                yield [f"{p:.7g}\t{text}\t{b:.7g}\n" for p, text, b in rows]
            else:
                yield [f"{p:.7g}\t{text}\n" for p, text, _ in rows]


def read(path: str | os.PathLike) -> NGrams:
    """Reads an ARPA file, plain or compressed (.gz).

    Raises:
      LanguageModelError: there is no such file, or it is damaged or no ARPA file.
    """
    return _read(path, _parse)


def read_units(path: str | os.PathLike) -> tuple[str, ...]:
    """The units of an ARPA file, but for <s>, </s> and <unk>; errors as of `read`."""
    return _read(path, lambda text: _parse(text, 1)).named


def _read(path: str | os.PathLike, parse: Callable[[str], NGrams]) -> NGrams:
    path = files.expand(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise LanguageModelError(f"{path} cannot be read as a language model: {error}") from error
    try:
        return parse(text.replace("\r\n", "\n"))
    except (ValueError, IndexError, KeyError) as error:
        raise LanguageModelError(
            f"{path} is no ARPA file, or damaged ({error}): make one with "
            "`python -m speech_jax.decoding.lm build`, or bring it back"
        ) from error


def _parse(text: str, most: int | None = None) -> NGrams:
    """The model of a file's text, or its first `most` levels."""
    head, *sections = text.split("-grams:\n")
    if "\\data\\" not in head:
        raise ValueError("it has no \\data\\")
    stated = [int(line.partition("=")[2]) for line in head.splitlines() if line.startswith("ngram")]
    if len(stated) != len(sections) or not sections:
        raise ValueError(f"it announces {len(stated)} orders and has {len(sections)}")
    if "\\end\\" not in sections[-1]:
        raise ValueError("its end is missing")
    units: list[str] = []
    ids: dict[str, int] = {}
    levels: list[Level] = []
    for n, (count, section) in enumerate(zip(stated[:most], sections[:most], strict=True), 1):
        rows = [line.split() for line in section.split("\n\\")[0].split("\n") if line.strip()]
        if len(rows) != count:
            raise ValueError(f"it announces {count} {n}-grams and has {len(rows)}")
        if n == 1:
            units = [row[1] for row in rows]
            ids = {unit: number for number, unit in enumerate(units)}
            if len(ids) < len(units) or BEGIN not in ids or END not in ids:
                raise ValueError(f"its 1-grams must be distinct, {BEGIN} and {END} among them")
        if short := next((row for row in rows if len(row) not in (n + 1, n + 2)), None):
            raise ValueError(f"a line of its {n}-grams is {' '.join(short)!r}")
        words = np.asarray([[ids[unit] for unit in row[1 : n + 1]] for row in rows], np.int64)
        log10 = np.asarray([float(row[0]) for row in rows], np.float32)
        backoff = np.asarray([float(row[n + 1]) if len(row) > n + 1 else 0.0 for row in rows])
        before = np.zeros(len(rows), np.int64)
        known = NGrams(units, levels)
        for place in range(n - 1):
            before = known.find(place + 1, before, words[:, place])
        if len(rows) and before.min() < 0:
            raise ValueError(f"it has {' '.join(rows[int(before.argmin())][1:-1])!r} and no prefix")
        unit = words.reshape(len(rows), n)[:, -1]
        order = np.lexsort((unit, before))
        made = (before[order], unit[order].astype(np.int32), log10[order])
        levels.append(Level(*made, backoff[order].astype(np.float32)))
    while len(levels) > 1 and not len(levels[-1]):
        levels.pop()
    return NGrams(units, levels)
