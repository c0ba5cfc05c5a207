"""Beam search over the words of a lexicon with a KenLM model of words, by flashlight-text.

Kahn et al., "Flashlight: enabling innovation in tools for machine learning" (2022). It runs on the
host, an utterance at a time; the extra `lm` brings it.

The search is over labels, and what is asked at every label is whether the letters so far are the
beginning of words that are known. (flashlight's own search over a lexicon cannot hold the last
label of a word for a second frame, which a word whose end is no space does.)
"""

import contextlib
import dataclasses
import gzip
import importlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
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
            kenlm = importlib.import_module("flashlight.lib.text.decoder.kenlm")
            dictionary = importlib.import_module("flashlight.lib.text.dictionary")
        except ImportError as error:
            raise LanguageModelError(
                "config.decoder.name='lexicon' needs flashlight-text, which is not installed: "
                "pip install 'speech_jax[lm]'"
            ) from error
        self._spellings = tokenizer.spellings
        known = _read_words(words) if words else ngram.read_units(lm)
        known = [word for word in known if _is_spelled(tokenizer, word)]
        if not known:
            raise LanguageModelError(
                f"{words or lm} holds no word that the model can spell: write the words as the "
                "model's vocabulary does (python -m speech_jax.decoding.lm build --unit words "
                "--model MODEL)"
            )
        self._known = frozenset(known)
        entries = dictionary.Dictionary()
        for word in (*dict.fromkeys(known), UNKNOWN):
            entries.add_entry(word)
        model = _kenlm(kenlm, lm, entries) if lm else text.ZeroLM()
        weight = lm_weight * np.log(10)  # KenLM counts in log10
        self._words = _words_of_labels(text, model, weight, bonus, self._spellings)
        for word in self._known:
            self._words.add(word, entries.get_index(word))
        options = text.LexiconFreeDecoderOptions(
            beam_size=width,
            beam_size_token=min(labels, len(self._spellings)),
            beam_threshold=50.0,
            lm_weight=1.0,
            sil_score=0.0,
            log_add=True,
            criterion_type=text.CriterionType.CTC,
        )
        none = -1  # silence, which is no label here
        self._decoder = text.LexiconFreeDecoder(options, self._words, none, 0, [])
        self._nbest = nbest

    def __call__(self, log_probs: np.ndarray) -> list[Found]:
        """The n best hypotheses, the best first."""
        frames = len(log_probs)
        log_probs = np.ascontiguousarray(log_probs, np.float32)
        found: dict[tuple[str, ...], Found] = {}
        for one in self._decoder.decode(log_probs.ctypes.data, *log_probs.shape):
            path = np.asarray(one.tokens[1 : frames + 1], np.int64)
            begins = path[np.diff(path, prepend=0) != 0]
            said = "".join(self._spellings[label] for label in begins).split()
            words = tuple(word for word in said if word in self._known)  # not the half of one
            score = float(one.score)
            if words in found:  # with a blank at the end or none, or spelled otherwise
                score = float(np.logaddexp(score, found[words].score))
                path = found[words].path
            found[words] = Found(list(words), path, score)
        self._words.forget()
        return sorted(found.values(), key=lambda one: -one.score)[: self._nbest]


@dataclasses.dataclass
class _Node:
    """Letters that words begin with: what goes on from them, the word that they are, or -1."""

    after: "dict[str, _Node]" = dataclasses.field(default_factory=dict)
    word: int = -1
    best: float = -np.inf  # that the language model gives a word that begins so, weighed


def _words_of_labels(
    text: Any, model: Any, weight: float, bonus: float, spellings: Sequence[str]
) -> Any:
    """A language model of labels for flashlight: of words that are known, spelled in any way.

    What `model` gives a word is counted from its first letter on, as the best of the words that
    begin so, and put right where the word ends.
    """

    class Words(text.LM):
        def __init__(self):
            super().__init__()
            self._root = _Node(best=0.0)
            self._begin = model.start(False)
            self._at: dict[Any, tuple[_Node, Any]] = {}  # by state, which is one of labels

        def add(self, word: str, index: int) -> None:
            gain = weight * model.score(self._begin, index)[1]
            node = self._root
            for letter in word:
                node = node.after.setdefault(letter, _Node())
                node.best = max(node.best, gain)
            node.word = index

        def forget(self) -> None:
            self._at.clear()

        def start(self, nothing: bool) -> Any:
            state = text.LMState()
            self._at[state] = self._root, self._begin
            return state

        def score(self, state: Any, label: int) -> tuple[Any, float]:
            gain, (node, context) = 0.0, self._at[state]
            if not spellings[label]:
                return state, _IMPOSSIBLE
            for letter in spellings[label]:
                if letter != " ":
                    following = node.after.get(letter)
                    if following is None:
                        return state, _IMPOSSIBLE
                    gain += following.best - node.best
                    node = following
                elif node is not self._root:
                    context, more = self._end(node, context)
                    gain, node = gain + more, self._root
            after = state.child(label)
            self._at[after] = node, context
            return after, gain

        def finish(self, state: Any) -> tuple[Any, float]:
            node, context = self._at[state]
            gain = 0.0
            if node is not self._root:
                context, gain = self._end(node, context)
            return state, gain + weight * model.finish(context)[1]

        def _end(self, node: _Node, context: Any) -> tuple[Any, float]:
            if node.word < 0:
                return context, _IMPOSSIBLE
            context, log10 = model.score(context, node.word)
            return context, weight * log10 - node.best + bonus

    return Words()


def _kenlm(kenlm: Any, path: str, entries: Any) -> Any:
    file = files.expand(path)
    try:
        with _quiet():
            if not file.name.endswith(".gz"):
                return kenlm.KenLM(str(file), entries)
            with tempfile.TemporaryDirectory() as folder:
                plain = pathlib.Path(folder) / "lm.arpa"
                plain.write_bytes(gzip.decompress(file.read_bytes()))
                return kenlm.KenLM(str(plain), entries)
    except (OSError, EOFError, RuntimeError) as error:
        raise LanguageModelError(f"{path} cannot be read by KenLM: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """KenLM draws a bar on standard error, past Python's."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _read_words(path: str) -> Sequence[str]:
    try:
        return files.expand(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise LanguageModelError(f"{path} cannot be read as a list of words: {error}") from error


def _is_spelled(tokenizer: Any, word: str) -> bool:
    """Whether there are labels that write the word, and not another one."""
    try:
        return tokenizer.decode(tokenizer.encode(word)) == word
    except ValueError:  # a character that the model lacks
        return False
