"""What a training has gained on a split: the difference of two predictions, and how sure it is.

Both are of the same utterances, which are drawn again and again with replacement (the paired
bootstrap of Bisani and Ney 2004): the interval holds 95% of the differences that are found then. It
says how far the difference depends on the utterances of the split, not on the seed of the training.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_DRAWS = 2_000


def gain(
    tallies: Callable[[Mapping[str, Any]], Mapping[str, tuple[float, float]]],
    before: pathlib.Path,
    after: pathlib.Path,
) -> dict[str, Any]:
    """How much smaller the first rate of `tallies` is after than before, with its interval.

    Args:
      tallies: that of an evaluator (evaluators/__init__.py).
      before, after: files of predictions; what one of them lacks is left out of both.

    Returns:
      {"metric", "before", "after", "gain", "interval": [low, high], "utterances"}; None for what
      cannot be told, where there is nothing to count.
    """
    one, other = _lines(before), _lines(after)
    names = sorted(one.keys() & other.keys())
    found: dict[str, Any] = dict.fromkeys(("metric", "before", "after", "gain", "interval"))
    found["utterances"] = len(names)
    if not names:
        return found
    found["metric"] = next(iter(tallies(one[names[0]])))
    counted = [[tallies(lines[n])[found["metric"]] for n in names] for lines in (one, other)]
    sums = np.asarray(counted, np.float64)  # [2, utterances, (errors, of how many)]
    errors, total = np.moveaxis(sums.sum(1), -1, 0)
    if not total.all():
        return found
    rates = errors / total
    even = np.full(len(names), 1 / len(names))
    counts = np.random.default_rng(0).multinomial(len(names), even, size=_DRAWS)
    drawn = np.einsum("dn,bns->dbs", counts, sums)
    drawn = drawn[(drawn[:, :, 1] > 0).all(1)]
    gains = drawn[:, 0, 0] / drawn[:, 0, 1] - drawn[:, 1, 0] / drawn[:, 1, 1]
    return found | {
        "before": float(rates[0]),
        "after": float(rates[1]),
        "gain": float(rates[0] - rates[1]),
        "interval": [float(value) for value in np.quantile(gains, (0.025, 0.975))],
    }


def _lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return {line["id"]: line for line in lines}
