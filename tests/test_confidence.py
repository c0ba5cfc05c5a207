"""Confidence: the calibration against what was drawn, the measures against their definitions."""

import numpy as np
import pytest

from speech_jax.decoding import confidence


def test_the_calibration_that_made_the_words_is_found():
    rng = np.random.default_rng(0)
    evidence = rng.uniform(0.05, 0.999, 20_000)
    right = rng.random(len(evidence)) < confidence.calibrated(evidence, 0.6, -1.0)
    scale, offset = confidence.fit(evidence, right)
    assert (scale, offset) == (pytest.approx(0.6, abs=0.05), pytest.approx(-1.0, abs=0.05))
    before = confidence.reliability(evidence, right)[1]
    curve, after = confidence.reliability(confidence.calibrated(evidence, scale, offset), right)
    assert after < 0.01 < 0.1 < before
    assert sum(one.words for one in curve) == len(evidence)
    assert all(one.low <= one.confidence <= one.high for one in curve)


@pytest.mark.parametrize("right", [[True] * 9, [False] * 9, []])
def test_words_of_one_kind_give_no_certainty(right):
    scale, offset = confidence.fit(np.full(len(right), 0.9), right)
    assert np.isfinite([scale, offset]).all()
    assert 0.01 < confidence.calibrated(np.asarray([0.9]), scale, offset)[0] < 0.99


def test_few_errors_give_no_absurd_calibration():
    rng = np.random.default_rng(0)
    evidence = 1 - rng.uniform(0, 1e-4, 400)
    right = np.arange(400) >= 10
    scale, offset = confidence.fit(evidence, right)
    assert scale > 0.3  # 0.2 would call noise right
    assert confidence.calibrated(np.asarray([0.05]), scale, offset)[0] < 0.5


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    sure, right = rng.integers(0, 9, 60) / 8, rng.random(60) < 0.7
    pairs = [(good > bad) + (good == bad) / 2 for good in sure[right] for bad in sure[~right]]
    assert confidence.area_under_roc(sure, right) == pytest.approx(np.mean(pairs))
    assert confidence.area_under_roc(sure, np.ones(60, bool)) is None
    assert confidence.reliability([], []) == ([], None)


def test_words_are_right_in_a_minimal_alignment():
    right = confidence.right_words("THE CAT SAT DOWN", ["THE", "A", "CAT", "SAD", "DOWN"])
    assert right == [True, False, True, False, True]
    assert confidence.right_words("", ["A"]) == [False]
