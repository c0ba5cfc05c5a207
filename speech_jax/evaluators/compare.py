"""What a training has gained on a split: the difference of two predictions, and how sure it is.

Both are of the same utterances, which are drawn again and again, those of a speaker together: the
interval holds 95% of the differences that are found then (evaluators/intervals.py). It says how far
the difference depends on the speakers of the split, not on the seed of the training.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from speech_jax.data.sources import Utterance
from speech_jax.evaluators import Evaluator, intervals

_KEYS = ("metric", "of", "before", "after", "gain", "interval", "over")


def gain(
    evaluator: Evaluator,
    before: pathlib.Path,
    after: pathlib.Path,
    utterances: Iterable[Utterance] = (),
) -> dict[str, Any]:
    """How much better what an evaluator measures is after than before, with its interval.

    Args:
      evaluator: it has `statistics`, and more is better; or `tallies`, and less of the first one
        is (evaluators/__init__.py).
      before, after: files of predictions; what one of them lacks is left out of both.
      utterances: those of the split, whose tags say who speaks; where they do not, utterances are
        drawn on their own.

    Returns:
      {"metric", "of": the most that it can be, "before", "after", "gain", "interval": [low, high],
      "over": "speakers" or "utterances", "utterances"}; None for what cannot be told, where there
      is nothing to count.
    """
    one, other = _lines(before), _lines(after)
    names = sorted(one.keys() & other.keys())
    found: dict[str, Any] = dict.fromkeys(_KEYS) | {"utterances": len(names)}
    if not names:
        return found
    both = [[lines[name] for name in names] for lines in (one, other)]
    if hasattr(evaluator, "statistics"):
        found |= {"metric": evaluator.rates[0], "of": 100}
        counted, value, better = map(evaluator.statistics, both), evaluator.value, 1
    else:
        found |= {"metric": next(iter(evaluator.tallies(both[0][0]))), "of": 1}
        tally = lambda line: evaluator.tallies(line)[found["metric"]]
        counted, value, better = ([*map(tally, of)] for of in both), intervals.quotient, -1
    sums = [np.asarray(of, np.float64).T for of in counted]  # [k, utterances] each
    first, last = (float(value(of.sum(1, keepdims=True))[0]) for of in sums)
    if np.isnan([first, last]).any():
        return found
    known = {utterance.id: utterance for utterance in utterances}
    said = [known[name] for name in names if name in known]
    speakers = intervals.speakers(said) if len(said) == len(names) else None
    interval = intervals.paired(*sums[::-better], speakers, value=value)
    return found | {
        "before": first,
        "after": last,
        "gain": better * (last - first),
        "interval": interval and list(interval),
        "over": "speakers" if speakers else "utterances",
    }


def difference(
    metric: str, mode: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """What `gain` returns, of a metric of another kind, such as EER: an interval is not known.

    Args:
      metric: its name in the results `before` and `after`; mode: 'min' where less is better.
    """
    found = dict.fromkeys(_KEYS) | {"metric": metric, "utterances": after.get("utterances", 0)}
    first, last = before.get(metric), after.get(metric)
    if first is None or last is None:
        return found
    gained = first - last if mode == "min" else last - first
    return found | {"before": first, "after": last, "gain": gained}


def _lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
    return {line["id"]: line for line in lines}
