"""From a source to batches: encode the transcripts, plan the epochs, load and prefetch.

    corpus = encode_corpus(source, tokenizer, sample_rate=16000)
    buckets = corpus_buckets(corpus, count=8, batch_seconds=120)
    iterator = batches(corpus, buckets, seed=0, start=0)

A batch is a dict of numpy arrays, right-padded with zeros: `audio` int16 [B, T] samples,
`audio_length` int32 [B], `labels` int32 [B, N], `labels_length` int32 [B], `weight` float32 [B] (0
for a filler row) and `index` int32 [B], the utterance's place in its source (-1 for a filler row).
B is this host's share of the global batch.

The position in the data is one integer, the number of batches taken: `iterator.get_state()` is
{'next_index': n}. Everything random (order, speed, noise) is a function of the seed, the epoch and
the utterance, never of a thread or a host, so resuming at n gives what an uninterrupted run would
have seen.
"""

import bisect
import dataclasses
import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from speech_jax.data import audio, plan, text
from speech_jax.data.sources import Source
from speech_jax.errors import UserError

# Largest difference between the length a source states and that of the decoded audio: codecs,
# resampling and rounded manifests differ by milliseconds, a truncated file by more.
LENGTH_TOLERANCE_SECONDS = 0.1


class CorpusError(UserError):
    """An utterance that cannot be trained on, or a corpus with nothing left in it."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The utterances of a source that can be used, with their transcripts encoded.

    Attributes:
      source: where the audio comes from.
      sample_rate: of the audio in batches, in Hz.
      index: int32 [n], place of each utterance in the source.
      samples: int64 [n], length of each utterance in samples at `sample_rate`.
      labels: int32 [sum], all label sequences end to end.
      label_ends: int64 [n + 1], where each label sequence starts and the last one ends.
      crop: of audio that is longer than `samples`, a part is heard, another one in each epoch.
      left_out: utterance id -> why it is not in the corpus, starting with the kind of reason and a
        colon; what the source skipped included, in its own words.
    """

    source: Source
    sample_rate: int
    index: np.ndarray
    samples: np.ndarray
    labels: np.ndarray
    label_ends: np.ndarray
    crop: bool
    left_out: Mapping[str, str]
    _skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def seconds(self) -> float:
        """Total duration."""
        return float(self.samples.sum()) / self.sample_rate

    @property
    def label_lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.diff(self.label_ends)

    @property
    def skipped(self) -> dict[str, str]:
        """Utterance id -> why its audio could not be loaded; grows while batches are read."""
        with self._lock:
            return dict(self._skipped)

    def skip(self, name: str, reason: str) -> None:
        """Records an utterance whose audio could not be loaded (any thread may call)."""
        with self._lock:
            self._skipped[name] = reason


def encode_corpus(
    source: Source,
    tokenizer: text.Tokenizer | None,
    *,
    sample_rate: int,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    output_lengths: Callable[[np.ndarray], np.ndarray] | None = None,
    max_speed: float = 1.0,
    crop: bool = False,
    on_error: str = "raise",
) -> Corpus:
    """Encodes every transcript and leaves out the utterances that cannot be used.

    Utterances outside [min_seconds, max_seconds] are left out, as asked. A transcript with an
    unknown character, or one with more labels (and blanks between repeated labels) than the encoder
    gives frames, is a fault: it raises, or is left out where `on_error` is 'skip'. Either way
    `left_out` names the utterance and the reason.

    Args:
      source: utterances with durations.
      tokenizer: encodes transcripts; None for audio alone (label sequences are then empty).
      sample_rate: of the batches, in Hz.
      min_seconds: shorter utterances are left out.
      max_seconds: longer utterances are left out, or with `crop` cut to so much of themselves.
      output_lengths: the encoder's count of frames for a count of samples (int [n] -> int [n]);
        None if the task needs no alignment.
      max_speed: the largest speed factor that will be used: the frames must suffice then.
      crop: for audio alone, whose parts are as good as the whole.
      on_error: 'raise' or 'skip'.

    Raises:
      CorpusError: a faulty utterance with 'raise', or nothing left.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    utterances = source.utterances
    seconds = np.asarray([utterance.duration for utterance in utterances], np.float64)
    if crop:
        seconds = np.minimum(seconds, max_seconds)
    samples = np.ceil(np.round(seconds * sample_rate, 3)).astype(np.int64)
    frames = np.full(len(samples), np.iinfo(np.int64).max)
    if output_lengths is not None and len(samples):
        frames = np.asarray(output_lengths(plan.perturbed_samples(samples, max_speed)))

    left_out: dict[str, str] = {}
    index, labels = [], []
    for place, utterance in enumerate(utterances):
        if samples[place] < 1 or seconds[place] < min_seconds:
            left_out[utterance.id] = f"too short: {seconds[place]:.2f} s"
        elif seconds[place] > max_seconds:
            left_out[utterance.id] = f"too long: {seconds[place]:.2f} s"
        else:
            try:
                labels.append(_encode(tokenizer, utterance, frames[place]))
                index.append(place)
            except CorpusError as error:
                if on_error == "raise":
                    raise CorpusError(
                        f"utterance {utterance.id}: {error}; correct it, or leave such utterances "
                        "out with on_error='skip'"
                    ) from error
                left_out[utterance.id] = str(error)
    if not index:
        counts = Counter(reason.partition(":")[0] for reason in left_out.values())
        if source.skipped:
            counts["skipped by the source"] = len(source.skipped)
        why = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise CorpusError(f"no utterances left to use ({why or 'the source is empty'})")
    return Corpus(
        source=source,
        sample_rate=sample_rate,
        index=np.asarray(index, np.int32),
        samples=samples[index],
        labels=np.concatenate(labels),
        label_ends=np.cumsum([0] + [len(encoded) for encoded in labels]),
        crop=crop,
        left_out=dict(source.skipped) | left_out,
    )


def _encode(tokenizer, utterance, frames) -> np.ndarray:
    """Returns the labels of an utterance that has `frames` frames, or raises CorpusError."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    try:
        labels = np.asarray(tokenizer.encode(utterance.text), np.int32)
    except text.UnknownCharacterError as error:
        raise CorpusError(f"unknown character: {error}") from error
    needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
    if frames < needed:
        raise CorpusError(
            f"not alignable: {len(labels)} labels need {needed} frames, "
            f"{utterance.duration:.2f} s of audio has {frames}"
        )
    return labels


