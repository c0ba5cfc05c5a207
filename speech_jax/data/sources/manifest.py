"""Manifests: a JSON object a line, as NeMo writes them."""

import collections
import json
import math
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator

from absl import logging

from speech_jax import files
from speech_jax.data.sources import base

# What other toolkits call the transcript.
TEXT_KEYS = ("transcript", "transcription", "sentence", "normalized_text", "raw_text", "words")
_OWN = ("id", "audio_filepath", "offset", "duration")


def open_split(
    root: pathlib.Path,
    split: str,
    on_error: str,
    cache: pathlib.Path,
    *,
    text_key: str = "text",
    trust_durations: bool = False,
) -> base.FileSource:
    """Opens a NeMo-style manifest: root/split.jsonl, or a path in place of the split.

    A line is a JSON object with audio_filepath (relative to the manifest) and, optionally, id,
    duration and offset (seconds) and text. A line with an offset (0 too) is that segment of its
    file, from there for `duration` seconds or to the end. What has no id is named by its path,
    without the suffix where that is enough.
    Other keys with a string or a number become tags (speaker, label, language, ...), and
    video_filepath is the stream 'video'. Durations without an offset are those of the headers, the
    same as in a folder.

    Args:
      text_key: the key of the transcript.
      trust_durations: takes the stated durations where there are any, so that a corpus too large
        for it is not opened file by file.
    """
    manifest = find(root, split, "jsonl", "json")
    problems: dict[str, str] = {}
    parsed, rows, keys, nested = {}, [], set(), set()
    for where, line in _lines(manifest):
        try:
            row = parsed[where] = _parse(line)
        except ValueError as error:
            problems[where] = str(error)
            continue
        keys |= {key for key in row if isinstance(row[key], str)}
        nested |= {key for key in row if isinstance(row[key], list | dict)}
    alike = _alike(parsed.values())
    for where, row in parsed.items():
        try:
            rows.append(_row(row, where, manifest, text_key, alike))
        except ValueError as error:
            problems[where] = str(error)
    if not rows and not problems:
        raise base.SourceError(f"the manifest {manifest} is empty; write one JSON object a line")
    other = [key for key in TEXT_KEYS if key in keys and key != text_key]
    if other and text_key not in keys:
        logging.warning(
            "manifest %s: no line has a %r, so that there are no transcripts, but %r is there: "
            "rename it to 'text', or set data.arguments.text_key to %r",
            manifest, text_key, other[0], other[0],
        )  # fmt: skip
    if nested:
        logging.warning(
            "manifest %s: lists and objects cannot be tags, and are left out: %s",
            manifest, ", ".join(sorted(nested)),
        )  # fmt: skip
    return base.from_rows(
        f"manifest {manifest}",
        rows,
        manifest.parent,
        base.durations_file(cache, manifest),
        problems,
        on_error,
        trust_durations=trust_durations,
    )


def find(root: pathlib.Path, split: str, *extensions: str) -> pathlib.Path:
    """Returns root/split with one of the extensions, or the file that `split` itself names.

    The latter is below the root, or what ends in .jsonl a path from the current folder, where
    pseudo_label writes.
    """
    if files.is_remote(split):
        raise base.SourceError(f"{split} is in a bucket: copy it to a disk")
    split = os.path.expanduser(split)
    named = split.endswith(tuple(f".{extension}" for extension in extensions))
    candidates = [root / f"{split}.{extension}" for extension in extensions] + [root / split]
    if split.endswith(".jsonl"):
        candidates.append(pathlib.Path(split).absolute())
    for path in map(pathlib.Path, map(base.present, map(str, candidates))):
        if path.is_file():
            return path
    if not named and not root.is_dir() and not os.path.isabs(split):
        raise base.SourceError(
            f"the data root {root} does not exist; set it to the manifests' folder"
        )
    places = candidates[len(extensions) :] if named else candidates[:1]
    wanted = " and no ".join(dict.fromkeys(map(str, places)))
    known = sorted(path.stem for path in root.glob(f"*.{extensions[0]}"))
    raise base.SourceError(f"there is no manifest {wanted}; {root} has {base.listed(known)}")


