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
