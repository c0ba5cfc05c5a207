"""The gain of a training and its interval: those of known distributions, in whatever order."""

import json

import numpy as np
import pytest

from speech_jax.data.parts.category import Category
from speech_jax.data.sources import Utterance
from speech_jax.evaluators.accuracy import Accuracy
from speech_jax.evaluators.compare import gain
from speech_jax.gain import _line

TALLIES = Accuracy(Category(("a", "b"))).tallies


def write(path, right):
    lines = [
        {"id": str(number), "reference": "a", "prediction": "a" if good else "b"}
        for number, good in enumerate(right)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_interval_is_that_of_the_differences(tmp_path):
    """Of paired differences it is the normal one: mean +- 1.96 standard errors."""
    rng = np.random.default_rng(0)
    before = rng.random(1_000) < 0.6
    after = before | (rng.random(1_000) < 0.3)
    found = gain(TALLIES, write(tmp_path / "one", before), write(tmp_path / "other", after))
    differences = after.astype(float) - before
    error = differences.std() / np.sqrt(1_000)
    assert found["metric"] == "error_rate"
    assert found["gain"] == pytest.approx(differences.mean())
    assert (found["before"], found["after"]) == pytest.approx((1 - before.mean(), 1 - after.mean()))
    expected = differences.mean() + 1.96 * error * np.array([-1, 1])
    np.testing.assert_allclose(found["interval"], expected, atol=0.2 * error)
    # Pairing tells more than two splits of their own would.
    apart = np.sqrt((before.var() + after.var()) / 1_000)
    assert error < 0.7 * apart


def test_utterances_of_one_speaker_are_drawn_together(tmp_path):
    """Of speakers who gain all or nothing there is an interval as of so few draws."""
    rng = np.random.default_rng(0)
    gains = rng.random(40) < 0.5
    before, after = np.zeros(1_000, bool), gains[np.arange(1_000) % 40]
    paths = write(tmp_path / "one", before), write(tmp_path / "other", after)
    said = [Utterance(str(n), 1.0, tags={"speaker": f"s{n % 40}"}) for n in range(1_000)]
    found = gain(TALLIES, *paths, said)
    error = gains.std() / np.sqrt(40)
    expected = gains.mean() + 1.96 * error * np.array([-1, 1])
    np.testing.assert_allclose(found["interval"], expected, atol=0.2 * error)
    alone = gain(TALLIES, *paths, said[:-1])  # somebody is unknown
    assert (found["over"], alone["over"]) == ("speakers", "utterances")
    assert np.ptp(alone["interval"]) < 0.3 * np.ptp(found["interval"])


def test_what_one_of_them_lacks_is_in_neither(tmp_path):
    one = write(tmp_path / "one", [True, False])
    other = write(tmp_path / "other", [True, True, False, False])
    found = gain(TALLIES, one, other)
    assert (found["utterances"], found["gain"], found["after"]) == (2, 0.5, 0.0)
    nothing = gain(TALLIES, write(tmp_path / "none", []), other)
    assert (nothing["utterances"], nothing["gain"], nothing["interval"]) == (0, None, None)


def test_a_gain_is_said_whether_or_not_it_has_an_interval(tmp_path):
    some, all_right = [True, False], [True, True]
    paths = [write(tmp_path / str(n), right) for n, right in enumerate((some, all_right))]
    said = lambda *paths: _line("dev", gain(TALLIES, *paths))
    points = "dev: error_rate 50.00% before, 0.00% after, gain 50.00 points"
    assert said(*paths) == f"{points} (95% over utterances: 0.00 to 100.00)"
    nothing = "dev: error_rate 0.00% before, 0.00% after, gain 0.00 points"
    assert said(paths[1], paths[1]) == nothing  # without an error there is none
    assert "no gain" in said(write(tmp_path / "none", []), paths[0])
