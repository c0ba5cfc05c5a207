"""One contract for all evaluators, a row for each; error rates equal jiwer's on anything."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.data import text
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.sources import Utterance
from speech_jax.evaluators import Evaluator
from speech_jax.evaluators.errors import ErrorCounts, Errors, count_errors
from speech_jax.evaluators.masked import Masked

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


@dataclasses.dataclass(frozen=True)
class Row:
    """An evaluator in the suite.

    Attributes:
      given: what it measures, with results that are known.
      empty: utterances that there is nothing to measure of.
      says: what its line says of `given`, and of `empty`.
    """

    make: Callable[[], Evaluator]
    given: Sequence[Given]
    results: dict[str, float]
    empty: Sequence[Given]
    says: tuple[str, str]


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
}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def row(request) -> Row:
    return request.param


def _measure(row: Row, given: Sequence[Given]) -> tuple[Evaluator, list[dict[str, Any]]]:
    evaluator = row.make()
    return evaluator, [evaluator.add(*one) for one in given]


def test_results_are_what_they_should_be(row):
    evaluator, _ = _measure(row, row.given)
    assert evaluator.results() == pytest.approx(row.results)
    assert evaluator.line() == row.says[0]
    assert set(evaluator.rates) <= evaluator.results().keys()


def test_the_order_does_not_matter(row):
    _, lines = _measure(row, row.given)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(row.given))
        evaluator, shuffled = _measure(row, [row.given[place] for place in order])
        assert evaluator.results() == pytest.approx(row.results)
        assert shuffled == [lines[place] for place in order]  # a line is of its utterance alone


def test_a_split_is_more_than_the_mean_of_its_halves(row):
    """Rates are of sums: an utterance counts as much as there is in it, empty ones nothing."""
    evaluator, _ = _measure(row, [*row.empty[:1], *row.given, *row.given, *row.empty[:1]])
    found = evaluator.results()
    for name in evaluator.rates:
        assert found[name] == pytest.approx(row.results[name])


def test_tallies_of_lines_divide_to_the_results(row):
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
