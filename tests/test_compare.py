"""The gain of a training and its interval: those of known distributions, in whatever order."""

import json

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.sources import Utterance
from speech_jax.data.text import CharacterTokenizer
from speech_jax.evaluators.accuracy import Accuracy
from speech_jax.evaluators.bleu import Bleu
from speech_jax.evaluators.compare import difference, gain
from speech_jax.gain import _line as gain_line

EVALUATOR = Accuracy(Category(("a", "b")))


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
    found = gain(EVALUATOR, write(tmp_path / "one", before), write(tmp_path / "other", after))
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
    found = gain(EVALUATOR, *paths, said)
    error = gains.std() / np.sqrt(40)
    expected = gains.mean() + 1.96 * error * np.array([-1, 1])
    np.testing.assert_allclose(found["interval"], expected, atol=0.2 * error)
    alone = gain(EVALUATOR, *paths, said[:-1])  # somebody is unknown
    assert (found["over"], alone["over"]) == ("speakers", "utterances")
    assert np.ptp(alone["interval"]) < 0.3 * np.ptp(found["interval"])


def test_what_one_of_them_lacks_is_in_neither(tmp_path):
    one = write(tmp_path / "one", [True, False])
    other = write(tmp_path / "other", [True, True, False, False])
    found = gain(EVALUATOR, one, other)
    assert (found["utterances"], found["gain"], found["after"]) == (2, 0.5, 0.0)
    nothing = gain(EVALUATOR, write(tmp_path / "none", []), other)
    assert (nothing["utterances"], nothing["gain"], nothing["interval"]) == (0, None, None)


def test_what_is_no_sum_over_utterances_is_compared_without_an_interval():
    found = difference("eer", "min", {"eer": 0.2}, {"eer": 0.05, "utterances": 7})
    assert (found["before"], found["after"], found["utterances"]) == (0.2, 0.05, 7)
    assert (found["gain"], found["interval"]) == (pytest.approx(0.15), None)
    assert difference("accuracy", "max", {"accuracy": 0.5}, {"accuracy": 0.75})["gain"] == 0.25
    assert difference("eer", "min", {"eer": 0.2}, {"eer": None})["gain"] is None
    assert gain_line("dev", found) == "dev: eer 0.2000 before, 0.0500 after, gain 0.1500"


def test_bleu_is_gained_by_the_same_draws(tmp_path):
    """It is sacrebleu's, before and after, and more of it is a gain."""
    evaluator = Bleu(Transcript(CharacterTokenizer("a")))
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(list("abcde"), 6)) for _ in range(60)]
    spoilt = lambda text, share: " ".join("z" if rng.random() < share else c for c in text.split())
    texts = {share: [spoilt(text, share) for text in said] for share in (0.4, 0.1)}
    paths = []
    for share, written in texts.items():
        rows = zip(said, written, strict=True)
        lines = [
            {"id": str(n), "reference": reference, "hypothesis": hypothesis}
            for n, (reference, hypothesis) in enumerate(rows)
        ]
        lines.append({"id": "untranslated", "reference": "", "hypothesis": "a b c d"})
        paths.append(tmp_path / f"{share}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gain(evaluator, *paths)
    wanted = [BLEU(force=True).corpus_score(written, [said]).score for written in texts.values()]
    assert (found["metric"], found["of"]) == ("bleu", 100)
    assert (found["before"], found["after"]) == pytest.approx(tuple(wanted))
    assert found["gain"] == pytest.approx(wanted[1] - wanted[0])
    low, high = found["interval"]
    assert 0 < low < found["gain"] < high
    backwards = gain(evaluator, *paths[::-1])
    np.testing.assert_allclose(backwards["interval"], [-high, -low])
