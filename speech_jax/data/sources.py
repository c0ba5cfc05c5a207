"""Where utterances come from: LibriSpeech, a manifest, prepared data, a synthetic corpus.

Every source gives random access to the same thing: a list of utterances sorted by id, each with
its duration and text, and the audio of the i-th as something that `data.audio.decode` reads.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, Protocol

import numpy as np
import rich.console
import rich.progress
from absl import logging

from speech_jax.data import archive, audio
from speech_jax.errors import UserError

# With fewer files than this the headers are read before a progress bar could be of use.
_LARGE = 2000
_THREADS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One recording: `duration` in seconds, `text` as the corpus writes it."""

    id: str
    duration: float
    text: str = ""
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)


class SourceError(UserError):
    """Data that cannot be used; the message names the thing and the cure."""


class Source(Protocol):
    """Random access to a corpus. Implementations are picklable and safe to read from threads."""

    utterances: Sequence[Utterance]
    skipped: dict[str, str]  # utterance or file -> why it was left out

    def open(self, index: int) -> str | BinaryIO:
        """Returns the audio of `utterances[index]`, as `data.audio.decode` takes it."""
        ...


def open_source(
    kind: str,
    *,
    root: str | os.PathLike,
    split: str,
    on_error: str = "raise",
    cache: str | os.PathLike | None = None,
    **kwargs,
) -> Source:
    """Opens the `split` of the corpus in folder `root`.

    Args:
      kind: 'librispeech' (folder, or archive, downloaded when it is an official split), 'manifest'
        (JSON lines), 'prepared' (speech_jax.data.prepare) or 'synthetic' (spoken by espeak-ng).
      on_error: 'raise' for the first bad utterance, or 'skip' to leave bad ones out and list them
        in `skipped`.
      cache: the folder for what is derived from the data; by default $SPEECH_JAX_CACHE, else
        ~/.cache/speech_jax.
      **kwargs: settings of the kind: librispeech takes `download` (True), synthetic its own.

    Raises:
      SourceError: when the data is absent or, with 'raise', when an utterance cannot be used.
    """
    if on_error not in ("raise", "skip"):
        raise SourceError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'")
    cache = default_cache() if cache is None else pathlib.Path(cache).expanduser()
    if not split:
        raise SourceError("no split is named; set it to one, for example train-clean-100")
    if kind == "synthetic":
        from speech_jax.data import synthetic  # needs an extra, and imports this module

        return synthetic.open_split(root or cache, split, **kwargs)
    openers = {
        "librispeech": _open_librispeech,
        "manifest": _open_manifest,
        "prepared": _open_prepared,
    }
    if kind not in openers:
        raise SourceError(f"unknown kind of source {kind!r}; known: {_names(openers)}, synthetic")
    if not root:
        raise SourceError(f"a source of kind {kind!r} needs root, the folder that holds the data")
    return openers[kind](pathlib.Path(root).expanduser(), split, on_error, cache, **kwargs)


