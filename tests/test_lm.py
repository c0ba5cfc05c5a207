"""Language models: against the definition of the smoothing, KenLM's reading, and round trips."""

import collections
import math

import numpy as np
import pytest

from speech_jax.data.text import CharacterTokenizer
from speech_jax.decoding import lm, ngram


def sentences(count: int = 1500, seed: int = 0) -> list[list[str]]:
    """Of words of which some are frequent, so that all counts of counts are there."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(400)]
    share = np.arange(1, 401) ** -1.5
    return [
        rng.choice(words, size=rng.integers(1, 9), p=share / share.sum()).tolist()
        for _ in range(count)
    ]


def defined(texts: list[list[str]], order: int):
    """p(word | context) from the formulas of Chen and Goodman, with dictionaries."""
    spoken = [["<s>", *text, "</s>"] for text in texts]
    counts = [collections.Counter() for _ in range(order + 1)]
    for text in spoken:
        for n in range(1, order + 1):
            counts[n].update(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
    adjusted = [None] * (order + 1)
    for n in range(1, order + 1):
        left = collections.Counter(gram[1:] for gram in counts[n + 1]) if n < order else counts[n]
        adjusted[n] = {
            gram: counts[n][gram] if gram[0] == "<s>" else left[gram]
            for gram in counts[n]
            if gram != ("<s>",)
        }
    discounts = [None] * (order + 1)
    for n in range(1, order + 1):
        t = collections.Counter(adjusted[n].values())
        y = t[1] / (t[1] + 2 * t[2])
        discounts[n] = [0, *(k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3))]
    vocabulary = {word for text in texts for word in text} | {"</s>", "<unk>"}

    def probability(word, context):
        n = len(context) + 1
        after = {g: c for g, c in adjusted[n].items() if g[:-1] == context}
        lower = probability(word, context[1:]) if context else 1 / len(vocabulary)
        if not after:
            return lower
        total = sum(after.values())
        taken = lambda count: discounts[n][min(count, 3)]
        count = after.get((*context, word), 0)
        weight = sum(map(taken, after.values())) / total
        return (count - taken(count)) / total + weight * lower

    return probability


def test_the_smoothing_is_that_of_its_definition():
    texts = sentences()
    made, probability = lm.build(texts, 3), defined(texts, 3)
    for text in [*texts[:3], ["w3", "w399", "never", "w0"]]:
        spoken, expected = ["<s>", *text, "</s>"], 0.0
        spoken = [word if word in made.ids else "<unk>" for word in spoken]
        for i in range(1, len(spoken)):
            expected += math.log(probability(spoken[i], tuple(spoken[max(0, i - 2) : i])))
        assert made.score(text) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one(order):
    made = lm.build(sentences(60), order)
    for context in ([], ["w0"], ["w5", "w1"], ["w50", "w0", "w2"]):
        before = made.score(context, end=False)
        after = [made.score([*context, one], end=False) for one in made.units if one[0] != "<"]
        after += [made.score(context), made.score([*context, "<unk>"], end=False)]
        assert np.exp(np.asarray(after) - before).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_a_file_gives_the_model_back(name, tmp_path):
    made = lm.build(sentences(), 3)
    made.write(tmp_path / name)
    read = ngram.read(tmp_path / name)
    assert read.units == made.units
    for old, new in zip(made.levels, read.levels, strict=True):
        np.testing.assert_array_equal(old.before, new.before)
        np.testing.assert_array_equal(old.unit, new.unit)
        np.testing.assert_allclose(old.log10, new.log10, atol=1e-5)
        np.testing.assert_allclose(old.backoff, new.backoff, atol=1e-5)


def test_kenlm_gives_a_text_the_same_score(tmp_path):

    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    dictionary = pytest.importorskip("flashlight.lib.text.dictionary")

    made = lm.build(sentences(), 3)
    made.write(tmp_path / "lm.arpa")
    known = dictionary.Dictionary()
    for unit in made.units:
        known.add_entry(unit)
    known.set_default_index(known.get_index("<unk>"))
    theirs = kenlm.KenLM(str(tmp_path / "lm.arpa"), known)
    for text in [*sentences(20, seed=1), ["w3", "<unk>", "w0"]]:
        state, total = theirs.start(False), 0.0
        for unit in text:
            state, score = theirs.score(state, known.get_index(unit))
            total += score
        total += theirs.finish(state)[1]
        # They count in log10.
        assert made.score(text) == pytest.approx(total * math.log(10), abs=2e-3)


def test_the_command_writes_what_a_model_writes(tmp_path, capsys):
    CharacterTokenizer(" ABC", "upper").save(tmp_path / "tokenizer.json")
    text = tmp_path / "text.txt"
    text.write_text("a cab\nab ba\n\nno such\n")
    out = tmp_path / "lm.arpa"
    assert lm.main(["build", str(text), str(out), "--order", "2", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 lines are left out" in said
    assert set(ngram.read(out).units) == {"<unk>", "<s>", "</s>", "A", "B", "C", "▁"}
    words = ["build", str(text), str(out), "--unit=words", "--model", str(tmp_path)]
    assert lm.main(words) == 0
    assert {"CAB", "NO", "SUCH"} < set(ngram.read(out).units)


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.arpa").write_text("\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t<s>\n\n\\end\\\n")
    (tmp_path / "half.arpa.gz").write_bytes(b"\x1f\x8b\x08")
    for name in ("bad.arpa", "half.arpa.gz", "none.arpa"):
        with pytest.raises(ngram.LanguageModelError, match=name):
            ngram.read(tmp_path / name)
    out = str(tmp_path / "out.arpa")
    assert lm.main(["build", str(tmp_path / "empty.txt"), out]) == 1
    assert lm.main(["build", str(tmp_path / "no.txt"), out]) == 1
    assert lm.main(["build", str(tmp_path / "empty.txt"), out, "--unit=labels"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(line.startswith("error: ") for line in said)
