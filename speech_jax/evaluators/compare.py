"""What a training has gained on a split: the difference of two predictions, and how sure it is.

Both are of the same utterances, which are drawn again and again with replacement (the paired
bootstrap, Bisani & Ney 2004): the interval holds 95% of the differences that are found then. It
says how far the difference depends on the utterances of the split, not on the seed of the training.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from speech_jax.evaluators.errors import count_errors

_DRAWS = 2_000


def _accuracy(line: Mapping[str, Any]) -> tuple[float, float]:
    return float(line["reference"] == line["prediction"]), float(line["reference"] != "")


def _wer(line: Mapping[str, Any]) -> tuple[float, float]:
    counts = count_errors(line["reference"], line["hypothesis"])
    return counts.insertions + counts.deletions + counts.substitutions, counts.words


# Metrics that are a ratio of sums over utterances: (a line of predictions.jsonl -> what is added to
# both sums, the sign of a gain).
RATIOS: dict[str, tuple[Callable[[Mapping[str, Any]], tuple[float, float]], int]] = {
    "accuracy": (_accuracy, 1),
    "wer": (_wer, -1),
}


def gain(metric: str, before: pathlib.Path, after: pathlib.Path) -> dict[str, Any]:
    """How much better `after` is than `before`, two files of predictions, with its interval.

    Returns {"metric", "before", "after", "gain", "interval": [low, high], "utterances"}; the
    interval is None where there is nothing to draw from. Utterances that one of them lacks are left
    out of both.
    """
    ratio, sign = RATIOS[metric]
    one, other = _lines(before), _lines(after)
    names = sorted(one.keys() & other.keys())
    sums = np.asarray([[ratio(lines[name]) for name in names] for lines in (one, other)])
    found = {"metric": metric, "before": None, "after": None, "gain": None, "interval": None}
    found["utterances"] = len(names)
    if not names or not sums[:, :, 1].sum(1).all():
        return found
    rates = sums.sum(1)  # [2, 2]
    values = rates[:, 0] / rates[:, 1]
    counts = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=_DRAWS
    )
    drawn = np.einsum("dn,bns->dbs", counts, sums)
    usable = (drawn[:, :, 1] > 0).all(1)
    differences = sign * np.diff(drawn[usable, :, 0] / drawn[usable, :, 1], axis=1)[:, 0]
    low, high = np.quantile(differences, (0.025, 0.975))
    return found | {
        "before": float(values[0]),
        "after": float(values[1]),
        "gain": float(sign * (values[1] - values[0])),
        "interval": [float(low), float(high)],
    }


def _lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return {line["id"]: line for line in lines}
