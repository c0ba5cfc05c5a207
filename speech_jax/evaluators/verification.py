"""Whether two utterances are of one speaker: error rates of the cosines of their embeddings.

The equal error rate is where as many of the pairs of one speaker are refused as of those of two are
accepted, on the straight lines between the points of the curve. The detection cost (NIST) is the
least of p * refused + (1 - p) * accepted over all thresholds, for a share p of pairs of one
speaker, relative to the better of always refusing and always accepting.

Scores are also normalized by those of both utterances against a cohort (adaptive s-norm, Matejka et
al. 2017). The cohort are the training classes, each by the vector that the classifier has for it.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from speech_jax.data.sources import Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import Row

_SAME = {"1": True, "0": False, "target": True, "nontarget": False}
# All pairs of so many utterances are compared at most.
_MOST = 10_000


class Trial(NamedTuple):
    """Two utterances by their ids, and whether one speaker said both."""

    one: str
    other: str
    same: bool


@functools.lru_cache(maxsize=4)
def read_trials(path: str) -> tuple[Trial, ...]:
    """The trials of a file: lines '1 ID ID' (1: the same, 0: not) or 'ID ID target|nontarget'.

    Raises:
      UserError: the file cannot be read, or a line is not a trial.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"the trials {path} cannot be read: {error}") from error
    trials = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) == 3 and words[2] in _SAME and words[2] not in ("0", "1"):
            trials.append(Trial(words[0], words[1], _SAME[words[2]]))
        elif len(words) == 3 and words[0] in ("0", "1"):
            trials.append(Trial(words[1], words[2], _SAME[words[0]]))
        else:
            raise UserError(
                f"{path}:{number}: {line[:80]!r} is not a trial: write '1 ID ID', '0 ID ID', or "
                "'ID ID target' or 'ID ID nontarget'"
            )
    return tuple(trials)


def error_curve(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(accepted, refused): shares of other and of same pairs, one for each threshold.

    Thresholds fall from above the highest score to the lowest. Equal scores share one.
    """
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    accepted = np.cumsum(~same)[last] / (~same).sum()
    refused = 1 - np.cumsum(same)[last] / same.sum()
    return np.append(0.0, accepted), np.append(1.0, refused)


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """Where the lines between the points of the curve have as many accepted as refused."""
    accepted, refused = error_curve(scores, same)
    difference = accepted - refused  # from -1 to 1
    place = int(np.argmax(difference >= 0))
    share = -difference[place - 1] / (difference[place] - difference[place - 1])
    return float(accepted[place - 1] + share * (accepted[place] - accepted[place - 1]))


def least_cost(scores: np.ndarray, same: np.ndarray, probability: float) -> float:
    """The least detection cost, for a share `probability` of pairs of one speaker."""
    accepted, refused = error_curve(scores, same)
    costs = probability * refused + (1 - probability) * accepted
    return float(costs.min() / min(probability, 1 - probability))


def normalize(
    scores: np.ndarray, one: np.ndarray, other: np.ndarray, cohort: np.ndarray, nearest: int
) -> np.ndarray:
    """Adaptive s-norm of scores [n] of utterances `one` and `other`, int [n].

    cohort: the scores [utterances, K] against the cohort, of which each utterance takes its own
    `nearest`.
    """
    top = np.sort(cohort, axis=1)[:, -nearest:]
    mean, spread = top.mean(1), np.maximum(top.std(1), 1e-6)
    return sum((scores - mean[index]) / spread[index] for index in (one, other)) / 2


class Verification:
    """Compares utterances by the cosine of their embeddings, in all pairs or those of a file."""

    rates: ClassVar = ("eer", "min_dcf_0.01", "min_dcf_0.05", "eer_normalized")

    def __init__(self, tag: str, trials: Sequence[Trial] = (), nearest: int = 20):
        """`tag` says who speaks, where there are no `trials`; `nearest` is that of `normalize`."""
        self._tag, self._trials, self._nearest = tag, trials, nearest
        self._found: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Keeps the embedding of one utterance, which its line has too."""
        del example
        who = utterance.tags.get(self._tag, "")
        if not who and not self._trials:
            raise UserError(
                f"utterance {utterance.id} has no tag {self._tag!r}, so nobody knows whom it is "
                "compared with: add it, or name a file of pairs in config.task.trials"
            )
        embedding = np.asarray(prediction["embedding"], np.float64)
        unit = embedding / max(np.linalg.norm(embedding), 1e-12)
        self._found[utterance.id] = who, unit, np.asarray(prediction["cohort"], np.float64)
        return {"speaker": who, "embedding": [round(float(value), 6) for value in unit]}

    def results(self) -> dict[str, float | None]:
        """Error rates and costs of the pairs, and how many pairs there were."""
        ids = sorted(self._found)  # the order of the utterances is no matter
        one, other, same = self._pairs(ids)
        counts = {"pairs": len(same), "same": int(same.sum())}
        if self._trials:
            counts["pairs_left_out"] = len(self._trials) - len(same)
        if not 0 < same.sum() < len(same):
            return dict.fromkeys(self.rates) | counts
        units = np.stack([self._found[name][1] for name in ids])
        cohort = np.stack([self._found[name][2] for name in ids])
        scores = (units[one] * units[other]).sum(1)
        normalized = normalize(scores, one, other, cohort, self._nearest)
        return {
            "eer": equal_error_rate(scores, same),
            "min_dcf_0.01": least_cost(scores, same, 0.01),
            "min_dcf_0.05": least_cost(scores, same, 0.05),
            "eer_normalized": equal_error_rate(normalized, same),
            "min_dcf_0.01_normalized": least_cost(normalized, same, 0.01),
            "min_dcf_0.05_normalized": least_cost(normalized, same, 0.05),
            **counts,
        }

    def _pairs(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(one, other, whether the speaker is the same) of each pair, the first two as places."""
        if self._trials:
            place = {name: number for number, name in enumerate(ids)}
            known = [t for t in self._trials if t.one in place and t.other in place]
            one, other = ([place[t[side]] for t in known] for side in (0, 1))
            same = [t.same for t in known]
            return np.asarray(one, int), np.asarray(other, int), np.asarray(same, bool)
        if len(ids) > _MOST:
            raise UserError(
                f"all pairs of {len(ids)} utterances are too many: name a file of pairs in "
                "config.task.trials"
            )
        who = np.asarray([self._found[name][0] for name in ids])
        one, other = np.triu_indices(len(ids), 1)
        return one, other, who[one] == who[other]

    def line(self) -> str:
        """The equal error rates in per cent, and the costs."""
        found = self.results()
        if found["eer"] is None:
            return "no pairs of one speaker and of two"
        return (
            f"EER {100 * found['eer']:.2f}% (normalized {100 * found['eer_normalized']:.2f}%)  "
            f"minDCF {found['min_dcf_0.01']:.3f} (p 0.01) {found['min_dcf_0.05']:.3f} (p 0.05)"
        )
