"""Prepares a corpus for training: many audio files become a few TFDS files in ArrayRecord format.

A prepared corpus opens at once, reads fast from network storage, and is one folder to copy.

  python -m speech_jax.data.prepare --source=librispeech --root=data/LibriSpeech \\
      --splits=train-clean-100,dev-clean --out=data/prepared

What a source takes beside its root and split (config.data.arguments in training) is given by
--arguments, as in --source=manifest --arguments=text_key=transcript,trust_durations=True.

Then train with --config.data.source=prepared --config.data.root=data/prepared.

Each split becomes a TFDS dataset of its own, OUT/utterances/SPLIT/1.1.0, so that splits can be
added later. It holds FLAC audio (FLAC files as they are, other formats as 16-bit FLAC that decodes
to the same samples), text, tags (a JSON object) and duration, and reads also with
tfds.data_source("utterances/SPLIT", split="train", data_dir=OUT). All audio is decoded once, so
damaged files are found here. A split appears only when it is complete; one that is there already
is left alone unless --overwrite is given.

Encoding runs in --workers processes. For a corpus beyond one machine, --beam_runner writes the
shards in parallel on Apache Beam (pip install "speech_jax[beam]"). The rest needs only
pip install "speech_jax[tfds]", and no TensorFlow.
"""

import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging
from array_record.python.array_record_data_source import ArrayRecordDataSource

from speech_jax.data import audio, sources
from speech_jax.data.sources import prepared
from speech_jax.errors import UserError
from speech_jax.files import expand, is_remote

Encoded = tuple[bytes, int, int] | str  # (FLAC, samples, rate), or why there is none


class Utterances(tfds.core.ShardBasedBuilder, skip_registration=True):
    """One split of a corpus as a TFDS dataset, whose config has the name of the split.

    It is built shard by shard, because TFDS's builders for plain generators spill to disk through
    TensorFlow as soon as a dataset is larger than 1 GB.
    """

    VERSION = tfds.core.Version(prepared.VERSIONS[0])

    def __init__(self, *, shards: Sequence[Callable[[], Iterator]] = (), **kwargs):
        self._shards = shards
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "flac": tfds.features.Scalar(np.bytes_),
            "text": tfds.features.Text(),
            "tags": tfds.features.Text(),  # a JSON object of strings
            "duration": tfds.features.Scalar(np.float32),  # seconds; samples / rate is exact
            "samples": tfds.features.Scalar(np.int64),
            "rate": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Utterances prepared by speech_jax.data.prepare.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        return {prepared.SPLIT: self._shards}

    def _download_and_prepare(self, dl_manager, download_config=None):
        super()._download_and_prepare(dl_manager, download_config)
        # TFDS 4.9.10 puts the lengths of shards that Beam wrote in the order of their numbers as
        # text ("10" before "2"), so that records are not found: count them anew, in order.
        split = self.info.splits[prepared.SPLIT]
        lengths = [len(ArrayRecordDataSource([str(file)])) for file in split.filepaths]
        if not any(lengths):
            name = self.builder_config.name
            raise sources.SourceError(f"every utterance of split {name!r} was skipped")
        self.info.set_splits(tfds.core.splits.SplitDict([split.replace(shard_lengths=lengths)]))


# ---- Writing -----------------------------------------------------------------------------------