def default_cache() -> pathlib.Path:
    """Returns the folder for derived data: $SPEECH_JAX_CACHE, or ~/.cache/speech_jax."""
    return pathlib.Path(os.environ.get("SPEECH_JAX_CACHE") or "~/.cache/speech_jax").expanduser()


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Utterances that are one file each."""

    utterances: Sequence[Utterance]
    paths: Sequence[str]
    skipped: dict[str, str]

    def open(self, index: int) -> str:
        """Returns the path of the audio of `utterances[index]`."""
        return self.paths[index]


def concatenate(sources: Sequence[Source]) -> Source:
    """Returns one source with the utterances of `sources`, in their order."""
    if len(sources) == 1:
        return sources[0]
    utterances = tuple(itertools.chain.from_iterable(source.utterances for source in sources))
    seen = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise SourceError(
                f"utterance {utterance.id!r} is in more than one split; name each split once"
            )
        seen.add(utterance.id)
    skipped = {name: why for source in sources for name, why in source.skipped.items()}
    return _Concatenated(utterances, skipped, tuple(sources))


@dataclasses.dataclass(frozen=True)
class _Concatenated:
    utterances: Sequence[Utterance]
    skipped: dict[str, str]
    sources: tuple[Source, ...]

    def open(self, index: int) -> str | BinaryIO:
        for source in self.sources:
            if index < len(source.utterances):
                return source.open(index)
            index -= len(source.utterances)
        raise IndexError(f"the source has {len(self.utterances)} utterances")


def draw(source: Source, seconds: float, seed: int) -> Source:
    """Returns a source of utterances drawn with `seed` until they last `seconds` or more."""
    order = np.random.default_rng(seed).permutation(len(source.utterances))
    lasting = np.cumsum([source.utterances[place].duration for place in order])
    count = int(np.searchsorted(lasting, seconds)) + 1
    places = tuple(sorted(int(place) for place in order[:count]))
    chosen = tuple(source.utterances[place] for place in places)
    return _Drawn(chosen, source.skipped, source, places)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    utterances: Sequence[Utterance]
    skipped: dict[str, str]
    source: Source
    places: Sequence[int]

    def open(self, index: int) -> str | BinaryIO:
        return self.source.open(self.places[index])


# ---- LibriSpeech -------------------------------------------------------------------------------


def _open_librispeech(
    root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path, *, download: bool = True
) -> FileSource:
    """Opens root/split in the official layout, or its archive, or downloads it."""
    folder = _librispeech_folder(root, split, cache, download)
    files, transcripts, problems = _scan(folder)
    if not files and not transcripts and not problems:
        raise SourceError(
            f"split {split!r} is empty: {folder} has no SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt; "
            f"splits with data in {root}: {_names(_librispeech_splits(root))}"
        )
    for name in sorted(transcripts.keys() - files.keys()):
        problems[name] = f"transcript without audio; add the file {name}.flac or delete the line"
    for name in sorted(files.keys() - transcripts.keys()):
        problems[files[name]] = "audio without transcript; add its line to the .trans.txt beside it"
    usable = {files[name]: name for name in files if transcripts.get(name)}
    for name in sorted(files.keys() & transcripts.keys()):
        if not transcripts[name]:
            problems[files[name]] = "empty transcript; complete its line in the .trans.txt"
    durations = _durations(usable, folder, _durations_file(cache, folder), problems)
    found = (
        (Utterance(name, durations[path], transcripts[name], {"speaker": _speaker(path)}), path)
        for path, name in usable.items()
        if path in durations
    )
    return _file_source(f"split {split!r} of {root}", found, problems, on_error)


def _librispeech_folder(
    root: pathlib.Path, split: str, cache: pathlib.Path, download: bool
) -> pathlib.Path:
    """Returns the folder of a split, unpacking or fetching its archive where that is needed."""
    unpacked = cache / "librispeech" / digest(root)
    # An official archive unpacked by hand gives root/LibriSpeech/split.
    for folder in (root / split, root / "LibriSpeech" / split, unpacked / split):
        if folder.is_dir():
            return folder
    for file in (root / f"{split}.tar.gz", unpacked / f"{split}.tar.gz"):
        if file.is_file():
            return _unpack(file, root, unpacked, split)
    if split in archive.ARCHIVES and download:
        return _unpack(_fetch(root, unpacked, split), root, unpacked, split)
    if not root.is_dir():
        raise SourceError(
            f"the data root {root} does not exist; set it to the folder that holds {split!r}"
        )
    raise SourceError(
        f"there is no split {split!r} in {root}; it has {_names(_librispeech_splits(root))}, and "
        f"those that can be downloaded are {_names(archive.ARCHIVES)}"
    )


def _unpack(
    file: pathlib.Path, root: pathlib.Path, unpacked: pathlib.Path, split: str
) -> pathlib.Path:
    """Unpacks an archive into the root or, where that cannot be written, into the cache."""
    folder = (root if _is_writable(root) else unpacked) / split
    try:
        archive.extract(file, folder)
    except archive.ArchiveError as error:
        raise SourceError(str(error)) from error
    return folder


def _fetch(root: pathlib.Path, unpacked: pathlib.Path, split: str) -> pathlib.Path:
    """Downloads the archive of an official split and returns its place."""
    place = archive.ARCHIVES[split]
    created = not root.exists()
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
    file = (root if _is_writable(root) else unpacked) / f"{split}.tar.gz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        archive.download(place.url, file, place.md5)
    except (archive.ArchiveError, OSError) as error:
        if created:
            with contextlib.suppress(OSError):  # not empty: a part that the next try resumes
                root.rmdir()
        raise SourceError(
            f"split {split!r} is not in {root} and cannot be downloaded: {error}; fetch "
            f"{place.url} by hand into {root}, or run configs/quickstart.py, which needs none"
        ) from error
    return file


def _scan(folder: pathlib.Path) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Returns (id -> audio file, id -> text, name -> problem) of folder/SPEAKER/CHAPTER/."""
    files, transcripts, problems = {}, {}, {}
    for chapter in itertools.chain.from_iterable(map(_subfolders, _subfolders(folder))):
        for path in sorted(entry.path for entry in os.scandir(chapter)):
            base = os.path.basename(path)
            name, _, extension = base.rpartition(".")
            if base.startswith("."):
                continue
            if base.endswith(".trans.txt"):
                _read_transcripts(path, transcripts, problems)
            elif extension.lower() not in audio.EXTENSIONS:
                continue
            elif name in files:
                problems[path] = f"second audio file of {name!r}, after {files[name]}; keep one"
            else:
                files[name] = path
    return files, transcripts, problems


