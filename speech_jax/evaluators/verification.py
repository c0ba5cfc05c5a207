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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from speech_jax.data.sources import Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import Row

_SAME = {"1": True, "0": False, "target": True, "nontarget": False}
# All pairs of so many utterances are compared at most, and so many pairs at a time.
_MOST, _BLOCK = 10_000, 1 << 16


class Trial(NamedTuple):
    """Two utterances by their ids, and whether one speaker said both."""

    one: str
    other: str
    same: bool


@functools.lru_cache(maxsize=4)
def read_trials(path: str) -> tuple[Trial, ...]:
    """The trials of a file: lines '1 ID ID' (1: the same, 0: not) or 'ID ID target|nontarget'.

    Raises:
      UserError: the file cannot be read or is empty, or a line is not a trial.
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
    if not trials:
        raise UserError(f"the trials {path} hold no pair: write '1 ID ID' or '0 ID ID' in a line")
    return tuple(trials)


class Curve(NamedTuple):
    """Shares of other pairs that are accepted and of same ones that are refused, by threshold.

    Thresholds fall from above the highest score to the lowest. Equal scores share one.
    """

    accepted: np.ndarray
    refused: np.ndarray

    @property
    def equal_error_rate(self) -> float:
        """Where the lines between the points have as many accepted as refused."""
        difference = self.accepted - self.refused  # from -1 to 1
        place = int(np.argmax(difference >= 0))
        share = -difference[place - 1] / (difference[place] - difference[place - 1])
        before = self.accepted[place - 1]
        return float(before + share * (self.accepted[place] - before))

    def least_cost(self, probability: float) -> float:
        """The least detection cost, for a share `probability` of pairs of one speaker."""
        costs = probability * self.refused + (1 - probability) * self.accepted
        return float(costs.min() / min(probability, 1 - probability))


def error_curve(scores: np.ndarray, same: np.ndarray) -> Curve:
    """The curve of scores [n] of pairs, which are of one speaker where `same` [n] says so."""
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    found = np.cumsum(same)[last]
    accepted = (last + 1 - found) / (~same).sum()
    return Curve(np.append(0.0, accepted), np.append(1.0, 1 - found / same.sum()))


def nearest_scores(cohort: np.ndarray, nearest: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [n] of the `nearest` ones of each utterance's scores `cohort` [n, K]."""
    top = np.sort(cohort, axis=1)[:, -nearest:]
    return top.mean(1), np.maximum(top.std(1), 1e-6)


