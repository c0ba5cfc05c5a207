"""From a source to batches: which utterances can be used, the plan of the epochs, the loader.

    corpus = make_corpus(source, parts)
    plan = Plan(corpus.lengths, "samples", corpus.buckets(along="samples", count=8, budget=...))
    iterator = batches(corpus, plan, start=0)

The position in the data is one integer, the number of batches taken: `iterator.get_state()` is
{'next_index': n}. Everything random (order, speed, noise) is a function of the seed, the epoch and
the utterance, never of a thread or a host, so resuming at n gives what an uninterrupted run would
have seen.
"""

import bisect
import dataclasses
import functools
import hashlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from speech_jax.data.batch import Bucket, Example, Fields, collate, size_names
from speech_jax.data.parts import Part, PartError
from speech_jax.data.plan import Plan, PlannedBatch, choose_buckets, exact_speed, stretched_length
from speech_jax.data.sources import Source
from speech_jax.errors import UserError


class CorpusError(UserError):
    """An utterance that cannot be used, or a corpus with nothing left in it."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The utterances of a source that can be used, and how long their arrays are.

    Attributes:
      source: where the utterances come from.
      parts: what they bring to a batch.
      index: int32 [n], the index of each utterance in its source.
      lengths: int64 [n] of each utterance by the dimensions of the parts' fields.
      left_out: utterance id -> why it is not in the corpus, starting with the kind of reason and a
        colon; what the source skipped included, in its own words.
    """

    source: Source
    parts: Mapping[str, Part]
    index: np.ndarray
    lengths: Mapping[str, np.ndarray]
    left_out: Mapping[str, str]
    _skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def fields(self) -> Fields:
        """The arrays of its batches."""
        return {name: field for part in self.parts.values() for name, field in part.fields.items()}

    @property
    def stretched(self) -> tuple[str, ...]:
        """The dimensions that get shorter when an utterance is played faster."""
        return tuple(name for part in self.parts.values() for name in part.stretched)

    @property
    def seconds(self) -> float:
        """The duration of its utterances, whole ones."""
        return float(sum(self.source.utterances[index].duration for index in self.index))

    @property
    def skipped(self) -> dict[str, str]:
        """Utterance id -> why its audio could not be loaded; grows while batches are read."""
        with self._lock:
            return dict(self._skipped)

    def skip(self, name: str, reason: str) -> None:
        """Records an utterance whose audio could not be loaded (any thread may call)."""
        with self._lock:
            self._skipped[name] = reason

    def fingerprint(self) -> str:
        """A digest of the utterances and their lengths: what a plan's order depends on."""
        digest = hashlib.sha256()
        for index in self.index:
            digest.update(self.source.utterances[index].id.encode("utf-8", "surrogatepass") + b"\0")
        for name in sorted(self.lengths):
            digest.update(name.encode() + np.asarray(self.lengths[name], np.int64).tobytes())
        return digest.hexdigest()[:16]

    def buckets(
        self,
        *,
        along: str,
        count: int,
        budget: int,
        rows_multiple: int = 1,
        round_to: int = 1,
        speeds: Sequence[float] = (1.0,),
    ) -> tuple[Bucket, ...]:
        """Batch shapes for the corpus played at `speeds`: `plan.choose_buckets`.

        The budget is in samples where there is audio.
        """
        lengths = {
            name: np.concatenate(
                [
                    stretched_length(values, speed) if name in self.stretched else values
                    for speed in speeds
                ]
            )
            for name, values in self.lengths.items()
        }
        return choose_buckets(
            lengths,
            along=along,
            count=count,
            budget=budget,
            budget_of="samples" if "samples" in lengths else along,
            rows_multiple=rows_multiple,
            round_to=round_to,
        )


def make_corpus(
    source: Source,
    parts: Mapping[str, Part],
    *,
    unusable: Callable[[Mapping[str, np.ndarray]], Mapping[int, str]] | None = None,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    max_speed: float = 1.0,
    on_error: str = "raise",
) -> Corpus:
    """Measures every utterance and leaves out those that cannot be used.

    Utterances outside [min_seconds, max_seconds] are left out, as asked. One that lacks a part, or
    that the task finds unusable, is a fault: it raises, or is left out where `on_error` is 'skip'.
    Either way the reason names the utterance.

    Args:
      source: utterances with durations.
      parts: what they bring to a batch.
      unusable: of the sizes of utterances, int [n] by name: position -> why the task cannot use it.
      min_seconds: shorter utterances are left out.
      max_seconds: longer utterances are left out, unless their audio is cropped.
      max_speed: the largest speed factor that will be used: sizes are of utterances so played.
      on_error: 'raise' or 'skip'.

    Raises:
      CorpusError: a faulty utterance with 'raise', or nothing left.
    """
    found, left_out = {}, {}

    def leave_out(index: int, reason: str) -> None:
        name = source.utterances[index].id
        if on_error == "raise":
            raise CorpusError(
                f"utterance {name}: {reason}; correct it, or leave such utterances out with "
                "on_error='skip'"
            )
        left_out[name] = reason

    for index, utterance in enumerate(source.utterances):
        seconds = min([utterance.duration, *(part.longest for part in parts.values())])
        if seconds < min_seconds:
            left_out[utterance.id] = f"too short: {seconds:.2f} s"
        elif seconds > max_seconds:
            left_out[utterance.id] = f"too long: {seconds:.2f} s"
        else:
            try:
                found[index] = _sizes(parts, utterance)
            except PartError as error:
                leave_out(index, str(error))
    stretched = {name for part in parts.values() for name in part.stretched}
    sizes = _columns(found.values())
    if unusable and found:
        fast = {
            name: stretched_length(values, max_speed) if name in stretched else values
            for name, values in sizes.items()
        }
        indices = list(found)
        for position, reason in unusable(fast).items():
            leave_out(indices[position], reason)
            del found[indices[position]]
        sizes = _columns(found.values())
    if not found:
        counts = Counter(reason.partition(":")[0] for reason in left_out.values())
        if source.skipped:
            counts["skipped by the source"] = len(source.skipped)
        why = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        first = "; the first is utterance " + ": ".join(next(iter(left_out.items()), ("", "")))
        raise CorpusError(
            f"no utterances left to use ({why or 'the source is empty'})"
            + (first if left_out else "")
        )
    named = size_names({k: field for part in parts.values() for k, field in part.fields.items()})
    return Corpus(
        source=source,
        parts=parts,
        index=np.asarray(list(found), np.int32),
        lengths={name: sizes[name] for name in named},
        left_out=dict(source.skipped) | left_out,
    )


