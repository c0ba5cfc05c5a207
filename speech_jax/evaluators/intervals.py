"""Confidence intervals of error rates, by resampling speakers."""

from collections.abc import Sequence

import numpy as np

# Numbers that are drawn at a time: 64 MiB.
_DRAWN = 1 << 23
# Of fewer, resampling says too little of those that were not recorded.
FEW = 5


def bootstrap(
    errors: Sequence[float] | np.ndarray,
    sizes: Sequence[float] | np.ndarray,
    groups: Sequence[object] | None = None,
    *,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """The interval of sum(errors) / sum(sizes) by the bootstrap of Bisani and Ney (2004).

    "Bootstrap estimates for confidence intervals in ASR performance evaluation". What is drawn with
    replacement is a group (a speaker) with all that is in it: utterances of one speaker fail
    together, and drawing them apart would make the interval too narrow.

    Args:
      errors: [n], of each utterance.
      sizes: [n], what the errors are of, such as words.
      groups: [n], the group of each utterance; None for one each.
      draws: how often the corpus is drawn anew.
      level: the probability that the interval is to have.

    Returns:
      The percentiles of the drawn rates; None where drawing tells nothing: for fewer than two
      groups, without a size, and without an error. The same numbers give the same interval.
    """
    sums = np.stack([np.asarray(errors, np.float64), np.asarray(sizes, np.float64)])
    if groups is not None:
        _, places = np.unique(np.asarray(groups, str), return_inverse=True)
        sums = np.stack([np.bincount(places, of) for of in sums])
    count = sums.shape[1]
    if count < 2 or not sums.any(axis=1).all():
        return None
    rng = np.random.default_rng(0)
    at_once = max(1, _DRAWN // count)
    rates = []
    for start in range(0, draws, at_once):
        drawn = rng.integers(count, size=(min(at_once, draws - start), count), dtype=np.int32)
        wrong, of = sums[0][drawn].sum(1), sums[1][drawn].sum(1)
        rates.append(wrong[of > 0] / of[of > 0])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(rates), [tail, 1 - tail])
    return float(low), float(high)
