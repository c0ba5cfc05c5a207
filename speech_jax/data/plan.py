"""The batch plan: which utterances share a batch, as a pure function of lengths, seed and epoch.

An accelerator compiles one program a shape, so batches come in a few shapes only
(`choose_buckets`), each holding about the same number of samples. `plan_epoch` fills them so that
every utterance is seen exactly once an epoch. The plan is the same on every host: hosts then load
their own rows of each batch, and the order of the data depends neither on how many hosts there are
nor on whether the run was interrupted.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

LABELS_MULTIPLE = 8


class Bucket(NamedTuple):
    """The shape of a batch: `rows` utterances of at most `samples` samples and `labels` labels."""

    samples: int
    labels: int
    rows: int


class PlannedBatch(NamedTuple):
    """A bucket and the utterances that fill it."""

    bucket: Bucket
    ids: np.ndarray  # int32 [rows], -1 for a filler row
    speeds: np.ndarray  # float32 [rows], 1 for a filler row


def perturbed_samples(samples: np.ndarray, speeds: np.ndarray | float) -> np.ndarray:
    """Length in samples of audio played `speeds` times as fast (int64, rounded up)."""
    return np.ceil(np.asarray(samples) / exact_speed(speeds)).astype(np.int64)


def exact_speed(speeds: np.ndarray | float) -> np.ndarray:
    """The decimal fraction that a speed in a plan (float32) stands for, such as 0.9 (float64)."""
    return np.round(np.asarray(speeds, np.float64), 6)


def choose_buckets(
    samples: np.ndarray,
    labels: np.ndarray,
    *,
    count: int,
    batch_samples: int,
    rows_multiple: int = 1,
    round_to: int = 1600,
) -> tuple[Bucket, ...]:
    """Chooses the `count` batch shapes that need the least padding.

    Lengths are rounded up to `round_to`; over their histogram, an exact dynamic program finds the
    `count` bucket lengths with the fewest padded samples (its time grows with the square of the
    number of distinct rounded lengths). A bucket's labels are the longest sequence among all
    utterances no longer than it, for it also takes leftovers of shorter buckets. Its rows hold at
    most `batch_samples` in all, rounded down to `rows_multiple`, except that there are never fewer
    than `rows_multiple` of them, nor more than the utterances there are (rounded up).

    Args:
      samples: int [n], length of each utterance in samples; with speed perturbation, at every
        speed.
      labels: int [n], length of each label sequence.
      count: number of shapes; fewer come back if there are fewer distinct rounded lengths.
      batch_samples: samples in a batch, padding included.
      rows_multiple: what the rows must divide by: the devices along the batch axis.
      round_to: granularity of the bucket lengths, in samples.

    Returns:
      The buckets, by ascending length.

    Raises:
      ValueError: no utterances, or arguments that are not positive.
    """
    samples, labels = np.asarray(samples, np.int64), np.asarray(labels, np.int64)
    for name, value in (
        ("count", count),
        ("batch_samples", batch_samples),
        ("rows_multiple", rows_multiple),
        ("round_to", round_to),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not len(samples):
        raise ValueError("no utterances to choose buckets for")

    edges, inverse, counts = np.unique(
        -(-samples // round_to) * round_to, return_inverse=True, return_counts=True
    )
    longest_labels = np.zeros(len(edges), np.int64)
    np.maximum.at(longest_labels, inverse, labels)
    longest_labels = np.maximum.accumulate(longest_labels)

    most_rows = -(-len(samples) // rows_multiple) * rows_multiple
    buckets = []
    for place in _best_edges(edges, counts, min(count, len(edges))):
        length = int(edges[place])
        rows = batch_samples // length // rows_multiple * rows_multiple
        most_labels = -(-max(int(longest_labels[place]), 1) // LABELS_MULTIPLE) * LABELS_MULTIPLE
        buckets.append(Bucket(length, most_labels, min(max(rows, rows_multiple), most_rows)))
    return tuple(buckets)


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


def plan_epoch(
    samples: np.ndarray,
    labels: np.ndarray,
    buckets: Sequence[Bucket],
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    speeds: Sequence[float] = (1.0,),
) -> list[PlannedBatch]:
    """Plans one epoch: every utterance in exactly one batch.

    Each utterance draws its speed and goes to the shortest bucket that holds it. What does not fill
    a batch moves up to the next longer bucket, the longest utterances first since they gain the
    least padding there; so only the epoch's last batch may have filler rows. The plan depends on
    the arguments alone.

    Args:
      samples: int [n], length of each utterance in samples at speed 1.
      labels: int [n], length of each label sequence.
      buckets: shapes by ascending length, as from `choose_buckets`.
      seed: of the run.
      epoch: from 0; speeds and order differ from epoch to epoch.
      shuffle: random order within and across buckets; otherwise by length.
      speeds: the speed factors to draw from.

    Raises:
      ValueError: an utterance that no bucket holds.
    """
    speed, length, home = _assign(samples, labels, buckets, seed, epoch, speeds)
    rng = np.random.default_rng([seed, epoch, 1])
    order = rng.permutation(len(length)) if shuffle else np.argsort(length, kind="stable")
    order = order[np.argsort(home[order], kind="stable")]
    groups = np.split(order, np.cumsum(np.bincount(home, minlength=len(buckets)))[:-1])

    planned: list[tuple[Bucket, np.ndarray]] = []
    left = np.zeros(0, np.int64)
    for place, (bucket, group) in enumerate(zip(buckets, groups, strict=True)):
        group = np.concatenate([left, group])
        spare = len(group) % bucket.rows
        if shuffle:
            rng.shuffle(group)
        if place < len(buckets) - 1:  # those who move up are the longest
            up = np.argsort(length[group], kind="stable")[len(group) - spare :]
        else:
            up = np.arange(len(group) - spare, len(group))
        left = group[up]
        planned += [(bucket, ids) for ids in np.delete(group, up).reshape(-1, bucket.rows)]
    if shuffle:
        planned = [planned[i] for i in rng.permutation(len(planned))]
    if len(left):
        bucket = next(b for b in buckets[home[left].max() :] if b.rows >= len(left))
        planned.append((bucket, np.pad(left, (0, bucket.rows - len(left)), constant_values=-1)))
    speed = np.append(speed, np.float32(1))  # the speed of id -1
    return [PlannedBatch(bucket, ids.astype(np.int32), speed[ids]) for bucket, ids in planned]


def count_batches(
    samples: np.ndarray,
    labels: np.ndarray,
    buckets: Sequence[Bucket],
    *,
    seed: int,
    epoch: int,
    speeds: Sequence[float] = (1.0,),
) -> int:
    """Number of batches of `plan_epoch` with the same arguments, at a fraction of its time."""
    _, _, home = _assign(samples, labels, buckets, seed, epoch, speeds)
    total = left = 0
    for bucket, group in zip(buckets, np.bincount(home, minlength=len(buckets)), strict=True):
        full, left = divmod(left + int(group), bucket.rows)
        total += full
    return total + (left > 0)


def padding_fraction(plan: Iterable[PlannedBatch], samples: np.ndarray) -> float:
    """Fraction of the planned samples that is padding: ends of rows and filler rows alike."""
    used = padded = 0
    for bucket, ids, speeds in plan:
        real = ids >= 0
        used += perturbed_samples(np.asarray(samples)[ids[real]], speeds[real]).sum()
        padded += bucket.samples * bucket.rows
    return 1 - float(used) / padded if padded else 0.0


def _assign(samples, labels, buckets, seed, epoch, speeds):
    """Draws speeds; returns them (float32 [n]), the lengths and the home bucket of each."""
    samples, labels = np.asarray(samples, np.int64), np.asarray(labels, np.int64)
    if not len(speeds) or min(speeds) <= 0:
        raise ValueError(f"speeds must be one or more factors above 0, got {tuple(speeds)}")
    draw = np.random.default_rng([seed, epoch, 0]).integers(len(speeds), size=len(samples))
    speed = np.asarray(speeds, np.float32)[draw]
    length = perturbed_samples(samples, speed)
    home = np.maximum(
        np.searchsorted([bucket.samples for bucket in buckets], length),
        np.searchsorted([bucket.labels for bucket in buckets], labels),
    )
    if len(home) and home.max() == len(buckets):
        worst = int(home.argmax())
        raise ValueError(
            f"no bucket holds utterance {worst} ({length[worst]} samples at speed "
            f"{speed[worst]:g}, {labels[worst]} labels); the largest is {buckets[-1]}: choose "
            "buckets from these utterances at these speeds"
        )
    return speed, length, home