def normalize(
    scores: np.ndarray, one: np.ndarray, other: np.ndarray, mean: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """Adaptive s-norm of scores [m] of utterances `one` and `other`, int [m].

    mean, spread: what `nearest_scores` returns of all utterances.
    """
    return sum((scores - mean[index]) / spread[index] for index in (one, other)) / 2


class Verification:
    """Compares utterances by the cosine of their embeddings, in all pairs or those of a file.

    The pairs of a file are of one split. Those of another one, which the file does not name and
    which may be what picks the model, are all compared.
    """

    rates: ClassVar = ("eer", "min_dcf_0.01", "min_dcf_0.05", "eer_normalized")

    def __init__(self, tag: str, trials: Sequence[Trial] = (), nearest: int = 20):
        """`tag` says who speaks, where there are no `trials`; `nearest` is that of `normalize`."""
        self._tag, self._trials, self._nearest = tag, trials, nearest
        self._found: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        self._results: dict[str, float | None] | None = None

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Keeps the embedding of one utterance, which its line has too."""
        del example
        who = self._who(utterance)
        embedding = np.asarray(prediction["embedding"], np.float32)
        unit = embedding / max(np.linalg.norm(embedding), 1e-12)
        self._found[utterance.id] = who, unit, np.asarray(prediction["cohort"], np.float32)
        self._results = None
        return {"speaker": who, "embedding": [round(float(value), 6) for value in unit]}

    def check(self, utterances: Sequence[Utterance]) -> None:
        """Raises UserError where utterances make no pairs, or too many, or it is not known which.

        Error rates need pairs of one speaker and of two.
        """
        who = {utterance.id: self._who(utterance) for utterance in utterances}
        listed = self._listed(who)
        if listed is None:
            if len(who) > _MOST:
                raise UserError(
                    f"all pairs of {len(who)} utterances are too many: name a file of pairs in "
                    "config.task.trials"
                )
            distinct = len(set(who.values()))
            one, two = distinct < len(who), distinct > 1
            cure = "take others, or a larger portion"
        else:
            kinds = {trial.same for trial in listed}
            one, two = True in kinds, False in kinds
            cure = "add some to the file of config.task.trials, with the ids of the utterances"
        if not (one and two):
            first = f", such as {utterances[0].id!r}" if utterances else ""
            raise UserError(
                f"there is no pair of {'two speakers' if one else 'one speaker'} among the "
                f"{len(utterances)} utterances{first}: {cure}"
            )

    def _who(self, utterance: Utterance) -> str:
        """Who speaks; UserError where it has to be known and is not."""
        who = utterance.tags.get(self._tag, "")
        if not who and not self._trials:
            raise UserError(
                f"utterance {utterance.id} has no tag {self._tag!r}, so nobody knows whom it is "
                "compared with: add it, or name a file of pairs in config.task.trials"
            )
        return who

    def results(self) -> dict[str, float | None]:
        """Error rates and costs of the pairs, and how many pairs there were."""
        if self._results is None:
            self._results = self._measured()
        return dict(self._results)

    def _measured(self) -> dict[str, float | None]:
        ids = sorted(self._found)  # the order of the utterances is no matter
        listed = self._listed({name: who for name, (who, _, _) in self._found.items()})
        blocks = [*self._scored(ids, listed)] if ids else [np.zeros((3, 0), np.float32)]
        scores, normalized, same = map(np.concatenate, zip(*blocks, strict=True))
        same = same.astype(bool)
        counts = {"pairs": len(same), "same": int(same.sum())}
        if self._trials:
            counts["pairs_left_out"] = len(self._trials) - len(listed or ())
        if not 0 < same.sum() < len(same):
            return dict.fromkeys(self.rates) | counts
        found: dict[str, float | None] = {}
        for suffix, of in (("", scores), ("_normalized", normalized)):
            curve = error_curve(of, same)
            found[f"eer{suffix}"] = curve.equal_error_rate
            found[f"min_dcf_0.01{suffix}"] = curve.least_cost(0.01)
            found[f"min_dcf_0.05{suffix}"] = curve.least_cost(0.05)
        return found | counts

    def _listed(self, who: Mapping[str, str]) -> list[Trial] | None:
        """The trials of utterances, given who speaks by id; None where all pairs are compared."""
        known = [trial for trial in self._trials if trial.one in who and trial.other in who]
        if known or (self._trials and not all(who.values())):
            return known
        return None

    def _scored(
        self, ids: Sequence[str], listed: Sequence[Trial] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(scores, normalized ones, whether the speaker is the same) of pairs, block by block."""
        units = np.stack([self._found[name][1] for name in ids])  # [n, E]
        cohort = np.stack([self._found[name][2] for name in ids])
        mean, spread = nearest_scores(cohort, self._nearest)
        for one, other, same, scores in self._pairs(ids, units, listed):
            yield scores, normalize(scores, one, other, mean, spread), same

    def _pairs(
        self, ids: Sequence[str], units: np.ndarray, listed: Sequence[Trial] | None
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """(one, other, whether the speaker is the same, score), of a block of pairs each [m].

        The first two are places in `ids`, of which `units` [n, E] are the embeddings.
        """
        if listed is not None:
            place = {name: number for number, name in enumerate(ids)}
            for start in range(0, max(len(listed), 1), _BLOCK):
                some = listed[start : start + _BLOCK]
                one = np.asarray([place[trial.one] for trial in some], int)
                other = np.asarray([place[trial.other] for trial in some], int)
                same = np.asarray([trial.same for trial in some], bool)
                yield one, other, same, np.einsum("pe,pe->p", units[one], units[other])
            return
        _, who = np.unique([self._found[name][0] for name in ids], return_inverse=True)
        rows = max(1, _BLOCK // len(ids))
        for start in range(0, len(ids), rows):
            block = units[start : start + rows] @ units[start:].T
            one, other = np.nonzero(np.triu(np.ones(block.shape, bool), 1))
            same = who[one + start] == who[other + start]
            yield one + start, other + start, same, block[one, other]

    def line(self) -> str:
        """The equal error rates in per cent, and the costs."""
        found = self.results()
        if found["eer"] is None:
            return "no pairs of one speaker and of two"
        lost = found.get("pairs_left_out", 0)
        of = f", {lost} of the file of trials left out" if lost else ""
        if lost == len(self._trials) > 0:
            of = ", all there are: the file of trials names none of them"
        return (
            f"EER {100 * found['eer']:.2f}% (normalized {100 * found['eer_normalized']:.2f}%)  "
            f"minDCF {found['min_dcf_0.01']:.3f} (p 0.01) {found['min_dcf_0.05']:.3f} (p 0.05)  "
            f"{found['pairs']} pairs{of}"
        )