def corpus_buckets(
    corpus: Corpus,
    *,
    count: int,
    batch_seconds: float,
    rows_multiple: int = 1,
    round_seconds: float = 0.1,
    speeds: Sequence[float] = (1.0,),
) -> tuple[plan.Bucket, ...]:
    """Chooses batch shapes for a corpus played at `speeds`: `plan.choose_buckets` in seconds."""
    return plan.choose_buckets(
        np.concatenate([plan.perturbed_samples(corpus.samples, speed) for speed in speeds]),
        np.tile(corpus.label_lengths, len(speeds)),
        count=count,
        batch_samples=int(batch_seconds * corpus.sample_rate),
        rows_multiple=rows_multiple,
        round_to=max(1, round(round_seconds * corpus.sample_rate)),
    )


@dataclasses.dataclass(frozen=True)
class Noise:
    """Files of noise, the fraction of utterances that get it, and the range of ratios in dB."""

    files: tuple[str, ...]
    probability: float
    snr_db: tuple[float, float]


def open_noise(folder: str, *, probability: float, snr_db: tuple[float, float]) -> Noise:
    """Lists the noise files in a folder and below it.

    Raises:
      CorpusError: the folder is missing or holds no audio files, or the values make no sense.
    """
    low, high = snr_db
    if not 0 <= probability <= 1 or low > high:
        raise CorpusError(
            "noise needs a probability between 0 and 1 and an ascending range of dB, got "
            f"{probability} and {snr_db}"
        )
    if not os.path.isdir(folder):
        raise CorpusError(f"noise folder {folder} does not exist")
    files = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower().removeprefix(".") in audio.EXTENSIONS
    )
    if not files:
        raise CorpusError(f"noise folder {folder} holds no audio files")
    return Noise(tuple(files), probability, (low, high))