def _speaker(path: str) -> str:
    return os.path.basename(os.path.dirname(os.path.dirname(path)))


def _read_transcripts(path: str, transcripts: dict[str, str], problems: dict[str, str]) -> None:
    """Adds the lines 'ID TEXT' of a transcript file to `transcripts`."""
    try:
        lines = pathlib.Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        problems[path] = f"not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        return
    for number, line in enumerate(lines, 1):
        name, _, text = line.strip().partition(" ")
        if name in transcripts:
            problems[f"{path}:{number}"] = f"second transcript of {name!r}; keep one"
        elif name:
            transcripts[name] = text.strip()


def _librispeech_splits(root: pathlib.Path) -> list[str]:
    folders = [folder for place in (root, root / "LibriSpeech") for folder in _subfolders(place)]
    found = {os.path.basename(folder) for folder in folders if _has_transcripts(folder)}
    return sorted(found | {path.name.removesuffix(".tar.gz") for path in root.glob("*.tar.gz")})


def _has_transcripts(folder: str) -> bool:
    return any(pathlib.Path(folder).glob("*/*/*.trans.txt"))


# ---- Manifest ----------------------------------------------------------------------------------


def _open_manifest(
    root: pathlib.Path,
    split: str,
    on_error: str,
    cache: pathlib.Path,
    *,
    trust_durations: bool = False,
) -> FileSource:
    """Opens a NeMo-style manifest: root/split.jsonl, or a path in place of the split.

    A line is a JSON object with audio_filepath (relative to the manifest) and, optionally, id,
    duration (seconds), text, speaker and label. What has no id is named by its path. Durations are
    those of the headers, exact and the same as in a folder; `trust_durations` takes the stated
    ones where there are any, so that a corpus too large for it is not opened file by file.
    """
    manifest = _manifest_path(root, split)
    problems: dict[str, str] = {}
    rows = list(_manifest_rows(manifest, problems))
    if not rows and not problems:
        raise SourceError(f"the manifest {manifest} is empty; write one JSON object a line")
    stated = {row["path"]: row["duration"] for row in rows if trust_durations and row["duration"]}
    measured = [row["path"] for row in rows if row["path"] not in stated]
    durations = stated | _durations(
        measured, manifest.parent, _durations_file(cache, manifest), problems
    )
    found = (
        (
            Utterance(row["id"], durations[row["path"]], row["text"], row["tags"]),
            row["path"],
        )
        for row in rows
        if row["path"] in durations
    )
    return _file_source(f"manifest {manifest}", found, problems, on_error)


def _manifest_path(root: pathlib.Path, split: str) -> pathlib.Path:
    candidates = (root / f"{split}.jsonl", root / f"{split}.json", root / split)
    for path in candidates:
        if path.is_file():
            return path
    if not root.is_dir() and not pathlib.Path(split).is_absolute():
        raise SourceError(f"the data root {root} does not exist; set it to the manifests' folder")
    known = sorted(path.stem for path in root.glob("*.jsonl"))
    raise SourceError(f"there is no manifest {candidates[0]}; {root} has {_names(known)}")


