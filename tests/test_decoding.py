"""Greedy decoding against its definition, and what a decoder makes of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer, make_tokenizer
from speech_jax.decoding import ctc as decoding
from speech_jax.decoding import words
from speech_jax.decoding.decoder import Decoder, DecoderError
from speech_jax.ops.ctc import ctc_align

TRANSCRIPT = Transcript(CharacterTokenizer(" AB"))


def test_greedy_merges_repeats_then_drops_blanks():
    rng = np.random.default_rng(0)
    best = rng.integers(0, 4, (64, 12))
    lengths = rng.integers(0, 13, 64)
    logits = jax.nn.one_hot(jnp.asarray(best), 4)
    labels, counts = jax.jit(decoding.greedy)(logits, jnp.asarray(lengths))
    for row in range(64):
        path = best[row, : lengths[row]]
        expected = [label for label, _ in itertools.groupby(path) if label != 0]
        assert labels[row, : counts[row]].tolist() == expected
        assert not np.any(labels[row, counts[row] :])


def test_the_best_path_is_the_alignment_of_its_labels():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(3 * rng.standard_normal((32, 12, 4)), jnp.float32)
    lengths = jnp.asarray(rng.integers(0, 13, 32), jnp.int32)
    path = jax.jit(decoding.best_path)(logits, lengths)
    starts, ends, score = jax.jit(ctc_align)(logits, lengths, path.labels, path.count)
    np.testing.assert_array_equal(path.starts, starts)
    np.testing.assert_array_equal(path.ends, ends)
    np.testing.assert_allclose(path.score, score, rtol=1e-5, atol=1e-5)


def test_words_carry_the_times_of_their_labels():
    path = [0, 0, 2, 2, 0, 3, 1, 0, 0, 3, 0, 0]  # "AB B"
    logits = 9 * np.eye(4, dtype=np.float32)[path][None]
    (found,) = Decoder({}, TRANSCRIPT, 0.04)(logits, [10])
    assert found.text == "AB B"
    first, second = found.words
    assert (first.text, second.text) == ("AB", "B")
    # A word holds the middles of its labels, and the next one begins where it ends.
    assert 0 <= first.start < 0.12 < 0.22 <= first.end == second.start < 0.38 < second.end <= 0.4
    assert all(0.99 < word.confidence < 1 for word in found.words)
    assert found.alternatives == ((found.text, found.score),)
    (other,) = Decoder({"calibration": (1.0, -9.0)}, TRANSCRIPT, 0.04)(logits, [10])
    assert all(word.confidence < 0.5 for word in other.words)


def test_a_pause_belongs_to_no_word():
    path = [2, 0, 1, *[0] * 60, 3, *[0] * 30]  # "A", 2.4 s of nothing, "B"
    logits = 9 * np.eye(4, dtype=np.float32)[path][None]
    (found,) = Decoder({}, TRANSCRIPT, 0.04)(logits, [len(path)])
    first, second = found.words
    assert first.end < 0.6 < 2 < second.start < 2.54 < second.end < 3


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_words_are_those_of_the_text(kind):
    texts = ["THE CAT SAT ON THE MAT", "A CAT AND A HAT", "THAT HAT"]
    tokenizer = make_tokenizer(kind, texts, vocabulary_size=16)
    for text in texts:
        spoken = words.spans(tokenizer.encode(text), tokenizer.spellings)
        assert " ".join(word for word, _, _ in spoken) == text
    spaces = CharacterTokenizer(" AB")
    assert words.spans([1, 2, 1, 1, 3, 2, 1], spaces.spellings) == [("A", 1, 2), ("BA", 4, 6)]


@pytest.mark.parametrize(
    "setting",
    [{"lm_weight": -0.1}, {"calibration": (1.0, np.nan)}]
    + [{name: value} for name in ("lm_weight", "bonus", "skip") for value in (np.nan, np.inf)],
)
def test_numbers_that_cannot_be_are_refused(setting):
    with pytest.raises(DecoderError, match=rf"config\.decoder\.{next(iter(setting))}=.* must be"):
        Decoder(setting, TRANSCRIPT, 0.04)


def test_words_are_joined_by_single_spaces():
    class Spaced:  # a tokenizer of pieces that begin and end with spaces
        spellings = ("", " A", " ", "B")

        def decode(self, ids):
            return "".join(self.spellings[label] for label in ids)

    logits = 9 * np.eye(4, dtype=np.float32)[[1, 2, 0, 2, 1, 3, 2]][None]
    for settings in ({}, {"name": "beam", "nbest": 3}):
        (found,) = Decoder(settings, Transcript(Spaced()), 0.04)(logits, [7])
        assert found.text == found.alternatives[0][0] == "A AB"
        assert all("  " not in text for text, _ in found.alternatives)


def test_an_unknown_setting_is_named():
    with pytest.raises(DecoderError, match=r"config\.decoder\.name='best' must be one of greedy"):
        Decoder({"name": "best"}, TRANSCRIPT, 0.04)
    with pytest.raises(DecoderError, match="'beams'; it has name"):
        Decoder({"beams": 3}, TRANSCRIPT, 0.04)