def batches(
    corpus: Corpus,
    buckets: Sequence[plan.Bucket],
    *,
    seed: int = 0,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    repeat: bool = True,
    speeds: Sequence[float] = (1.0,),
    noise: Noise | None = None,
    on_error: str = "raise",
    threads: int = 4,
) -> grain.DatasetIterator:
    """Iterates over batches of this host's rows, loading ahead in threads.

    Args:
      corpus: what to read.
      buckets: the batch shapes, as from `corpus_buckets` (with the same `speeds`).
      seed: of order, speeds and noise.
      start: how many batches were taken before, by whatever number of hosts.
      process_index: this host.
      process_count: number of hosts; it must divide every bucket's rows.
      shuffle: False for evaluation: by duration.
      repeat: False for evaluation: one epoch, then StopIteration.
      speeds: factors of speed perturbation (Ko et al., "Audio augmentation for speech recognition",
        2015).
      noise: what to add; None for nothing.
      on_error: audio that cannot be loaded raises ('raise'), or its row becomes filler and
        `corpus.skipped` names it ('skip').
      threads: batches loaded at the same time, which is also how many wait in memory; 0 loads in
        the caller.

    Returns:
      A grain iterator with `get_state`, `set_state` and `close`.

    Raises:
      ValueError: arguments that do not fit together. While iterating: audio.AudioError for audio
        that cannot be loaded.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    for bucket in buckets:
        if bucket.rows % process_count:
            raise ValueError(
                f"{bucket.rows} rows of {bucket} cannot be shared by {process_count} hosts: "
                "choose buckets with rows_multiple a multiple of the number of hosts"
            )
    load = functools.partial(
        _load,
        corpus=corpus,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        noise=noise,
        on_error=on_error,
    )
    planned = _Batches(corpus, buckets, seed=seed, shuffle=shuffle, repeat=repeat, speeds=speeds)
    iterator = iter(
        grain.MapDataset.source(planned)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    )
    iterator.set_state({"next_index": start})
    return iterator


class _Batches:
    """The batches of all epochs as one random-access sequence of (epoch, PlannedBatch)."""

    def __init__(self, corpus, buckets, *, seed, shuffle, repeat, speeds):
        arguments = (corpus.samples, corpus.label_lengths, tuple(buckets))
        options = {"seed": seed, "speeds": tuple(speeds)}
        self._count = lambda epoch: plan.count_batches(*arguments, **options, epoch=epoch)
        self._plan = functools.lru_cache(maxsize=2)(  # prefetching reads across the end of an epoch
            lambda epoch: plan.plan_epoch(*arguments, **options, epoch=epoch, shuffle=shuffle)
        )
        self._repeat = repeat
        self._ends = [self._count(0)]  # the number of batches in epochs 0, 0 to 1, 0 to 2, ...
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize if self._repeat else self._ends[0]

    def __getitem__(self, index: int) -> tuple[int, plan.PlannedBatch]:
        with self._lock:
            while self._ends[-1] <= index:
                self._ends.append(self._ends[-1] + self._count(len(self._ends)))
            epoch = bisect.bisect_right(self._ends, index)
            return epoch, self._plan(epoch)[index - (self._ends[epoch - 1] if epoch else 0)]


def _load(element, *, corpus, seed, process_index, process_count, noise, on_error) -> dict:
    epoch, (bucket, ids, speeds) = element
    rows = bucket.rows // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    batch = {
        "audio": np.zeros((rows, bucket.samples), np.int16),
        "audio_length": np.zeros(rows, np.int32),
        "labels": np.zeros((rows, bucket.labels), np.int32),
        "labels_length": np.zeros(rows, np.int32),
        "weight": np.zeros(rows, np.float32),
        "index": np.full(rows, -1, np.int32),
    }
    for row, (i, speed) in enumerate(zip(ids[mine], speeds[mine], strict=True)):
        if i < 0:
            continue
        place = int(corpus.index[i])
        try:
            samples = _load_audio(
                corpus, i, float(plan.exact_speed(speed)), noise, [seed, epoch, 2, place]
            )
        except audio.AudioError as error:
            if on_error == "raise":
                raise
            corpus.skip(corpus.source.utterances[place].id, str(error))
            continue
        samples = samples[: bucket.samples]
        labels = corpus.labels[corpus.label_ends[i] : corpus.label_ends[i + 1]]
        batch["audio"][row, : len(samples)] = samples
        batch["audio_length"][row] = len(samples)
        batch["labels"][row, : len(labels)] = labels
        batch["labels_length"][row] = len(labels)
        batch["weight"][row] = 1
        batch["index"][row] = place
    return batch


def _load_audio(corpus, i, speed, noise, key) -> np.ndarray:
    """Decodes utterance i, crops it, changes its speed, adds noise as `key` says. int16 [T]."""
    rng = np.random.default_rng(key)
    utterance = corpus.source.utterances[corpus.index[i]]
    samples = audio.decode(corpus.source.open(int(corpus.index[i])), corpus.sample_rate)
    stated = utterance.duration * corpus.sample_rate
    if abs(len(samples) - stated) > LENGTH_TOLERANCE_SECONDS * corpus.sample_rate:
        raise audio.AudioError(
            f"utterance {utterance.id}: its audio lasts {len(samples) / corpus.sample_rate:.2f} s, "
            f"its source states {utterance.duration:.2f} s; correct the one that is wrong"
        )
    length = int(corpus.samples[i])
    if corpus.crop and len(samples) > length:
        samples = samples[rng.integers(len(samples) - length + 1) :][:length]
    samples = audio.change_speed(samples, speed)
    if noise is not None and rng.random() < noise.probability:
        extra = _decode_noise(noise.files[rng.integers(len(noise.files))], corpus.sample_rate)
        snr_db = rng.uniform(*noise.snr_db)
        samples = audio.add_noise(samples, extra, snr_db, int(rng.integers(len(extra))))
    return samples


@functools.lru_cache(maxsize=16)
def _decode_noise(file: str, sample_rate: int) -> np.ndarray:
    return audio.decode(file, sample_rate)