def prepare(
    source: sources.Source,
    split: str,
    out: str | os.PathLike,
    *,
    workers: int = 1,
    on_error: str = "raise",
    overwrite: bool = False,
    shard_hours: float = 4.0,
    beam_runner: Any = None,
    beam_options: Sequence[str] = (),
) -> dict[str, str] | None:
    """Writes `source` as the prepared `split` below `out`.

    Returns what was skipped and why, or None for a split that is there already.

    Args:
      workers: processes that decode and encode.
      on_error: 'raise' for audio that cannot be decoded, or 'skip' to leave it out.
      overwrite: whether to replace the split where it exists; otherwise it is left as it is.
      shard_hours: hours of speech in a file; one file of encoded audio is held in memory.
      beam_runner: the name of an Apache Beam runner that writes the shards, in place of `workers`.
      beam_options: Beam's pipeline options as NAME=VALUE.

    Raises:
      SourceError: for audio that cannot be decoded, a split whose name TFDS cannot have, and a
        source that is prepared already.
    """
    if not re.fullmatch(r"[\w.+-]+", split):
        raise sources.SourceError(f"split {split!r} must be of letters, digits and any of _ . + -")
    if is_remote(out):
        raise sources.SourceError(
            f"out={out} is in a bucket, where no file can be written in parts: prepare the "
            "data on a disk, then copy its folder there; training reads it from both"
        )
    out = expand(out)
    folder = prepared.folder_of(out, split)
    if folder.exists() and not overwrite:
        return None
    if isinstance(source, prepared.PreparedSource):
        raise sources.SourceError(f"split {split!r} is prepared already; copy its folder instead")
    shards = [
        Shard(sources.select(source, range(start, stop)), on_error)
        for start, stop in _shard_bounds(source.utterances, shard_hours * 3600)
    ]
    skipped: dict[str, str] = {}
    config = tfds.download.DownloadConfig()
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if beam_runner:
            pipeline_options = _import_beam()
            arguments = [f"--{option}" for option in beam_options]
            config.beam_runner = beam_runner
            config.beam_options = pipeline_options.PipelineOptions(arguments)
        else:
            encode = stack.enter_context(_encoder(workers))
            progress = stack.enter_context(prepared.progress_bar())
            task = progress.add_task(f"Preparing {split}", total=len(source.utterances))
            local = _Local(encode, skipped, lambda: progress.advance(task))
            shards = [dataclasses.replace(shard, local=local) for shard in shards]
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{split}-", dir=out))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # TFDS's own progress
        builder = Utterances(
            shards=shards, data_dir=temporary, config=tfds.core.BuilderConfig(name=split)
        )
        builder.download_and_prepare(download_dir=f"{temporary}/downloads", download_config=config)
        written = prepared.folder_of(temporary, split)
        prepared.load_index(written, prepared.records(written), sources.default_cache())
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # of an older version, it may be
            shutil.rmtree(folder)
        os.rename(written, folder.with_name(written.name))
    return skipped


def _import_beam() -> Any:
    try:
        from apache_beam.options import pipeline_options
    except ModuleNotFoundError as error:
        raise sources.SourceError(
            "--beam_runner needs Apache Beam; install it with pip install 'speech_jax[beam]'"
        ) from error
    return pipeline_options


@dataclasses.dataclass(frozen=True)
class _Local:
    """What the shards share when one process writes them: encoder, skips, progress."""

    encode: Callable[[Iterable[sources.File]], Iterator[Encoded]]
    skipped: dict[str, str]
    advance: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Generates the examples of one file. Without `local` it can be sent to another machine."""

    source: sources.Source
    on_error: str
    local: _Local | None = None

    def __call__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (id, example) in order."""
        encode = self.local.encode if self.local else _encode_serially
        utterances = self.source.utterances
        files = map(self.source.open, range(len(utterances)))
        for utterance, encoded in zip(utterances, encode(files), strict=True):
            if self.local:
                self.local.advance()
            if isinstance(encoded, str):
                if self.on_error == "raise":
                    raise sources.SourceError(
                        f"utterance {utterance.id!r}: {encoded}; restore or delete it, or leave "
                        "such files out with --on_error=skip"
                    )
                logging.warning("skipped utterance %s: %s", utterance.id, encoded)
                if self.local:
                    self.local.skipped[utterance.id] = encoded
                continue
            flac, samples, rate = encoded
            yield (
                utterance.id,
                {
                    "id": utterance.id,
                    "flac": flac,
                    "text": utterance.text,
                    "tags": json.dumps(dict(utterance.tags), ensure_ascii=False),
                    "duration": samples / rate,
                    "samples": samples,
                    "rate": rate,
                },
            )


def _shard_bounds(utterances: Sequence[sources.Utterance], seconds: float) -> list[tuple[int, int]]:
    """Cuts the utterances into runs of about `seconds` each: [(start, stop)]."""
    ends = np.cumsum([utterance.duration for utterance in utterances])
    count = max(1, round(ends[-1] / seconds))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right")
    cuts = sorted({0, *cuts.tolist(), len(utterances)})
    return list(itertools.pairwise(cuts))


