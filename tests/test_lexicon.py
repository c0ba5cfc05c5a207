"""Words of a lexicon by flashlight-text, and what is said without it."""

import importlib
import itertools

import numpy as np
import pytest

from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer, make_tokenizer
from speech_jax.decoding import lm
from speech_jax.decoding.decoder import Decoder, DecoderError
from speech_jax.decoding.ngram import LanguageModelError

TEXTS = ["A CAT SAT", "THE CAT", "THE MAT", "A MAT SAT"]


@pytest.fixture
def words(tmp_path) -> str:
    """A language model of the words of TEXTS."""
    path = tmp_path / "words.arpa.gz"
    lm.build([text.split() for text in TEXTS], 2).write(path)
    return str(path)


def spoken(tokenizer, text: str) -> np.ndarray:
    """Logits [1, T, K] in which every label is said for two frames, between blanks and pauses."""
    path = [0] * 25
    for label in tokenizer.encode(text):
        path += [label, label, 0]
    path += [0] * 25
    noise = np.random.default_rng(0).standard_normal((len(path), tokenizer.vocabulary_size))
    return (noise + 5 * np.eye(tokenizer.vocabulary_size)[path]).astype(np.float32)[None]


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_only_words_of_the_lexicon_are_heard(kind, words):
    pytest.importorskip("flashlight.lib.text.decoder")
    tokenizer = make_tokenizer(kind, [*TEXTS, "CUTS HAM"], vocabulary_size=14)
    begins = tokenizer.spellings[tokenizer.encode("CAT")[0]]
    assert begins.startswith(" ") == (kind == "sentencepiece")
    settings = {"name": "lexicon", "lm": words, "lm_weight": 1.0, "nbest": 3}
    decoder = Decoder(settings, Transcript(tokenizer), 0.04)
    for text in TEXTS:
        logits = spoken(tokenizer, text)
        (found,) = decoder(logits, [logits.shape[1]])
        assert found.text == text
        assert [word.text for word in found.words] == text.split()
        assert all(one.end <= two.start for one, two in itertools.pairwise(found.words))
        assert found.words[-1].end <= logits.shape[1] * 0.04
        assert found.alternatives[0] == (text, found.score)
    logits = spoken(tokenizer, "THE CUT SAT")
    assert set(decoder(logits, [logits.shape[1]])[0].text.split()) < set(" ".join(TEXTS).split())
    assert decoder(logits, [0])[0].text == ""


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
@pytest.mark.parametrize("held", [1, 2, 5])
def test_clear_words_are_those_of_greedy_however_long_a_label_lasts(kind, held, tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder")
    texts = ["FOUR FOUR SEVEN", "SEVEN FOUR", "SEVEN SEVEN FOUR TEN", "TEN"]
    tokenizer = make_tokenizer(kind, texts * 5, vocabulary_size=14)
    known = tmp_path / "words.txt"
    known.write_text("FOUR\nSEVEN\nTEN\n")
    # A bonus for each word, and still none is said twice.
    settings = {"name": "lexicon", "lexicon": str(known), "bonus": 2.0}
    for text in texts:
        path, before = [0, 0], 0
        for label in tokenizer.encode(text):  # blanks only where a label is said twice
            path += [0] * (label == before) + [label] * held
            before = label
        path += [0] * (128 - len(path))
        logits = (9 * np.eye(tokenizer.vocabulary_size)[path]).astype(np.float32)[None]
        found, greedy = (
            Decoder(one, Transcript(tokenizer), 0.04)(logits, [len(path)])[0]
            for one in (settings, {})
        )
        assert found.text == greedy.text == text
        assert [word[:3] for word in found.words] == [word[:3] for word in greedy.words]


def test_without_flashlight_it_says_what_to_install(words, monkeypatch):
    def refuse(name, *arguments):
        if name.startswith("flashlight"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", refuse)
    decoder = Decoder({"name": "lexicon", "lm": words}, Transcript(CharacterTokenizer(" A")), 0.04)
    with pytest.raises(LanguageModelError, match=r"pip install 'speech_jax\[lm\]'"):
        decoder(np.zeros((1, 4, 3), np.float32), [4])


def test_words_that_cannot_be_spelled_are_named(words):
    pytest.importorskip("flashlight.lib.text.decoder")
    decoder = Decoder({"name": "lexicon", "lm": words}, Transcript(CharacterTokenizer(" X")), 0.04)
    with pytest.raises(LanguageModelError, match="no word that the model can spell"):
        decoder(np.zeros((1, 4, 3), np.float32), [4])
    with pytest.raises(DecoderError, match="needs words"):
        Decoder({"name": "lexicon"}, Transcript(CharacterTokenizer(" A")), 0.04)
