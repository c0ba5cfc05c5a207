"""Hugging Face data sets saved as Parquet: audio files inside the rows."""

import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from absl import logging

from speech_jax import files
from speech_jax.data import audio
from speech_jax.data.sources import base, manifest

# Bytes of a group of rows, which is read at once.
_LARGEST = 1 << 30


class Place(NamedTuple):
    """Where the audio of an utterance is."""

    file: str
    group: int
    row: int


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """Utterances in groups of rows, the last of which are kept in memory.

    Reading in order is fast; reading at random costs a group each time, so prepare large corpora.
    """

    utterances: Sequence[base.Utterance]
    skipped: dict[str, str]
    places: Sequence[Place]
    column: str

    def open(self, index: int, stream: str = "audio") -> io.BytesIO:
        """Returns the audio file inside the row of `utterances[index]`."""
        if stream != "audio":
            raise base.no_stream(self.utterances[index], stream)
        place = self.places[index]
        try:
            content = _group(place.file, place.group, self.column)[place.row]["bytes"].as_py()
        except (OSError, pyarrow.ArrowException) as error:
            raise audio.AudioError(
                f"utterance {self.utterances[index].id!r} cannot be read from {place.file} "
                f"({error}); get the file again"
            ) from error
        return io.BytesIO(content)


def open_split(
    root: pathlib.Path,
    split: str,
    on_error: str,
    cache: pathlib.Path,
    *,
    audio_key: str = "audio",
    text_key: str = "",
) -> ParquetSource:
    """Opens root/split.parquet, root/split-00000-of-00002.parquet and so on, or root/split/.

    Files of shards may also be in root/data.

    Args:
      audio_key: the column of audio: {bytes, path} as `datasets` writes it.
      text_key: the column of transcripts; by default the one with a usual name (text, sentence,
        transcription, ...), none if there is none.
    """
    what = f"split {split!r} of {root}"
    paths = _files(root, split)
    kept = base.durations_file(cache, paths[0].with_suffix(""))
    known, fresh, problems = _load(kept), {}, {}
    found: dict[str, tuple[base.Utterance, Place]] = {}
    for path in paths:
        opened = _open(path)
        column = _text_key(opened.schema_arrow, audio_key, text_key, path)
        stat = path.stat()
        stamp = f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
        lengths = known.get(stamp)
        if not isinstance(lengths, list) or len(lengths) != opened.metadata.num_rows:
            lengths = None
        measured = fresh[stamp] = []
        for number, (place, row, content) in enumerate(_rows(path, opened, audio_key, not lengths)):
            measured.append(lengths[number] if lengths else _measure(content))
            try:
                utterance = _utterance(row, measured[-1], audio_key, column, path, number)
                if utterance.id in found:
                    raise ValueError(f"id {utterance.id!r} is there already; make ids unique")
                found[utterance.id] = utterance, place
            except ValueError as error:
                problems[f"{path}: row {number}"] = str(error)
    if fresh != known:
        _keep(kept, fresh)
    if not found and not problems:
        raise base.SourceError(f"{what} has no rows")
    base.settle(what, len(found), problems, on_error)
    pairs = [found[name] for name in sorted(found)]
    return ParquetSource(
        tuple(utterance for utterance, _ in pairs),
        problems,
        tuple(place for _, place in pairs),
        audio_key,
    )


def _files(root: pathlib.Path, split: str) -> list[pathlib.Path]:
    for pattern in (
        f"{split}.parquet",
        f"{split}-*-of-*.parquet",
        f"data/{split}-*-of-*.parquet",
        f"{split}/*.parquet",
    ):
        if paths := sorted(root.glob(pattern)):
            return paths
    known = sorted({path.stem.split("-")[0] for path in root.glob("**/*.parquet")})
    raise base.SourceError(
        f"there is no {split}.parquet (or {split}-00000-of-...) in {root}; it has "
        f"{base.listed(known)}"
    )


