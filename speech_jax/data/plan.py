"""The batch plan: which utterances share a batch, as a pure function of lengths, seed and epoch.

An accelerator compiles one program a shape, so batches come in a few shapes only
(`choose_buckets`), each holding about the same number of samples. `Plan.epoch` fills them so that
every utterance is seen exactly once an epoch. The plan is the same on every host: hosts then load
their own rows of each batch, and the order of the data depends neither on how many hosts there are
nor on whether the run was interrupted.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from speech_jax.data.batch import Bucket

# Lengths of all utterances by the name of a dimension: int [n] each.
Lengths = Mapping[str, np.ndarray]

# Dimensions other than the one that buckets are made by are rounded up to this.
MULTIPLE = 8


class PlannedBatch(NamedTuple):
    """A bucket and the utterances that fill it."""

    bucket: Bucket
    ids: np.ndarray  # int32 [rows], -1 for a filler row
    speeds: np.ndarray  # float32 [rows], 1 for a filler row


def stretched_length(length: np.ndarray, speeds: np.ndarray | float) -> np.ndarray:
    """The length (int64, rounded up) of what is played `speeds` times as fast."""
    return np.ceil(np.asarray(length) / exact_speed(speeds)).astype(np.int64)


def exact_speed(speeds: np.ndarray | float) -> np.ndarray:
    """The decimal fraction that a speed in a plan (float32) stands for, such as 0.9 (float64)."""
    return np.round(np.asarray(speeds, np.float64), 6)


def choose_buckets(
    lengths: Lengths,
    *,
    along: str,
    count: int,
    budget: int,
    budget_of: str = "",
    rows_multiple: int = 1,
    round_to: int = 1600,
) -> tuple[Bucket, ...]:
    """Chooses the `count` batch shapes that need the least padding along one dimension.

    Lengths are rounded up to `round_to`; over their histogram, an exact dynamic program finds the
    `count` bucket lengths with the least padding (its time grows with the square of the number of
    distinct rounded lengths). The other dimensions of a bucket are as long as the longest of all
    utterances that are no longer than it, because it also takes leftovers of shorter buckets. Its
    rows hold at most `budget` in all, rounded down to `rows_multiple`, except that there are never
    fewer than `rows_multiple` of them, nor more than the utterances there are (rounded up).

    Args:
      lengths: int [n] for each named dimension; with speed perturbation, at every speed.
      along: the dimension that buckets are made by.
      count: number of shapes; fewer come back if there are fewer distinct rounded lengths.
      budget: of a batch, padding included, in units of the dimension `budget_of` (or `along`).
      rows_multiple: what the rows must divide by: the devices along the batch axis.
      round_to: granularity of the bucket lengths.

    Returns:
      The buckets, by ascending length.

    Raises:
      ValueError: no utterances, or arguments that are not positive.
    """
    lengths = {name: np.asarray(values, np.int64) for name, values in lengths.items()}
    for name, value in (
        ("count", count),
        ("budget", budget),
        ("rows_multiple", rows_multiple),
        ("round_to", round_to),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not len(lengths[along]):
        raise ValueError("no utterances to choose buckets for")

    edges, inverse, counts = np.unique(
        np.maximum(-(-lengths[along] // round_to), 1) * round_to,
        return_inverse=True,
        return_counts=True,
    )
    longest = {name: _running_maximum(values, inverse) for name, values in lengths.items()}
    longest = {
        name: np.maximum(-(-most // MULTIPLE), 1) * MULTIPLE for name, most in longest.items()
    }
    longest[along] = edges
    most_rows = -(-len(inverse) // rows_multiple) * rows_multiple
    buckets = []
    for edge in _best_edges(edges, counts, min(count, len(edges))):
        sizes = tuple((name, int(values[edge])) for name, values in longest.items())
        rows = budget // int(longest[budget_of or along][edge]) // rows_multiple * rows_multiple
        buckets.append(Bucket(min(max(rows, rows_multiple), most_rows), sizes))
    return tuple(buckets)


def _running_maximum(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The largest of `values` [n] in each group and all groups before it."""
    largest = np.zeros(groups.max() + 1, np.int64)
    np.maximum.at(largest, groups, values)
    return np.maximum.accumulate(largest)


