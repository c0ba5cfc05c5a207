"""Confidence intervals of error rates and of their differences, by resampling speakers."""

from collections.abc import Sequence

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
    drawn = _drawn([errors, sizes], groups, draws)
    return None if drawn is None else _percentiles(drawn[0] / drawn[1], level)


def paired(
    before: tuple[Sequence[float], Sequence[float]],
    after: tuple[Sequence[float], Sequence[float]],
    groups: Sequence[object] | None = None,
    *,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """As `bootstrap`, of how much lower the rate is after than before.

    Args:
      before, after: (errors, sizes), each [n], of the same utterances in the same order.
    """
    drawn = _drawn([*before, *after], groups, draws)
    if drawn is None:
        return None
    return _percentiles(drawn[0] / drawn[1] - drawn[2] / drawn[3], level)


def _drawn(
    counts: Sequence[Sequence[float] | np.ndarray], groups: Sequence[object] | None, draws: int
) -> np.ndarray | None:
    """Sums of `counts`, errors and sizes in turn, over groups that are drawn [len(counts), draws].

    Draws without a size are left out. None where drawing tells nothing.
    """
    sums = np.stack([np.asarray(of, np.float64) for of in counts])
    if groups is not None:
        _, places = np.unique(np.asarray(groups, str), return_inverse=True)
        sums = np.stack([np.bincount(places, of) for of in sums])
    count = sums.shape[1]
    if count < 2 or not sums[1::2].any(axis=1).all() or not sums[::2].any():
        return None
    rng = np.random.default_rng(0)
    at_once = max(1, _DRAWN // count)
    found = []
    for start in range(0, draws, at_once):
        places = rng.integers(count, size=(min(at_once, draws - start), count), dtype=np.int32)
        found.append(np.stack([of[places].sum(1) for of in sums]))
    drawn = np.concatenate(found, axis=1)
    return drawn[:, (drawn[1::2] > 0).all(0)]


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
