"""The words that all sources share: an utterance, a source, and what every reader needs.

Every source gives random access to the same thing: a list of utterances sorted by id, each with
its duration, text and tags, and the audio of the i-th as something that `data.audio.decode` reads.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import rich.console
import rich.progress
from absl import logging

from speech_jax import files
from speech_jax.data import audio
from speech_jax.data.audio import Segment
from speech_jax.errors import UserError

File = str | BinaryIO | Segment  # what `audio.decode` takes

# With fewer files than this the headers are read before a progress bar could be of use.
_LARGE = 2000
_THREADS = 16
# A stated duration may differ from the audio's by so many seconds (codecs, rounding).
_AGREES = 0.1
# Names that corpora give to what has one name here.
_TAGS = {"speaker_id": "speaker", "client_id": "speaker", "locale": "language", "lang": "language"}


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One recording: `duration` in seconds, `text` as the corpus writes it.

    `tags` are what else the corpus says of it: speaker, label, language, translation, context.
    """

    id: str
    duration: float
    text: str = ""
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


class SourceError(UserError):
    """Data that cannot be used; the message names the thing and the cure."""


class Source(Protocol):
    """Random access to a corpus. Implementations are picklable and safe to read from threads."""

    utterances: Sequence[Utterance]
    skipped: dict[str, str]  # utterance or file -> why it was left out

    def open(self, index: int, stream: str = "audio") -> File:
        """Returns the `stream` of `utterances[index]`; 'audio' is what `data.audio.decode` takes.

        Raises SourceError where there is no such stream, naming those that there are.
        """
        ...