def _best_edges(edges: np.ndarray, counts: np.ndarray, groups: int) -> list[int]:
    """Cuts the histogram into `groups` runs, each padded to its last edge, at the least total."""
    n = len(edges)
    before = np.concatenate([[0], np.cumsum(counts)])  # utterances left of each edge
    # best[g, j]: the fewest samples that hold the first j edges in g groups.
    best = np.full((groups + 1, n + 1), np.inf)
    best[0, 0] = 0
    cut = np.zeros((groups + 1, n + 1), np.int64)
    for j in range(1, n + 1):
        total = best[:groups, :j] + edges[j - 1] * (before[j] - before[:j])
        cut[1:, j] = total.argmin(axis=1)
        best[1:, j] = total.min(axis=1)
    chosen, end = [], n
    for group in range(groups, 0, -1):
        chosen.append(end - 1)
        end = cut[group, end]
    return chosen[::-1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of every epoch of a corpus, as a pure function of the epoch's number.

    Attributes:
      lengths: int [n] of each utterance by dimension, at speed 1.
      along: the dimension that buckets are made by.
      buckets: shapes by ascending length, as from `choose_buckets`.
      seed: of the run.
      shuffle: random order within and across buckets; otherwise by length.
      speeds: the speed factors that an utterance draws from, another one in each epoch.
      stretched: the dimensions that get shorter with the speed.
      short_first: in so many epochs at first, batches come in order of their buckets, the shortest
        ones first, and not in random order (Amodei et al. 2016): alignments of short utterances are
        learned sooner.
    """

    lengths: Lengths
    along: str
    buckets: Sequence[Bucket]
    seed: int = 0
    shuffle: bool = True
    speeds: Sequence[float] = (1.0,)
    stretched: Sequence[str] = ("samples",)
    short_first: int = 0

    def __post_init__(self):
        if not len(self.speeds) or min(self.speeds) <= 0:
            raise ValueError(f"speeds must be one or more factors above 0, got {self.speeds}")

    def epoch(self, number: int) -> list[PlannedBatch]:
        """Plans one epoch: every utterance in exactly one batch.

        Each utterance draws its speed and goes to the shortest bucket that holds it. What does not
        fill a batch moves up to the next longer bucket, the longest utterances first since they
        gain the least padding there; so only the epoch's last batch may have filler rows.

        Raises:
          ValueError: an utterance that no bucket holds.
        """
        speed, length, home = self._assign(number)
        buckets = self.buckets
        rng = np.random.default_rng([self.seed, number, 1])
        order = rng.permutation(len(length)) if self.shuffle else np.argsort(length, kind="stable")
        order = order[np.argsort(home[order], kind="stable")]
        groups = np.split(order, np.cumsum(np.bincount(home, minlength=len(buckets)))[:-1])

        planned: list[tuple[Bucket, np.ndarray]] = []
        left = np.zeros(0, np.int64)
        for turn, (bucket, group) in enumerate(zip(buckets, groups, strict=True)):
            group = np.concatenate([left, group])
            spare = len(group) % bucket.rows
            if self.shuffle:
                rng.shuffle(group)
            if turn < len(buckets) - 1:  # the longest move up
                up = np.argsort(length[group], kind="stable")[len(group) - spare :]
            else:
                up = np.arange(len(group) - spare, len(group))
            left = group[up]
            planned += [(bucket, ids) for ids in np.delete(group, up).reshape(-1, bucket.rows)]
        if self.shuffle:
            planned = [planned[i] for i in rng.permutation(len(planned))]
        if number < self.short_first:
            planned.sort(key=lambda batch: batch[0].size(self.along))
        if len(left):
            bucket = next(b for b in buckets[home[left].max() :] if b.rows >= len(left))
            planned.append((bucket, np.pad(left, (0, bucket.rows - len(left)), constant_values=-1)))
        speed = np.append(speed, np.float32(1))  # the speed of id -1
        return [PlannedBatch(bucket, ids.astype(np.int32), speed[ids]) for bucket, ids in planned]

    def holds_all(self) -> bool:
        """Whether every utterance fits into a bucket at every speed."""
        sizes = {name for name, _ in self.buckets[-1].sizes}
        if sizes != self.lengths.keys():
            return False
        slowest = min(self.speeds)
        return all(
            stretched_length(length, slowest if name in self.stretched else 1.0).max()
            <= self.buckets[-1].size(name)
            for name, length in self.lengths.items()
        )

    def count(self, number: int) -> int:
        """The number of batches of an epoch, at a fraction of the time that planning it takes."""
        _, _, home = self._assign(number)
        total = left = 0
        sizes = np.bincount(home, minlength=len(self.buckets))
        for bucket, group in zip(self.buckets, sizes, strict=True):
            full, left = divmod(left + int(group), bucket.rows)
            total += full
        return total + (left > 0)

    def _assign(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws speeds; returns them (float32 [n]), the lengths and the home bucket of each."""
        count = len(self.lengths[self.along])
        draw = np.random.default_rng([self.seed, number, 0]).integers(len(self.speeds), size=count)
        speed = np.asarray(self.speeds, np.float32)[draw]
        home = np.zeros(count, np.int64)
        lengths = {}
        for name, length in self.lengths.items():
            if name in self.stretched:
                length = stretched_length(length, speed)
            lengths[name] = np.asarray(length, np.int64)
            edges = [bucket.size(name) for bucket in self.buckets]
            home = np.maximum(home, np.searchsorted(edges, lengths[name]))
        if count and home.max() == len(self.buckets):
            worst = int(home.argmax())
            sizes = ", ".join(f"{length[worst]} {name}" for name, length in lengths.items())
            raise ValueError(
                f"no bucket holds utterance {worst} ({sizes} at speed {speed[worst]:g}); the "
                f"largest is {self.buckets[-1]}: choose buckets from these utterances and speeds"
            )
        return speed, lengths[self.along], home


class Epochs:
    """How far in the data a run is, from the number of its batches."""

    def __init__(self, count: Callable[[int], int]):
        """`count` is Plan.count: the batches of an epoch."""
        self._count, self._ends = count, [0]

    def after(self, batches: int) -> float:
        """The epochs that are done after so many batches; whole at the end of each."""
        while self._ends[-1] < batches:
            self._ends.append(self._ends[-1] + self._count(len(self._ends) - 1))
        epoch = bisect.bisect_left(self._ends, batches)
        if self._ends[epoch] == batches:
            return float(epoch)
        begin, end = self._ends[epoch - 1 : epoch + 1]
        return epoch - 1 + (batches - begin) / (end - begin)

    def passed(self, batches: int, every: float) -> bool:
        """Whether with the last of so many batches another `every` epochs are done."""
        before, now = (math.floor(self.after(n) / every + 1e-9) for n in (batches - 1, batches))
        return now > before
