"""Prepared data: what `speech_jax.data.prepare` wrote, read without TensorFlow.

It may lie in a bucket (gs://): ArrayRecord reads its files there by itself.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.progress
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from google.protobuf import json_format

from speech_jax import files
from speech_jax.data import audio
from speech_jax.data.sources import base

# Of the format: the newest is written, all are read. 1.0.0 had speaker and label as columns; since
# 1.1.0 a column holds all tags as JSON, so that another tag is no other format.
VERSIONS = ("1.1.0", "1.0.0")
SPLIT = "train"  # what TFDS calls the only split of a dataset


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """Utterances in ArrayRecord; `data` reads one record at a time, from any thread."""

    utterances: Sequence[base.Utterance]
    skipped: dict[str, str]
    folder: pathlib.Path
    data: Any

    def open(self, index: int, stream: str = "audio") -> io.BytesIO:
        """Returns the FLAC file of `utterances[index]`."""
        if not 0 <= index < len(self.utterances):
            raise IndexError(f"utterance {index} of {len(self.utterances)}")
        if stream != "audio":
            raise base.no_stream(self.utterances[index], stream)
        try:
            return io.BytesIO(self.data[index]["flac"])
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise audio.AudioError(
                f"utterance {self.utterances[index].id!r} cannot be read from {self.folder} "
                f"({error}); copy or prepare the split again"
            ) from error


def open_split(
    root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path
) -> PreparedSource:
    """Opens what `prepare` wrote. Raises SourceError where it is absent or incomplete."""
    del on_error  # every record was decoded when it was written
    folder = folder_of(root, split)
    if not folder.is_dir():
        known = {path.parent.name for path in root.glob("utterances/*/1.*")}
        raise base.SourceError(
            f"there is no prepared split {split!r} in {root}; it has {base.listed(sorted(known))}; "
            "write it with python -m speech_jax.data.prepare"
        )
    data = records(folder)
    return PreparedSource(tuple(load_index(folder, data, cache)), {}, folder, data)


def folder_of(root: str | os.PathLike, split: str) -> pathlib.Path:
    """Returns the folder of a split: one that is there, else where it is to be written."""
    folders = [files.expand(root) / "utterances" / split / version for version in VERSIONS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def records(folder: pathlib.Path) -> Any:
    """Returns the records of a split as a sequence of dicts."""
    try:
        builder = tfds.builder_from_directory(folder)
        paths = builder.info.splits[SPLIT].filepaths
    except (OSError, KeyError, ValueError, TypeError, json_format.ParseError) as error:
        raise base.SourceError(
            f"{folder} is damaged ({error}); copy or prepare the split again"
        ) from error
    for path in map(epath.Path, paths):
        if not (path.exists() and path.stat().length):
            raise base.SourceError(f"{path} is missing or empty; copy or prepare the split again")
    return builder.as_data_source(SPLIT)


def load_index(folder: pathlib.Path, data: Any, cache: pathlib.Path) -> list[base.Utterance]:
    """Returns the utterances of a split without their audio.

    They are read once from the records and kept beside the data or, where that is read-only, in
    the cache.
    """
    stamp = epath.Path(folder / "dataset_info.json").stat().mtime
    places = (
        folder / "index.jsonl",
        cache / "prepared" / f"{base.digest(folder)}-{stamp}.jsonl",
    )
    for file in places:
        # Absent, or damaged: it is only a copy.
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            lines = file.read_text("utf-8").split("\n")
            rows = [_indexed(*json.loads(line)) for line in lines if line]
            if len(rows) == len(data):
                return rows
    with progress_bar() as progress:
        task = progress.add_task(f"Indexing {folder.parent.name}", total=len(data))
        rows = []
        for record in data:
            rows.append(_utterance(record))
            progress.advance(task)
    text = "".join(json.dumps([row.id, row.duration, row.text, row.tags]) + "\n" for row in rows)
    for file in places:
        try:
            files.write_atomically(file, text)
            break
        except OSError as error:
            logging.info("the index cannot be kept in %s (%s)", file, error.strerror)
    return rows


def _indexed(id_: str, duration: float, text: str, *rest: Any) -> base.Utterance:
    """Returns the utterance of a line of the index, of any version. Raises TypeError."""
    tags = rest[0] if len(rest) == 1 else _old_tags(*rest)
    strings = (id_, text, *tags.keys(), *tags.values()) if isinstance(tags, dict) else (None,)
    if not all(isinstance(string, str) for string in strings) or not isinstance(duration, float):
        raise TypeError("no line of an index")
    return base.Utterance(id_, duration, text, tags)


def _utterance(record: dict[str, Any]) -> base.Utterance:
    if "tags" in record:
        tags = files.parse_json(record["tags"])
    else:
        tags = _old_tags(record["speaker"].decode(), record["label"].decode())
    seconds = int(record["samples"]) / int(record["rate"])
    return base.Utterance(record["id"].decode(), seconds, record["text"].decode(), tags)


def _old_tags(speaker: str, label: str) -> dict[str, str]:
    return base.tags({"speaker": speaker, "label": label})


def progress_bar() -> rich.progress.Progress:
    """Returns a bar that counts, on standard error."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    return rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