def default_cache() -> pathlib.Path:
    """Returns the folder for derived data: $SPEECH_JAX_CACHE, or ~/.cache/speech_jax."""
    return pathlib.Path(os.environ.get("SPEECH_JAX_CACHE") or "~/.cache/speech_jax").expanduser()


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Utterances that are a file or a segment of a file each; `streams` has files beside it."""

    utterances: Sequence[Utterance]
    files: Sequence[File]
    skipped: dict[str, str]
    streams: Mapping[str, Sequence[str | None]] = dataclasses.field(default_factory=dict)

    def open(self, index: int, stream: str = "audio") -> File:
        """Returns the path or the segment of a stream of `utterances[index]`."""
        if stream == "audio":
            return self.files[index]
        file = self.streams.get(stream, {index: None})[index]
        if file is None:
            there = ["audio", *(name for name, paths in self.streams.items() if paths[index])]
            raise no_stream(self.utterances[index], stream, there)
        return file


def no_stream(utterance: Utterance, stream: str, there: Sequence[str] = ("audio",)) -> SourceError:
    """Returns the error for a stream that an utterance has not."""
    return SourceError(
        f"utterance {utterance.id!r} has no stream {stream!r}; it has {', '.join(there)}"
    )


# ---- Sources of sources ------------------------------------------------------------------------


def concatenate(sources: Sequence[Source]) -> Source:
    """Returns one source with the utterances of `sources`, in their order."""
    if len(sources) == 1:
        return sources[0]
    utterances = tuple(itertools.chain.from_iterable(source.utterances for source in sources))
    seen = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise SourceError(
                f"utterance {utterance.id!r} is in more than one split: where a split is named "
                "twice, name it once; where ids restart in each split, make them unique, for "
                "example with the name of the split in front"
            )
        seen.add(utterance.id)
    skipped = {name: why for source in sources for name, why in source.skipped.items()}
    return _Concatenated(utterances, skipped, tuple(sources))


@dataclasses.dataclass(frozen=True)
class _Concatenated:
    utterances: Sequence[Utterance]
    skipped: dict[str, str]
    sources: tuple[Source, ...]

    def open(self, index: int, stream: str = "audio") -> File:
        for source in self.sources:
            if index < len(source.utterances):
                return source.open(index, stream)
            index -= len(source.utterances)
        raise IndexError(f"the source has {len(self.utterances)} utterances")


def select(source: Source, indices: Sequence[int]) -> Source:
    """Returns a source of the utterances at `indices`, in that order."""
    chosen = tuple(source.utterances[index] for index in indices)
    if isinstance(source, FileSource):  # with its own files alone, to be sent to other processes
        streams = {
            name: tuple(paths[index] for index in indices) for name, paths in source.streams.items()
        }
        kept = tuple(source.files[index] for index in indices)
        return FileSource(chosen, kept, source.skipped, streams)
    return _Selected(chosen, source.skipped, source, tuple(indices))


@dataclasses.dataclass(frozen=True)
class _Selected:
    utterances: Sequence[Utterance]
    skipped: dict[str, str]
    source: Source
    indices: Sequence[int]

    def open(self, index: int, stream: str = "audio") -> File:
        return self.source.open(self.indices[index], stream)


def draw(source: Source, seconds: float, seed: int) -> Source:
    """Returns a source of utterances drawn with `seed` until they last `seconds` or more."""
    order = np.random.default_rng(seed).permutation(len(source.utterances))
    lasting = np.cumsum([source.utterances[index].duration for index in order])
    count = int(np.searchsorted(lasting, seconds)) + 1
    return select(source, sorted(int(index) for index in order[:count]))


def only(source: Source, tags: str) -> Source:
    """Returns a source of the utterances with these tags: 'speaker=84, language!=en'.

    Raises SourceError for a condition that is none, for a tag that no utterance has, and where
    nothing is left.
    """
    chosen = list(range(len(source.utterances)))
    for condition in tags.split(","):
        name, equals, value = (part.strip() for part in condition.partition("="))
        wanted, name = not name.endswith("!"), name.removesuffix("!").strip()
        if not (name and equals and value):
            raise SourceError(
                f"data.only={tags!r}: {condition.strip()!r} is not a condition: write tag=value or "
                "tag!=value, with commas between several"
            )
        known = {utterance.tags[name] for utterance in source.utterances if name in utterance.tags}
        if not known:
            names = sorted({tag for utterance in source.utterances for tag in utterance.tags})
            raise SourceError(
                f"data.only={tags!r}: no utterance has the tag {name!r}; tags are {listed(names)}"
            )
        if wanted and value not in known:
            raise SourceError(
                f"data.only={tags!r}: no utterance has {name}={value}; there are "
                f"{listed(sorted(known)[:20])}"
            )
        chosen = [i for i in chosen if (source.utterances[i].tags.get(name) == value) == wanted]
    if not chosen:
        raise SourceError(f"data.only={tags!r} leaves no utterance")
    return select(source, chosen)


# ---- From rows to a source ---------------------------------------------------------------------


class Row(NamedTuple):
    """What a corpus says of an utterance; `where` names the place that says it.

    `duration` is as stated, in seconds, and None where the file has to tell it. With an `offset` in
    seconds (0 too) the utterance is that segment of the file.
    """

    where: str
    id: str
    path: str
    text: str = ""
    tags: Mapping[str, str] = {}
    offset: float | None = None
    duration: float | None = None
    streams: Mapping[str, str] = {}


def from_rows(
    what: str,
    rows: Sequence[Row],
    folder: pathlib.Path,
    kept: pathlib.Path,
    problems: dict[str, str],
    on_error: str,
    *,
    trust_durations: bool = False,
) -> FileSource:
    """Makes a source of the rows of a corpus.

    Durations are those of the files and, where a row has an offset, as stated. `trust_durations`
    takes the stated ones wherever there are any, so that no file is opened.

    Args:
      what: names the corpus in messages.
      folder: where the corpus is; `kept` is the file that keeps durations.
      problems: name -> why, of what cannot be used so far; on_error 'raise' raises the first.
    """
    seen: dict[str, str] = {}
    usable = []
    for row in rows:
        if row.id in seen:
            problems[row.where] = (
                f"id {row.id!r} is also that of {seen[row.id]}; give each an id of its own"
            )
        elif trouble := not_text(row):
            problems[row.where] = trouble
        else:
            seen[row.id] = row.where
            usable.append(row)
    unknown = {row.path: None for row in usable if not (trust_durations and row.duration)}
    lengths = durations(unknown, folder, kept, problems)
    found, disagreeing = [], []
    for row in usable:
        if row.path in unknown and row.path not in lengths:
            if row.offset is not None:  # each part of a recording counts, not the file once
                problems[row.where] = problems[row.path]
            continue
        try:
            seconds, file = _cut(row, lengths.get(row.path))
        except ValueError as error:
            problems[row.where] = str(error)
            continue
        if row.offset is None and row.duration and abs(seconds - row.duration) > _AGREES:
            disagreeing.append(f"{row.id} states {row.duration:g} s and lasts {seconds:.2f} s")
        found.append((Utterance(row.id, seconds, row.text, row.tags), file, row.streams))
    for path in {row.path for row in usable if row.offset is not None}:
        problems.pop(path, None)
    if disagreeing:
        logging.warning(
            "%s: the stated durations of %d utterances disagree with their files (%s): the whole "
            "files are used; correct them, or state an offset (0 too) for a part of a file",
            what, len(disagreeing), disagreeing[0],
        )  # fmt: skip
    return make_source(what, found, problems, on_error)


def _cut(row: Row, length: float | None) -> tuple[float, File]:
    """Returns the duration of a row and its file or segment. `length` is the file's, if known."""
    if row.offset is None or (row.offset == 0 and row.duration is None):
        return (row.duration if length is None else length), row.path
    seconds = row.duration
    if length is not None:
        seconds = length - row.offset if seconds is None else seconds
        if seconds <= 0 or row.offset + seconds > length + _AGREES:
            raise ValueError(
                f"offset {row.offset:g} and duration {seconds:g} lead beyond the end of "
                f"{row.path} at {length:.2f} s; correct them"
            )
        seconds = min(seconds, length - row.offset)
    return seconds, Segment(row.path, row.offset, seconds)