def _sizes(parts: Mapping[str, Part], utterance) -> dict[str, int]:
    return {name: size for part in parts.values() for name, size in part.sizes(utterance).items()}


def _columns(rows) -> dict[str, np.ndarray]:
    rows = list(rows)
    names = rows[0] if rows else ()
    return {name: np.asarray([row[name] for row in rows], np.int64) for name in names}


def batches(
    corpus: Corpus,
    plan: Plan,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
    on_error: str = "raise",
    threads: int = 4,
) -> grain.DatasetIterator:
    """Iterates over batches of this host's rows, loading ahead in threads.

    Args:
      corpus: what to read.
      plan: the order, and the batch shapes.
      start: how many batches were taken before, by whatever number of hosts.
      process_index: this host.
      process_count: number of hosts; it must divide every bucket's rows.
      repeat: False for evaluation: one epoch, then StopIteration.
      on_error: an utterance that cannot be loaded raises ('raise'), or its row becomes filler and
        `corpus.skipped` names it ('skip').
      threads: batches loaded at the same time, which is also how many wait in memory; 0 loads in
        the caller.

    Returns:
      A grain iterator with `get_state`, `set_state` and `close`.

    Raises:
      ValueError: arguments that do not fit together. While iterating: UserError for an utterance
        that cannot be loaded.
    """
    for bucket in plan.buckets:
        if bucket.rows % process_count:
            raise ValueError(
                f"{bucket} cannot be shared by {process_count} hosts: choose buckets with "
                "rows_multiple a multiple of the number of hosts"
            )
    load = functools.partial(
        _load,
        corpus=corpus,
        seed=plan.seed,
        process_index=process_index,
        process_count=process_count,
        on_error=on_error,
    )
    iterator = iter(
        grain.MapDataset.source(_Batches(plan, repeat))
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    )
    iterator.set_state({"next_index": start})
    return iterator


def first_row(corpus: Corpus, **sizes: int) -> dict[str, np.ndarray] | None:
    """A batch of the first utterance that can be read, cut to `sizes`; None where there is none."""
    for index in map(int, corpus.index):
        try:
            example = _example(corpus, index, np.random.default_rng(0), 1.0)
        except UserError:  # evaluations count them
            continue
        return collate(corpus.fields, Bucket(1, tuple(sizes.items())), [(index, example)])
    return None


class _Batches:
    """The batches of all epochs as one random-access sequence of (epoch, PlannedBatch)."""

    def __init__(self, plan: Plan, repeat: bool):
        self._count = plan.count
        # Prefetching reads across the end of an epoch.
        self._epoch = functools.lru_cache(maxsize=2)(plan.epoch)
        self._repeat = repeat
        self._ends = [plan.count(0)]  # the number of batches in epochs 0, 0 to 1, 0 to 2, ...
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize if self._repeat else self._ends[0]

    def __getitem__(self, index: int) -> tuple[int, PlannedBatch]:
        with self._lock:
            while self._ends[-1] <= index:
                self._ends.append(self._ends[-1] + self._count(len(self._ends)))
            epoch = bisect.bisect_right(self._ends, index)
            return epoch, self._epoch(epoch)[index - (self._ends[epoch - 1] if epoch else 0)]


def _load(
    element: tuple[int, PlannedBatch],
    *,
    corpus: Corpus,
    seed: int,
    process_index: int,
    process_count: int,
    on_error: str,
) -> dict[str, np.ndarray]:
    epoch, (bucket, ids, speeds) = element
    rows = bucket.rows // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    loaded: list[tuple[int, Example] | None] = []
    for i, speed in zip(ids[mine], speeds[mine], strict=True):
        if i < 0:
            loaded.append(None)
            continue
        index = int(corpus.index[i])
        rng = np.random.default_rng([seed, epoch, 2, index])
        try:
            loaded.append((index, _example(corpus, index, rng, float(exact_speed(speed)))))
        except UserError as error:  # what a part, a source or a decoder says of this utterance
            if on_error == "raise":
                raise
            corpus.skip(corpus.source.utterances[index].id, str(error))
            loaded.append(None)
    return collate(corpus.fields, bucket._replace(rows=rows), loaded)


def _example(corpus: Corpus, index: int, rng: np.random.Generator, speed: float) -> Example:
    example: dict[str, np.ndarray] = {}
    for part in corpus.parts.values():
        example |= part.load(corpus.source, index, rng, speed)
    return example