def _open(path: pathlib.Path) -> pyarrow.parquet.ParquetFile:
    try:
        opened = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise base.SourceError(
            f"{path} is damaged or no Parquet ({' '.join(str(error).split())}); get it again"
        ) from error
    for group in range(opened.num_row_groups):
        size = opened.metadata.row_group(group).total_byte_size
        if size > _LARGEST:
            raise base.SourceError(
                f"{path} has {size / 2**30:.1f} GiB in one group of rows; write it again with "
                "to_parquet(..., batch_size=100)"
            )
    return opened


def _text_key(schema: pyarrow.Schema, audio_key: str, text_key: str, path: pathlib.Path) -> str:
    """Returns the column of transcripts, '' for none; checks that of the audio."""
    names = schema.names
    kind = schema.field(audio_key).type if audio_key in names else None
    if kind is None or not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise base.SourceError(
            f"{path} has no column {audio_key!r} of audio files (a struct with bytes); its columns "
            f"are {base.listed(names)}: set data.arguments.audio_key"
        )
    if text_key and text_key not in names:
        raise base.SourceError(
            f"{path} has no column {text_key!r}; its columns are {base.listed(names)}"
        )
    usual = [name for name in ("text", *manifest.TEXT_KEYS) if name in names]
    return text_key or (usual[0] if usual else "")


def _rows(
    path: pathlib.Path, opened: pyarrow.parquet.ParquetFile, audio_key: str, listen: bool
) -> Iterator[tuple[Place, dict[str, Any], bytes | None]]:
    """Yields (place, the other columns and the path of the audio, its content) of every row."""
    schema = opened.schema_arrow
    plain = [
        name
        for name in schema.names
        if name != audio_key and not pyarrow.types.is_nested(schema.field(name).type)
    ]
    # Of audio that is not listened to only the name is read.
    wanted = [audio_key if listen else f"{audio_key}.path", *plain]
    for group in range(opened.num_row_groups):
        try:
            rows = opened.read_row_group(group, columns=wanted).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise base.SourceError(
                f"{path} is damaged ({' '.join(str(error).split())}); get it again"
            ) from error
        for number, row in enumerate(rows):
            sound = row.pop(audio_key, None) or {}
            row[audio_key] = sound.get("path") or ""
            yield Place(str(path), group, number), row, sound.get("bytes")


def _measure(content: bytes | None) -> float | str:
    """Returns the seconds of an audio file, or why there are none."""
    if not content:
        return "holds no audio, only its path; save the data set with the files embedded"
    try:
        return audio.duration(io.BytesIO(content))
    except audio.AudioError as error:
        return str(error).removeprefix("audio stream: ")


def _utterance(
    row: dict[str, Any],
    seconds: float | str,
    audio_key: str,
    text_key: str,
    path: pathlib.Path,
    number: int,
) -> base.Utterance:
    """Returns the utterance of a row. Raises ValueError saying what is wrong with it."""
    if not isinstance(seconds, float):
        raise ValueError(seconds)
    stem = pathlib.PurePath(row.pop(audio_key)).stem
    own = row.pop("id", None)
    name = str(own) if own not in (None, "") else stem or f"{path.stem}-{number:08d}"
    text = str(row.pop(text_key, None) or "").strip()
    if trouble := base.not_text(base.Row("", name, "", text)):
        raise ValueError(trouble)
    return base.Utterance(name, seconds, text, base.tags(row))


@functools.lru_cache(maxsize=2)
def _group(file: str, group: int, column: str) -> pyarrow.ChunkedArray:
    opened = pyarrow.parquet.ParquetFile(file)
    return opened.read_row_group(group, columns=[column]).column(column)


def _load(kept: pathlib.Path) -> dict[str, list]:
    try:
        return dict(json.loads(kept.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # absent or damaged: only a cache
        return {}


def _keep(kept: pathlib.Path, measured: dict[str, list]) -> None:
    try:
        files.write_atomically(kept, json.dumps(measured))
    except OSError as error:
        logging.warning("the durations cannot be kept in %s (%s)", kept, error.strerror)
