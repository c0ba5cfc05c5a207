"""Confidence intervals of error rates and of their differences, by resampling speakers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from speech_jax.data.sources import Utterance

# Numbers that are drawn at a time: 64 MiB.
_DRAWN = 1 << 23
# Of fewer, resampling says too little of those that were not recorded.
FEW = 5


def speakers(utterances: Sequence[Utterance]) -> list[str] | None:
    """Who speaks in each utterance: the groups to draw; None where there are no two to tell."""
    found = [utterance.tags.get("speaker") for utterance in utterances]
    return None if None in found or len(set(found)) < 2 else [str(one) for one in found]


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
    rate = lambda drawn: quotient(drawn[0])
    return _interval([np.stack([errors, sizes])], groups, rate, draws, level)


def quotient(sums: np.ndarray) -> np.ndarray:
    """Rates [...] of sums of errors and sizes [2, ...]; NaN without a size."""
    errors, sizes = sums
    return np.divide(errors, sizes, out=np.full(errors.shape, np.nan), where=sizes > 0)


def paired(
    before: Sequence[Sequence[float]] | np.ndarray,
    after: Sequence[Sequence[float]] | np.ndarray,
    groups: Sequence[object] | None = None,
    *,
    value: Callable[[np.ndarray], np.ndarray] = quotient,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """As `bootstrap`, of how much lower the rate is after than before.

    Args:
      before, after: errors and sizes [2, n] of the same utterances in the same order; or, for
        another `value` than the rate, the numbers [k, n] that it is a function of.
      value: of sums [k, draws], those draws' values [draws], NaN for none.
    """
    lower = lambda drawn: value(drawn[0]) - value(drawn[1])
    return _interval([before, after], groups, lower, draws, level)


def _interval(
    counts: Sequence[Any],
    groups: Sequence[object] | None,
    value: Callable[[np.ndarray], np.ndarray],
    draws: int,
    level: float,
) -> tuple[float, float] | None:
    """The percentiles of the values of sums [runs, k, draws] of `counts`, [k, n] of each run."""
    sums = np.stack([np.asarray(of, np.float64) for of in counts])  # [runs, k, n]
    if groups is not None:
        _, places = np.unique(np.asarray(groups, str), return_inverse=True)
        sums = np.stack([[np.bincount(places, one) for one in of] for of in sums])
    count = sums.shape[2]
    if count < 2 or not sums[:, 0].any():
        return None
    rng = np.random.default_rng(0)
    at_once = max(1, _DRAWN // count)
    found = []
    for start in range(0, draws, at_once):
        places = rng.integers(count, size=(min(at_once, draws - start), count), dtype=np.int32)
        found.append(np.stack([[one[places].sum(1) for one in of] for of in sums]))
    values = value(np.concatenate(found, axis=2))
    values = values[~np.isnan(values)]
    return _percentiles(values, level) if len(values) else None


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
