"""Beam search over the words of a lexicon with a KenLM model of words, by flashlight-text.

Kahn et al., "Flashlight: enabling innovation in tools for machine learning" (2022). It runs on the
host, an utterance at a time; the extra `lm` brings it.
"""

import gzip
import importlib
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from speech_jax import files
from speech_jax.decoding import ngram
from speech_jax.decoding.ngram import UNKNOWN, LanguageModelError

_IMPOSSIBLE = -1e4  # log probability


class Found(NamedTuple):
    """A hypothesis: its words, the best label of each frame of its path, its score in nats."""

    words: list[str]
    path: np.ndarray
    score: float


class Lexicon:
    """The search. Called with log probabilities [T, K] of an utterance, it gives the n best."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        width: int,
        labels: int,
        nbest: int,
        lm: str,
        lm_weight: float,
        bonus: float,
        words: str,
    ):
        """Prepares the search.

        Args:
          tokenizer: of the model (data/text.py); words are spelled by it.
          width, labels, nbest, lm_weight, bonus: as of Settings; the bonus is for each word.
          lm: an ARPA file of words; words: a file of the words to know, one a line. One of them
            may be empty: without `words`, they are those of `lm`.

        Raises:
          LanguageModelError: flashlight-text is not installed, or a file cannot be used.
        """
        try:
            text = importlib.import_module("flashlight.lib.text.decoder")
            self._kenlm = importlib.import_module("flashlight.lib.text.decoder.kenlm")
            dictionary = importlib.import_module("flashlight.lib.text.dictionary")
        except ImportError as error:
            raise LanguageModelError(
                "config.decoder.name='lexicon' needs flashlight-text, which is not installed: "
                "pip install 'speech_jax[lm]'"
            ) from error
        known = _read_words(words) if words else ngram.read_units(lm)
        self._entries = dictionary.Dictionary()
        spelled = []
        for word in known:
            if labels_of := _spelling(tokenizer, word):
                self._entries.add_entry(word)
                spelled.append((word, labels_of))
        if not spelled:
            raise LanguageModelError(
                f"{words or lm} holds no word that the model can spell: write the words as the "
                "model's vocabulary does (python -m speech_jax.decoding.lm build --unit words "
                "--model MODEL)"
            )
        self._entries.add_entry(UNKNOWN)
        # A word that is spelled with no space before it ends with one, which is what flashlight
        # calls silence. Where words begin with theirs, silence is a label that never comes.
        spellings = tokenizer.spellings
        self._ends = " " in spellings and spellings[spelled[0][1][0]][0] != " "
        space = spellings.index(" ") if self._ends else len(spellings)
        model = self._model(lm) if lm else text.ZeroLM()
        trie = text.Trie(len(spellings) + 1, space)
        start = model.start(False)
        for word, labels_of in spelled:
            index = self._entries.get_index(word)
            labels_of = [*labels_of, space] if self._ends else labels_of
            trie.insert(labels_of, index, model.score(start, index)[1])
        trie.smear(text.SmearingMode.MAX)
        options = text.LexiconDecoderOptions(
            beam_size=width,
            beam_size_token=min(labels, len(spellings) + 1),
            beam_threshold=50.0,
            lm_weight=lm_weight * np.log(10),  # KenLM counts in log10
            word_score=bonus,
            unk_score=-np.inf,
            sil_score=0.0,
            log_add=True,
            criterion_type=text.CriterionType.CTC,
        )
        unknown = self._entries.get_index(UNKNOWN)
        self._decoder = text.LexiconDecoder(options, trie, model, space, 0, unknown, [], False)
        self._space, self._nbest = space, nbest

    def __call__(self, log_probs: np.ndarray) -> list[Found]:
        """The n best hypotheses, the best first."""
        frames, size = log_probs.shape
        never = np.full((frames, 1), _IMPOSSIBLE, np.float32)
        log_probs = np.concatenate([log_probs, never], axis=1)
        if self._ends:  # the last word ends where the utterance does: in a space that is free
            last = np.full((1, size + 1), _IMPOSSIBLE, np.float32)
            last[0, self._space] = 0
            log_probs = np.concatenate([log_probs, last])
        log_probs = np.ascontiguousarray(log_probs, np.float32)
        found = self._decoder.decode(log_probs.ctypes.data, *log_probs.shape)
        return [
            Found(
                [self._entries.get_entry(word) for word in one.words if word >= 0],
                np.asarray(one.tokens[1 : frames + 1], np.int64),
                float(one.score),
            )
            for one in found[: self._nbest]
        ]

    def _model(self, path: str) -> Any:
        file = files.expand(path)
        try:
            if not file.name.endswith(".gz"):
                return self._kenlm.KenLM(str(file), self._entries)
            with tempfile.TemporaryDirectory() as folder:
                plain = pathlib.Path(folder) / "lm.arpa"
                plain.write_bytes(gzip.decompress(file.read_bytes()))
                return self._kenlm.KenLM(str(plain), self._entries)
        except (OSError, EOFError, RuntimeError) as error:
            raise LanguageModelError(f"{path} cannot be read by KenLM: {error}") from error


def _read_words(path: str) -> Sequence[str]:
    try:
        return files.expand(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise LanguageModelError(f"{path} cannot be read as a list of words: {error}") from error


def _spelling(tokenizer: Any, word: str) -> list[int]:
    """The labels of a word; none where they write another one."""
    try:
        labels = tokenizer.encode(word)
    except ValueError:  # a character that the model lacks
        return []
    return labels if tokenizer.decode(labels) == word else []
