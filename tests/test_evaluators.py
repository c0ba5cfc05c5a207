"""One contract for all evaluators, a row for each; error rates equal jiwer's on anything."""

import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jiwer
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from speech_jax.data import text
from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.sources import Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import Evaluator, verification
from speech_jax.evaluators.accuracy import Accuracy
from speech_jax.evaluators.bits import Bits
from speech_jax.evaluators.bleu import Bleu, compare, main
from speech_jax.evaluators.errors import ErrorCounts, Errors, count_errors
from speech_jax.evaluators.masked import Masked
from speech_jax.evaluators.verification import (
    Trial,
    Verification,
    error_curve,
    nearest_scores,
    normalize,
    read_trials,
)

TEXT = st.text(alphabet="ab \t’é漢", max_size=20)
_TRANSCRIPT = Transcript(text.CharacterTokenizer("AB "))

# What an evaluator is given of an utterance: itself, its row of the batch and of the prediction.
Given = tuple[Utterance, dict[str, Any], dict[str, Any]]


def _said(number: int, reference: str, hypothesis: str) -> Given:
    ids = np.asarray(_TRANSCRIPT.tokenizer.encode(hypothesis), np.int32)
    prediction = {"labels": np.pad(ids, (0, 3)), "labels_length": np.int32(len(ids))}
    return Utterance(str(number), 1.0, reference), {}, prediction


def _masked(number: int, nats: float, correct: float, masked: float) -> Given:
    values = {"nats": nats, "correct": correct, "masked": masked}
    rows = {name: np.asarray(value, np.float32) for name, value in values.items()}
    return Utterance(str(number), 1.0), {}, rows


def _foretold(number: int, nats: float, samples: float) -> Given:
    rows = {"nats": np.float32(nats), "samples": np.float32(samples)}
    return Utterance(str(number), 1.0), {}, rows


@dataclasses.dataclass(frozen=True)
class Row:
    """An evaluator in the suite.

    Attributes:
      given: what it measures, with results that are known.
      empty: utterances that there is nothing to measure of.
      says: what its line says of `given`, and of `empty`.
      pairs: whether rates are of pairs of utterances, and not of sums over them.
    """

    make: Callable[[], Evaluator]
    given: Sequence[Given]
    results: dict[str, float]
    empty: Sequence[Given]
    says: tuple[str, str]
    pairs: bool = False


_TARGET = Category(("a", "b", "c"), unseen=True)


def _classified(number: int, truth: int, found: int) -> Given:
    probabilities = np.full(3, 0.1, np.float32)
    probabilities[found] = 0.8
    prediction = {"target": np.int32(found), "probabilities": probabilities}
    return Utterance(str(number), 1.0), {"target": np.int32(truth)}, prediction


def _heard(number: int, who: str, degrees: float) -> Given:
    direction = np.exp(1j * np.radians(degrees))
    embedding = 3 * np.asarray([direction.real, direction.imag], np.float32)
    cohort = np.asarray([0.1, 0.5, 0.3], np.float32)
    prediction = {"embedding": embedding, "cohort": cohort}
    return Utterance(str(number), 1.0, tags={"speaker": who}), {}, prediction


_SPELLED = "abcdefghijklmnopqrstuvwxyz "
_TRANSLATION = Transcript(text.CharacterTokenizer(_SPELLED, "lower"), "target", "translation")
_SPOKEN = Transcript(text.CharacterTokenizer("AB "))


def _translated(
    number: int, reference: str, hypothesis: str, ended: bool = True, said: str = "A"
) -> Given:
    ids = np.asarray(_TRANSLATION.tokenizer.encode(hypothesis), np.int32)
    prediction = {"target": np.pad(ids, (0, 3)), "target_length": np.int32(len(ids))}
    prediction |= {"labels": np.asarray([1, 2]), "labels_length": np.int32(1), "ended": ended}
    tags = {"translation": reference} if reference else {}
    return Utterance(str(number), 1.0, said, tags), {}, prediction


_CORPUS = [
    ("The cat is on the mat", "the cat sat on the mat"),
    ("there is a cat here now", "there is a cat here now"),
    ("a dog barks", "a dog"),
]