def not_text(row: Row) -> str:
    """Returns what is wrong with a row that UTF-8 cannot hold, else ''."""
    for key, value in (("id", row.id), ("text", row.text), ("path", row.path), *row.tags.items()):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            if key == "path":
                return "its name is not UTF-8; rename the file"
            return (
                f"{key} has half of a surrogate pair (\\u{ord(value[error.start]):04x}, character "
                f"{error.start + 1}), which is not text; correct it"
            )
    return ""


def make_source(
    what: str,
    found: Iterable[tuple[Utterance, File, Mapping[str, str]]],
    problems: dict[str, str],
    on_error: str,
) -> FileSource:
    """Sorts by id and settles the problems: the first one raised, or all of them listed."""
    found = sorted(found, key=lambda one: one[0].id)
    settle(what, len(found), problems, on_error)
    names = sorted({name for _, _, streams in found for name in streams})
    return FileSource(
        tuple(utterance for utterance, _, _ in found),
        tuple(file for _, file, _ in found),
        dict(sorted(problems.items())),
        {name: tuple(streams.get(name) for _, _, streams in found) for name in names},
    )


def settle(what: str, usable: int, problems: Mapping[str, str], on_error: str) -> None:
    """Raises SourceError for the first problem where it must, and says how many there are."""
    if problems and (on_error == "raise" or not usable):
        name, why = next(iter(problems.items()))
        more = f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""
        cure = "on_error='skip' leaves such utterances out" if usable else "nothing else is left"
        raise SourceError(f"{what}: {name}: {why}{more}; {cure}")
    if problems:
        logging.warning("%s: skipped %d, used %d utterances", what, len(problems), usable)


def tags(values: Mapping[str, object]) -> dict[str, str]:
    """Returns what a corpus says beside id, audio and text: every string, number and truth value.

    Speaker and language have one name whatever a corpus calls them.
    """
    found = {}
    for key, value in values.items():
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, str | int | float) and str(value).strip():
            found[_TAGS.get(key, key)] = str(value).strip()
    return found


# ---- Durations ---------------------------------------------------------------------------------