def _manifest_rows(manifest: pathlib.Path, problems: dict[str, str]) -> Iterator[dict]:
    """Yields the valid lines: {id, path, duration (or None), text, speaker, label}."""
    ids: dict[str, int] = {}
    with open(manifest, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _manifest_row(line, manifest)
                if row["id"] in ids:
                    raise ValueError(
                        f"id {row['id']!r} is also that of line {ids[row['id']]}; make ids unique"
                    )
            except ValueError as error:
                problems[f"{manifest}:{number}"] = str(error)
                continue
            ids[row["id"]] = number
            yield row


def _manifest_row(line: bytes, manifest: pathlib.Path) -> dict:
    """Parses one line. Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"malformed JSON ({error.msg} at column {error.colno}); fix the line"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}); convert the manifest") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"a JSON {type(row).__name__} where an object {{...}} belongs; fix the line"
        )
    name = row.get("audio_filepath")
    if not isinstance(name, str) or not name:
        raise ValueError("no audio_filepath; every line needs the path of its audio file")
    if row.get("offset"):
        raise ValueError("offset is not supported; cut the recording into one file an utterance")
    seconds = row.get("duration")
    if seconds is not None:
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (number and math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"duration is {seconds!r}; it must be seconds above 0, or left out")
        seconds = float(seconds)
    known = ("id", "audio_filepath", "duration", "offset")
    fields = {"text": None} | {key: value for key, value in row.items() if key not in known}
    for key, value in fields.items():
        # Speaker numbers are common; a text that is not a string is a mistake.
        if not isinstance(value, str | None if key == "text" else str | int | None):
            raise ValueError(f"{key} is {value!r}; it must be a string")
        fields[key] = "" if value is None else str(value).strip()
    path = os.path.join(manifest.parent, os.path.expanduser(name))
    name = str(row.get("id") or pathlib.PurePath(name).with_suffix("").as_posix())
    text = fields.pop("text")
    return {"id": name, "path": path, "duration": seconds, "text": text, "tags": fields}


# ---- Prepared ----------------------------------------------------------------------------------


def _open_prepared(root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path) -> Source:
    """Opens what speech_jax.data.prepare wrote."""
    try:
        from speech_jax.data import prepare  # imports TFDS, which is an extra
    except ModuleNotFoundError as error:
        raise SourceError(
            f"prepared data needs {error.name}; install it with pip install 'speech_jax[tfds]'"
        ) from error
    return prepare.open_prepared(root, split, on_error, cache)


# ---- Shared ------------------------------------------------------------------------------------


def _file_source(
    what: str, found: Iterable[tuple[Utterance, str]], problems: dict[str, str], on_error: str
) -> FileSource:
    """Sorts by id and settles the problems: the first one raised, or all of them listed."""
    found = sorted(found, key=lambda pair: pair[0].id)
    _settle(what, len(found), problems, on_error)
    return FileSource(
        tuple(utterance for utterance, _ in found),
        tuple(path for _, path in found),
        dict(sorted(problems.items())),
    )


def _settle(what: str, usable: int, problems: dict[str, str], on_error: str) -> None:
    if problems and (on_error == "raise" or not usable):
        name, why = next(iter(problems.items()))
        more = f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""
        cure = "on_error='skip' leaves such utterances out" if usable else "nothing else is left"
        raise SourceError(f"{what}: {name}: {why}{more}; {cure}")
    if problems:
        logging.warning("%s: skipped %d, used %d utterances", what, len(problems), usable)


def _durations(
    paths: Iterable[str], base: pathlib.Path, kept: pathlib.Path, problems: dict[str, str]
) -> dict[str, float]:
    """Returns path -> seconds from the files' headers; those that cannot be read go to `problems`.

    What was read is kept in the file `kept` by (path below base, size, time of change), so that the
    headers of a large corpus are read once; the data itself may be read-only.
    """
    paths = list(paths)
    known = _load_durations(kept)
    prefix = f"{base}{os.sep}"

    def measure(path: str) -> tuple[tuple[str, int, int] | None, float | str]:
        try:
            stat = os.stat(path)
            key = (path.removeprefix(prefix), stat.st_size, stat.st_mtime_ns)
            return key, known[key] if key in known else audio.duration(path)
        except audio.AudioError as error:
            return None, str(error).removeprefix(f"{path}: ") + "; restore it or delete it"
        except FileNotFoundError:
            return None, "no such file; restore it or correct its path"
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            why = getattr(error, "strerror", error)
            return None, f"cannot be read ({why}); correct its rights or its path"

    durations, fresh = {}, {}
    title = f"Reading headers of {base.name}" if len(known) < len(paths) else "Checking files"
    for path, (key, result) in zip(paths, _in_threads(measure, paths, title), strict=True):
        if key is None:
            problems[path] = result
        else:
            durations[path] = fresh[key] = result
    if fresh.keys() - known.keys():
        try:
            rows = (json.dumps([*key, seconds]) + "\n" for key, seconds in fresh.items())
            write_atomically(kept, "".join(rows))
        except OSError as error:
            logging.warning("the durations cannot be kept in %s (%s)", kept, error.strerror)
    return durations


def _durations_file(cache: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
    return cache / "durations" / f"{data.name}-{digest(data)}.jsonl"


def _load_durations(file: pathlib.Path) -> dict[tuple[str, int, int], float]:
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        return {(path, size, changed): float(seconds) for path, size, changed, seconds in rows}
    except (OSError, ValueError, TypeError):  # absent or damaged: it is only a cache
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


def write_atomically(file: pathlib.Path, text: str) -> None:
    """Writes `text` to `file`, which is never seen half-written. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _subfolders(folder: str | os.PathLike) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.path for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError:
        return []


def _is_writable(folder: pathlib.Path) -> bool:
    """Tries it: permission bits say little to root and on read-only file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def digest(path: pathlib.Path) -> str:
    """Returns a name for what is derived from the data at `path`."""
    return hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
