"""How sure a word is: the evidence for it, made a probability, and how good that probability is.

The evidence for a word is the smallest probability, over its labels, that the model gives a label
in the frames of its alignment (the largest of those frames). It is no probability of being right:
models are surer than they should be. A logistic function of its log odds is (Platt, "Probabilistic
outputs for support vector machines", 1999), whose scale and offset `--mode=tune` fits to words that
were right and words that were wrong, and keeps with the model as config.decoder.calibration.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

# Of the normal distributions that scale and offset are thought to be of: deviations of 0.5 and 2.
_PRECISION = (4.0, 0.25)
_CLOSE = 1e-6  # to 0 and 1, where log odds are not finite


class Bin(NamedTuple):
    """Words whose confidence is within [low, high): how many, its mean, and the share of right."""

    low: float
    high: float
    words: int
    confidence: float
    right: float


def calibrated(evidence: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """The confidence of evidence [N], both in [0, 1]."""
    return 1 / (1 + np.exp(-(scale * _log_odds(evidence) + offset)))


def fit(evidence: Sequence[float], right: Sequence[bool]) -> tuple[float, float]:
    """The (scale, offset) under which words that were right and wrong are most probable.

    A right and a wrong word are added, of the mean evidence, and scale and offset are thought to be
    near 1 and 0: few words, or words that are all right, give no certainty.
    """
    odds = _log_odds(np.asarray(evidence, float))
    odds = np.append(odds, [odds.mean() if len(odds) else 0.0] * 2)
    target = np.append(np.asarray(right, float), [0.0, 1.0])
    inputs = np.stack([odds, np.ones_like(odds)], axis=1)
    prior, mean = np.asarray(_PRECISION), np.asarray([1.0, 0.0])
    at = mean.copy()
    for _ in range(50):  # Newton; the function is convex
        p = 1 / (1 + np.exp(-inputs @ at))
        slope = inputs.T @ (p - target) + prior * (at - mean)
        curve = inputs.T @ (inputs * (p * (1 - p))[:, None]) + np.diag(prior)
        step = np.linalg.solve(curve, slope)
        at -= step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-9))
    return max(float(at[0]), 0.0), float(at[1])


def right_words(reference: str, words: Sequence[str]) -> list[bool]:
    """Whether each of `words` is right, in a minimal alignment with a reference text."""
    right = [False] * len(words)
    for tag, _, _, start, end in Levenshtein.opcodes(reference.split(), list(words)).as_list():
        if tag == "equal":
            right[start:end] = [True] * (end - start)
    return right


def area_under_roc(confidence: Sequence[float], right: Sequence[bool]) -> float | None:
    """How often a wrong word is less sure than a right one; None where one kind is missing."""
    confidence, right = np.asarray(confidence, float), np.asarray(right, bool)
    good, bad = confidence[right], confidence[~right]
    if not len(good) or not len(bad):
        return None
    good = np.sort(good)
    above = len(good) - np.searchsorted(good, bad, side="right")
    equal = np.searchsorted(good, bad, side="right") - np.searchsorted(good, bad, side="left")
    return float((above + equal / 2).mean() / len(good))


def reliability(
    confidence: Sequence[float], right: Sequence[bool], bins: int = 10
) -> tuple[list[Bin], float | None]:
    """The curve of reliability, bins without words left out, and the expected calibration error.

    That is the mean distance between confidence and share of right words over all words (Guo et
    al., "On calibration of modern neural networks", 2017); None without a word.
    """
    confidence, right = np.asarray(confidence, float), np.asarray(right, bool)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    found = []
    for number in np.unique(place):
        here = place == number
        found.append(
            Bin(
                float(number / bins),
                float((number + 1) / bins),
                int(here.sum()),
                float(confidence[here].mean()),
                float(right[here].mean()),
            )
        )
    if not found:
        return [], None
    error = sum(one.words * abs(one.confidence - one.right) for one in found)
    return found, error / len(confidence)


def _log_odds(evidence: np.ndarray) -> np.ndarray:
    evidence = np.clip(evidence, _CLOSE, 1 - _CLOSE)
    return np.log(evidence / (1 - evidence))