def _lines(manifest: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields (place, line) of the lines that are not blank, whatever ends them."""
    try:
        with open(manifest, "rb") as lines:
            number = 0
            for text in lines:
                for line in text.rstrip(b"\r\n").split(b"\r"):
                    number += 1
                    if line.removeprefix(b"\xef\xbb\xbf").strip():
                        yield f"{manifest}:{number}", line
    except OSError as error:
        raise base.SourceError(f"{manifest} cannot be read ({error.strerror})") from error


def _parse(line: bytes) -> dict:
    """Returns the object of a line. Raises ValueError saying what is wrong with it."""
    try:
        # Not strict: tabs and other control characters in strings are kept as they are.
        row = json.loads(line.decode("utf-8-sig"), strict=False)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"malformed JSON ({error.msg} at column {error.colno}); fix the line"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}); convert the manifest") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise ValueError("JSON beyond reading (too deep, or a number too long); fix it") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"a JSON {type(row).__name__} where an object {{...}} belongs; fix the line"
        )
    return row


def _alike(rows: Iterable[dict]) -> set[str]:
    """The paths without suffix that several files have: a.mp3 and a.ogg."""
    names = {name for row in rows if isinstance(name := row.get("audio_filepath"), str)}
    stems = collections.Counter(map(_stem, names))
    return {stem for stem, count in stems.items() if count > 1}


def _stem(name: str) -> str:
    path = pathlib.PurePath(name)
    return path.with_suffix("").as_posix() if path.name else path.as_posix()


def _row(
    row: dict, where: str, manifest: pathlib.Path, text_key: str, alike: Collection[str]
) -> base.Row:
    """Checks what a line says. Raises ValueError saying what is wrong with it."""
    name = row.get("audio_filepath")
    if not isinstance(name, str) or not name:
        raise ValueError("no audio_filepath; every line needs the path of its audio file")
    text, own = row.get(text_key), row.get("id")
    if not isinstance(text, str | None):
        raise ValueError(f"{text_key} is {_short(text)}; it must be a string")
    if not isinstance(own, str | int | None):
        raise ValueError(f"id is {_short(own)}; it must be a string")
    for key in ("speaker", "label"):  # what a task may need is not left out without a word
        if isinstance(row.get(key), list | dict):
            raise ValueError(f"{key} is {_short(row[key])}; it must be a string")
    offset = _seconds(row, "offset", 0)
    duration = _seconds(row, "duration", None)
    stem = _stem(name)
    if stem in alike:
        stem = pathlib.PurePath(name).as_posix()
    if offset is not None:
        stem += f"@{offset:.3f}" + ("" if duration is None else f"-{offset + duration:.3f}")
    streams = {
        key.removesuffix("_filepath"): _path(row[key], manifest)
        for key in row
        if key.endswith("_filepath") and key not in _OWN and isinstance(row[key], str)
    }
    tags = base.tags({key: row[key] for key in row if key not in (*_OWN, text_key)})
    return base.Row(
        where,
        stem if own is None or own == "" else str(own),
        _path(name, manifest),
        (text or "").strip(),
        tags,
        offset,
        duration,
        streams,
    )


def _seconds(row: dict, key: str, least: float | None) -> float | None:
    """Returns a number of seconds; more than 0, or `least` and more, or None where it is absent."""
    value = row.get(key)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted: an integer may be larger than any float.
    if not (number and (0 < value < 1e12 or value == least)) or not math.isfinite(value):
        what = "0 or more" if least == 0 else "above 0"
        raise ValueError(f"{key} is {_short(value)}; it must be seconds, {what}, or left out")
    return float(value)


def _path(name: str, manifest: pathlib.Path) -> str:
    return base.present(os.path.join(manifest.parent, os.path.expanduser(name)))


def _short(value: object) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of thousands of digits
        return "a number without end"