@contextlib.contextmanager
def _encoder(workers: int) -> Iterator[Callable[[Iterable[sources.File]], Iterator[Encoded]]]:
    """Yields a function that encodes files in order, in `workers` processes."""
    if workers <= 1:
        yield _encode_serially
        return
    # Spawned: the parent has threads by now (progress, TFDS), which a fork does not survive.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    )

    def encode(files: Iterable[sources.File]) -> Iterator[Encoded]:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for file in files:
            waiting.append(pool.submit(_encode, file))
            if len(waiting) >= 4 * workers:  # bounds what is encoded and not yet written
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield encode
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_serially(files: Iterable[sources.File]) -> Iterator[Encoded]:
    return map(_encode, files)


def _encode(file: sources.File) -> Encoded:
    try:
        return audio.to_flac(file)
    except audio.AudioError as error:
        return str(error)


# ---- Command -----------------------------------------------------------------------------------


def define_flags() -> None:
    """Defines the command's flags; not at import, since training imports this module too."""
    kinds = [kind for kind in sources.SOURCES if kind != "prepared"]
    flags.DEFINE_enum("source", "librispeech", kinds, "Kind of the corpus.")
    flags.DEFINE_string("root", "", "Folder of the corpus.")
    flags.DEFINE_list(
        "arguments", [], "Further arguments of the source, such as text_key: NAME=VALUE,..."
    )
    flags.DEFINE_list("splits", [], "Splits to prepare, separated by commas.")
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes that encode.", lower_bound=1)
    flags.DEFINE_enum(
        "on_error", "raise", ["raise", "skip"], "Whether a bad utterance ends it or is left out."
    )
    flags.DEFINE_bool("overwrite", False, "Replace splits that are there already.")
    flags.DEFINE_float("shard_hours", 4.0, "Hours of speech in a file.", lower_bound=1e-6)
    flags.DEFINE_string("cache", None, "Folder for derived data [~/.cache/speech_jax].")
    flags.DEFINE_string("beam_runner", None, "Apache Beam runner, for example DirectRunner.")
    flags.DEFINE_list("beam_options", [], "Beam's pipeline options: NAME=VALUE,...")


def _argument(given: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE: a Python literal, or else a text."""
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise sources.SourceError(f"--arguments={given}: give NAME=VALUE, as text_key=transcript")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main(argv: Sequence[str]) -> None:
    """Prepares every split that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
    args = flags.FLAGS
    if not args.splits:
        raise app.UsageError("--splits names no split; for example --splits=train-clean-100")
    written: set[str] = set()
    try:
        arguments = dict(map(_argument, args.arguments))
        for named in args.splits:
            split = pathlib.PurePath(named).name.removesuffix(".jsonl")  # a manifest by its path
            if split in written:
                raise sources.SourceError(
                    f"{named} would be prepared as {split!r}, which another split of this command "
                    "already is; prepare it into another folder, or rename it"
                )
            written.add(split)
            source = sources.open_source(
                args.source,
                root=args.root,
                split=named,
                on_error=args.on_error,
                cache=args.cache,
                **arguments,
            )
            skipped = prepare(
                source,
                split,
                args.out,
                workers=args.workers,
                on_error=args.on_error,
                overwrite=args.overwrite,
                shard_hours=args.shard_hours,
                beam_runner=args.beam_runner,
                beam_options=args.beam_options,
            )
            folder = prepared.folder_of(args.out, split)
            if skipped is None:
                print(f"{split}: {folder} is left as it is; --overwrite replaces it")
                continue
            skipped = source.skipped | skipped
            print(f"{split}: {folder}, {len(skipped)} utterances skipped")
            for name, why in skipped.items():
                print(f"  skipped {name}: {why}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # Under its own name, so that what is sent to other processes can be found there.
    from speech_jax.data import prepare as module

    module.define_flags()
    flags.adopt_module_key_flags(module)
    app.run(module.main)