def durations(
    paths: Iterable[str], folder: pathlib.Path, kept: pathlib.Path, problems: dict[str, str]
) -> dict[str, float]:
    """Returns path -> seconds of the files; those that cannot be read go to `problems`.

    What was read is kept in the file `kept` by (path below `folder`, size, time of change), so that
    the headers of a large corpus are read once; the data itself may be read-only.
    """
    paths = list(paths)
    known = _load_durations(kept)
    prefix = f"{folder}{os.sep}"

    def measure(path: str) -> tuple[tuple[str, int, int] | None, float | str]:
        try:
            stat = os.stat(path)
            key = (path.removeprefix(prefix), stat.st_size, stat.st_mtime_ns)
            return key, known[key] if key in known else audio.duration(path)
        except audio.UnsupportedError as error:
            return None, str(error).removeprefix(f"{path}: ")
        except audio.AudioError as error:
            return None, str(error).removeprefix(f"{path}: ") + "; restore it or delete it"
        except FileNotFoundError:
            return None, "no such file; restore it or correct its path"
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            why = getattr(error, "strerror", error)
            return None, f"cannot be read ({why}); correct its rights or its path"

    found, fresh = {}, {}
    title = f"Reading headers of {folder.name}" if len(known) < len(paths) else "Checking files"
    for path, (key, result) in zip(paths, _in_threads(measure, paths, title), strict=True):
        if key is None:
            problems[path] = result
        else:
            found[path] = fresh[key] = result
    if fresh.keys() - known.keys():
        try:
            rows = (json.dumps([*key, seconds]) + "\n" for key, seconds in fresh.items())
            files.write_atomically(kept, "".join(rows))
        except OSError as error:
            logging.warning("the durations cannot be kept in %s (%s)", kept, error.strerror)
    return found


def durations_file(cache: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
    """Returns where the durations of the corpus at `data` are kept."""
    return cache / "durations" / f"{data.name}-{digest(data)}.jsonl"


def _load_durations(file: pathlib.Path) -> dict[tuple[str, int, int], float]:
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        return {(path, size, changed): float(seconds) for path, size, changed, seconds in rows}
    except (OSError, ValueError, TypeError, RecursionError):  # absent or damaged: only a cache
        return {}


def _in_threads(function: Callable, items: Sequence[str], title: str) -> Iterator:
    """Yields function(item) in order, from threads, with a progress bar when there are many."""
    chunks = [items[start : start + 100] for start in range(0, len(items), 100)]
    console = rich.console.Console(stderr=True)
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        rich.progress.Progress(console=console, disable=len(items) < _LARGE) as progress,
    ):
        task = progress.add_task(title, total=len(items))
        for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
            progress.advance(task, len(results))
            yield from results


# ---- Files and names ---------------------------------------------------------------------------


def read_text(path: pathlib.Path) -> str:
    """Returns a text file without a byte-order mark. Raises SourceError that names it."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror})") from error


def present(path: str) -> str:
    """Returns `path`, or what has its name in another Unicode form (a Mac writes é as two)."""
    if path.isascii() or "\0" in path or os.path.lexists(path):
        return path
    parent, name = os.path.split(path)
    if not name:
        return path
    parent = present(parent)
    try:
        names = _names_by_form(parent, os.stat(parent or ".").st_mtime_ns)
    except OSError:
        return path
    return os.path.join(parent, names.get(unicodedata.normalize("NFC", name), name))


@functools.lru_cache(maxsize=64)
def _names_by_form(folder: str, changed: int) -> dict[str, str]:
    del changed  # makes it another folder to the cache
    return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder or ".")}


def subfolders(folder: str | os.PathLike) -> list[str]:
    """Returns the paths of the folders in `folder` that are not hidden, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.path for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError:
        return []


def is_writable(folder: pathlib.Path) -> bool:
    """Tries it: permission bits say little to root and on read-only file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def digest(path: pathlib.Path) -> str:
    """Returns a name for what is derived from the data at `path`."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def listed(names: Iterable[str]) -> str:
    """Returns names for a message."""
    return ", ".join(names) or "none"