def _chrf2(pairs: Sequence[tuple[str, str]]) -> float:
    """Of runs of 1 to 6 characters without spaces; recall counts four times (Popovic 2015)."""
    shares = []
    for n in range(1, 7):
        runs = [
            [
                collections.Counter(t[i : i + n] for i in range(len(t) - n + 1))
                for t in (text.lower().replace(" ", "") for text in pair)
            ]
            for pair in pairs
        ]
        same, said, found = (
            sum((one.total() for one in each), 0)
            for each in zip(*((a & b, a, b) for a, b in runs), strict=True)
        )
        shares.append((same / found, same / said))
    precision, recall = np.mean(shares, axis=0)
    return 100 * 5 * precision * recall / (4 * precision + recall)


ROWS = {
    "errors": Row(
        lambda: Errors(_TRANSCRIPT),
        [
            _said(0, "A B", "A"),
            _said(1, "A AB", "A BB A"),
            _said(2, "", "B"),
            _said(3, "B", "B"),
            _said(4, "É", ""),
        ],
        {
            "wer": 5 / 6,
            "cer": 7 / 9,
            "insertions": 2,
            "deletions": 2,
            "substitutions": 1,
            "words": 6,
        },
        [_said(0, "", ""), _said(1, " ", "A")],
        ("WER 83.33%  CER 77.78%", "no reference words"),
    ),
    "masked": Row(
        Masked,
        [_masked(0, 3.0, 1.0, 4.0), _masked(1, 1.0, 2.0, 2.0), _masked(2, 0.0, 0.0, 0.0)],
        {
            "accuracy": 0.5,
            "error_rate": 0.5,
            "loss_per_frame": 4 / 6,
            "masked_frames": 6,
        },
        [_masked(0, 0.0, 0.0, 0.0)],
        ("accuracy 0.5000  loss 0.667", "no masked frames"),
    ),
    "bits": Row(
        Bits,
        [_foretold(0, 4 * np.log(2), 2.0), _foretold(1, np.log(2), 3.0)],
        {"bits_per_sample": 1.0, "samples": 5.0},
        [_foretold(0, 0.0, 0.0)],
        ("1.000 bits a sample", "no samples"),
    ),
    "accuracy": Row(
        lambda: Accuracy(_TARGET),
        [
            _classified(number, *pair)
            for number, pair in enumerate([(0, 0), (0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (-1, 2)])
        ],
        {"accuracy": 4 / 6, "balanced_accuracy": 5 / 8, "macro_f1": 5 / 8, "error_rate": 2 / 6},
        [_classified(0, -1, 1)],
        (
            "accuracy 66.67%  balanced 62.50%  macro F1 62.50%  2 of 3 classes",
            "no utterance of a known class",
        ),
    ),
    "verification": Row(
        lambda: Verification("speaker", nearest=2),
        # Angles in degrees: two pairs of one speaker, 10 apart and 90, and four of two.
        [_heard(0, "a", 0), _heard(1, "a", 10), _heard(2, "b", 60), _heard(3, "b", 150)],
        {"eer": 0.5, "min_dcf_0.01": 0.5, "min_dcf_0.05": 0.5, "pairs": 6, "same": 2},
        [_heard(0, "a", 0)],
        (
            "EER 50.00% (normalized 50.00%)  minDCF 0.500 (p 0.01) 0.500 (p 0.05)  6 pairs",
            "no pairs of one speaker and of two",
        ),
        pairs=True,
    ),
    "bleu": Row(
        lambda: Bleu(_TRANSLATION, _SPOKEN),
        [
            *(_translated(number, *pair) for number, pair in enumerate(_CORPUS)),
            _translated(3, "", "a", ended=False, said="B"),
        ],
        {
            # By hand: 13 of 14 words, 9 of 11 pairs, 5 of 8, 3 of 6; 14 words for 15.
            "bleu": 100 * np.exp(1 - 15 / 14) * (13 / 14 * 9 / 11 * 5 / 8 * 3 / 6) ** 0.25,
            "chrf2": _chrf2(_CORPUS),
            "wer": 2 / 15,
            "transcript_wer": 1 / 4,
            "no_translation": 1,
            "cut": 1,
            "translations": 3,
        },
        [_translated(0, "", "a", said=""), _translated(1, "", "", said="")],
        (
            "BLEU 64.99  chrF2 74.54  transcript CER 25.00%  (1 have no translation)  "
            "(1 translations did not end, and were cut)",
            "no translation to compare with",
        ),
    ),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def row(request) -> Row:
    return request.param


def _measure(row: Row, given: Sequence[Given]) -> tuple[Evaluator, list[dict[str, Any]]]:
    evaluator = row.make()
    return evaluator, [evaluator.add(*one) for one in given]


def _named(row: Row, evaluator: Evaluator) -> dict[str, Any]:
    """The results that the row names."""
    found = evaluator.results()
    return {name: found[name] for name in row.results}


def test_results_are_what_they_should_be(row):
    evaluator, _ = _measure(row, row.given)
    assert _named(row, evaluator) == pytest.approx(row.results)
    assert evaluator.line() == row.says[0]
    assert set(evaluator.rates) <= evaluator.results().keys()


def test_the_order_does_not_matter(row):
    _, lines = _measure(row, row.given)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(row.given))
        evaluator, shuffled = _measure(row, [row.given[place] for place in order])
        assert _named(row, evaluator) == pytest.approx(row.results)
        assert shuffled == [lines[place] for place in order]  # a line is of its utterance alone


def test_a_split_is_more_than_the_mean_of_its_halves(row):
    """Rates are of sums: an utterance counts as much as there is in it, empty ones nothing."""
    if row.pairs:
        return  # its rates are of pairs
    evaluator, _ = _measure(row, [*row.empty[:1], *row.given, *row.given, *row.empty[:1]])
    found = evaluator.results()
    for name in evaluator.rates:
        assert found[name] == pytest.approx(row.results[name])


def test_tallies_of_lines_divide_to_the_results(row):
    if row.pairs:
        return
    evaluator, lines = _measure(row, [*row.given, *row.empty])
    if not hasattr(evaluator, "tallies"):
        return  # it is optional
    tallies = [evaluator.tallies(line) for line in lines]
    for name in tallies[0]:
        errors, sizes = np.sum([one[name] for one in tallies], axis=0)
        assert errors / sizes == pytest.approx(evaluator.results()[name])


def test_nothing_to_measure_has_no_value(row):
    for some in ([], row.empty):
        evaluator, lines = _measure(row, some)
        found = evaluator.results()
        assert {found[name] for name in evaluator.rates} == {None}
        assert row.says[1] in evaluator.line()
        json.dumps([found, lines], allow_nan=False)


def test_what_it_says_is_json_and_a_line(row):
    evaluator, lines = _measure(row, row.given)
    json.dumps([evaluator.results(), lines], allow_nan=False)
    assert all("id" not in line for line in lines)  # the loop's own
    assert "\n" not in evaluator.line()


# ---- Errors ------------------------------------------------------------------------------------


def test_a_line_shows_what_was_compared():
    evaluator = Errors(Transcript(text.CharacterTokenizer("AB ", "upper")))
    found = evaluator.add(*_said(0, " a  bÉ ", "A B"))
    assert found == {"reference": "A BÉ", "hypothesis": "A B", "wer": 0.5}
    assert evaluator.add(*_said(1, "", "A"))["wer"] is None


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_counts_equal_jiwer(reference, hypothesis):
    ours = count_errors(reference, hypothesis)
    words, spoken = " ".join(reference.split()), " ".join(hypothesis.split())
    if words:
        theirs = jiwer.process_words(words, spoken)
        edits = (theirs.insertions, theirs.deletions, theirs.substitutions)
        assert ours.wer == theirs.wer
        assert ours.insertions + ours.deletions + ours.substitutions == sum(edits)
        assert ours.insertions - ours.deletions == edits[0] - edits[1]
        assert abs(ours.cer - jiwer.cer(words, spoken)) < 1e-12
    else:
        assert ours.insertions == len(spoken.split())
        assert ours.wer is ours.cer is None


@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_a_corpus_is_the_sum_of_its_parts(pairs):
    parts = [count_errors(*pair) for pair in pairs]
    total = sum(parts, ErrorCounts())
    assert total == sum(reversed(parts), ErrorCounts())
    assert total.words == sum(len(reference.split()) for reference, _ in pairs)
    whole = count_errors(" ".join(r for r, _ in pairs), " ".join(h for _, h in pairs))
    errors = [c.insertions + c.deletions + c.substitutions for c in (whole, total)]
    assert errors[0] <= errors[1]  # an alignment may not reach into the next utterance


# ---- Translations ------------------------------------------------------------------------------


def _predictions(path, hypotheses: Sequence[str]):
    rows = [
        {"id": str(number), "reference": "" if number == 0 else f"the cat is on mat {number}"}
        | {"hypothesis": one}
        for number, one in enumerate(hypotheses)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_runs_differ_by_what_is_sure(tmp_path, capsys):
    good = [f"the cat is on mat {number}" for number in range(40)]
    bad = [f"a cat was on mat {number}" for number in range(40)]
    one, other = _predictions(tmp_path / "one", bad), _predictions(tmp_path / "other", good)
    found = compare(one, other)
    assert found["BLEU"]["after"] == pytest.approx(100)
    assert found["BLEU"]["before"] < 60
    assert found["chrF2"]["p"] < 0.01
    assert found["BLEU"]["utterances"] == 39  # one has no reference
    assert "bs:1000" in found["BLEU"]["signature"]
    same = compare(one, one)
    assert same["BLEU"]["p"] == 1
    assert main([str(one), str(other)]) == 0
    assert "BLEU" in capsys.readouterr().out
    # What cannot be compared is a sentence.
    assert main([str(one), str(tmp_path / "absent")]) == 1
    (tmp_path / "bad").write_text('{"id": "1"}\n')
    with pytest.raises(UserError, match="holds no predictions of translations"):
        compare(one, tmp_path / "bad")
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="no translated utterance in common"):
        compare(one, tmp_path / "empty")
    changed = json.loads(other.read_text().splitlines()[1]) | {"reference": "another"}
    (tmp_path / "changed").write_text(json.dumps(changed) + "\n")
    with pytest.raises(UserError, match="two references of 1"):
        compare(one, tmp_path / "changed")


def test_the_page_says_how_sure_both_measures_are():
    evaluator = ROWS["bleu"].make()
    lines = [evaluator.add(*one) for one in ROWS["bleu"].given]
    (section,) = evaluator.sections(lines)
    assert "tok:13a" in section.body
    assert f"{evaluator.results()['chrf2']:.4g}" in section.body
    assert evaluator.sections(lines[3:]) == []


# ---- Accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, found = rng.integers(0, 2 + seed % 2, 30), rng.integers(0, 3, 30)
    evaluator = Accuracy(_TARGET)
    for number, pair in enumerate(zip(truth, found, strict=True)):
        evaluator.add(*_classified(number, *pair))
    results = evaluator.results()
    assert results["accuracy"] == pytest.approx(metrics.accuracy_score(truth, found))
    macro = metrics.f1_score(truth, found, average="macro", zero_division=0)
    assert results["macro_f1"] == pytest.approx(macro)
    recalls = metrics.recall_score(truth, found, average=None, labels=np.unique(truth))
    assert results["balanced_accuracy"] == pytest.approx(recalls.mean())
    confusion = metrics.confusion_matrix(truth, found, labels=range(3))
    np.testing.assert_array_equal(evaluator.confusion, confusion)
    taken = {"abc"[j]: int(n) for j, n in enumerate(confusion[0]) if n}
    assert results["classes"]["a"]["taken_for"] == taken


# ---- Verification ------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.5, 2.0, 4.0])
def test_two_normal_distributions_have_the_rates_of_the_closed_form(distance):
    """Scores N(0, 1) and N(d, 1): the equal error rate is the normal tail beyond d / 2."""
    places = scipy.stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    scores = np.concatenate([places, places + distance])
    same = np.arange(len(scores)) >= len(places)
    curve = error_curve(scores, same)
    assert curve.equal_error_rate == pytest.approx(scipy.stats.norm.sf(distance / 2), abs=1e-4)
    for p in (0.01, 0.05):
        # The best threshold is where the likelihood ratio equals the odds.
        best = distance / 2 + np.log((1 - p) / p) / distance
        cost = p * scipy.stats.norm.cdf(best - distance) + (1 - p) * scipy.stats.norm.sf(best)
        assert curve.least_cost(p) == pytest.approx(min(cost / p, 1.0), abs=(1 - p) / p / 20_000)


@pytest.mark.parametrize("seed", range(5))
def test_verification_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    same = rng.random(200) < 0.3
    scores = np.round(rng.normal(same, 1.0), 1)  # with ties
    accepted, found, _ = metrics.roc_curve(same, scores, drop_intermediate=False)
    crossing = scipy.optimize.brentq(lambda x: x - 1 + np.interp(x, accepted, found), 0.0, 1.0)
    curve = error_curve(scores, same)
    assert curve.equal_error_rate == pytest.approx(crossing, abs=1e-6)
    costs = 0.05 * (1 - found) + 0.95 * accepted
    assert curve.least_cost(0.05) == pytest.approx(costs.min() / 0.05)
    assert error_curve(np.exp(3 * scores), same).equal_error_rate == curve.equal_error_rate


def test_scores_without_information_and_perfect_ones():
    same = np.arange(10) < 4
    blind, perfect = error_curve(np.zeros(10), same), error_curve(same * 1.0, same)
    assert (blind.equal_error_rate, blind.least_cost(0.01)) == (0.5, 1.0)
    assert (perfect.equal_error_rate, perfect.least_cost(0.01)) == (0.0, 0.0)


def test_pairs_in_blocks_are_all_pairs(monkeypatch):
    """Each once, whatever is compared at a time, from a list or not; it is measured once."""
    rng = np.random.default_rng(0)
    said = [
        (Utterance(str(n), 1.0, tags={"speaker": str(n % 5)}), {}, {"embedding": one, "cohort": of})
        for n, (one, of) in enumerate(zip(*rng.normal(size=(2, 23, 8)), strict=True))
    ]
    pairs = [(a, b) for a in said for b in said if int(a[0].id) < int(b[0].id)]
    trials = [Trial(a[0].id, b[0].id, a[0].tags == b[0].tags) for a, b in pairs]
    scores = [
        np.dot(a["embedding"], b["embedding"])
        / np.linalg.norm(a["embedding"])
        / np.linalg.norm(b["embedding"])
        for (_, _, a), (_, _, b) in pairs
    ]
    expected = error_curve(np.asarray(scores), np.asarray([one.same for one in trials]))
    normalized = []
    for block, listed in ((7, ()), (60, ()), (1 << 16, ()), (7, trials), (1 << 16, trials)):
        monkeypatch.setattr(verification, "_BLOCK", block)
        evaluator = Verification("speaker", listed, nearest=3)
        for one in said:
            evaluator.add(*one)
        found = evaluator.results()
        assert (found["pairs"], found["same"]) == (253, sum(one.same for one in trials))
        assert found["eer"] == pytest.approx(expected.equal_error_rate, abs=1e-6)
        assert found["min_dcf_0.05"] == pytest.approx(expected.least_cost(0.05), abs=1e-6)
        normalized.append(found["eer_normalized"])
        with monkeypatch.context() as patched:
            patched.setattr(verification, "error_curve", None)
            assert evaluator.results() == found
            evaluator.line()
    np.testing.assert_allclose(normalized, normalized[0], atol=1e-6)


def test_the_norm_is_that_of_both_sides():
    cohort = np.array([[0.0, 0.2, 0.4, -1.0], [0.5, 0.5, 0.7, 0.1], [0.0, 0.1, 0.2, 0.3]])
    one, other = np.array([0, 1]), np.array([1, 2])
    found = normalize(np.array([0.9, 0.3]), one, other, *nearest_scores(cohort, 2))
    by_hand = (
        ((0.9 - 0.3) / 0.1 + (0.9 - 0.6) / 0.1) / 2,
        ((0.3 - 0.6) / 0.1 + (0.3 - 0.25) / 0.05) / 2,
    )
    np.testing.assert_allclose(found, by_hand)
    # What an utterance adds to all of its scores is taken away.
    shifted = cohort + np.array([[0.3], [0.0], [0.0]])
    again = normalize(np.array([0.9, 0.3]), one, other, *nearest_scores(shifted, 2))
    assert again[0] == pytest.approx(found[0] - 0.3 / 0.1 / 2)


def _added(evaluator: Evaluator, given: Sequence[Given]) -> Evaluator:
    for one in given:
        evaluator.add(*one)
    return evaluator


def test_trials_come_from_a_file(tmp_path):
    kinds = {
        "voxceleb": "1 0 1\n0 0 2\n\n0 0 gone\n",
        "kaldi": "0 1 target\n0 2 nontarget\n0 gone nontarget\n",
    }
    for name, text_of in kinds.items():
        path = tmp_path / name
        path.write_text(text_of)
        evaluator = Verification("speaker", read_trials(str(path)))
        for number, degrees in enumerate((0, 10, 60)):
            evaluator.add(*_heard(number, "", degrees))
        results = evaluator.results()
        assert (results["eer"], results["pairs"], results["pairs_left_out"]) == (0.0, 2, 1)
        assert evaluator.line().endswith("2 pairs, 1 of the file of trials left out")
    # What the file does not name is compared in all pairs, and said to be: it may pick the model.
    others = [_heard(number, who, 10.0 * number) for number, who in enumerate("aabb", 3)]
    trials = read_trials(str(path))
    (found, line), (plain, _) = (
        (evaluator.results(), evaluator.line())
        for evaluator in (_added(Verification("speaker", some), others) for some in (trials, ()))
    )
    assert found == plain | {"pairs_left_out": 3}
    assert found["pairs"] == 6
    assert "names none of them" in line
    unknown = _added(Verification("speaker", trials), [_heard(3, "", 0), _heard(4, "a", 0)])
    assert unknown.results()["eer"] is None
    (tmp_path / "bad").write_text("1 0 1\n2 0 1\n")
    with pytest.raises(UserError, match="bad:2: '2 0 1' is not a trial"):
        read_trials(str(tmp_path / "bad"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty hold no pair"):
        read_trials(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="absent cannot be read"):
        read_trials(str(tmp_path / "absent"))


def test_utterances_that_make_no_pairs_are_refused_before_they_are_heard(monkeypatch):
    said = [_heard(number, who, 0)[0] for number, who in enumerate("aabb")]
    all_pairs, listed = Verification("speaker"), Verification("", (Trial("0", "1", True),))
    all_pairs.check(said)
    for evaluator, some, says in (
        (all_pairs, said[:2], "no pair of two speakers among the 2 utterances, such as '0'"),
        (all_pairs, said[1:3], "no pair of one speaker among"),
        (listed, said, "no pair of two speakers among .* config.task.trials"),
        (listed, said[1:], "no pair of one speaker among"),
        (listed, [], "no pair of one speaker among the 0 utterances: take"),
    ):
        with pytest.raises(UserError, match=says):
            evaluator.check(some)
    monkeypatch.setattr(verification, "_MOST", 3)
    with pytest.raises(UserError, match="all pairs of 4 utterances are too many"):
        all_pairs.check(said)


def test_bits_are_no_share_that_a_report_would_show_in_per_cent():
    assert not hasattr(Bits(), "tallies")


def test_an_utterance_of_nobody_is_named():
    with pytest.raises(UserError, match="utterance 7 has no tag 'speaker'"):
        Verification("speaker").check([_heard(7, "", 0)[0]])
    with pytest.raises(UserError, match="utterance 7 has no tag 'speaker'"):
        Verification("speaker").add(*_heard(7, "", 0))
