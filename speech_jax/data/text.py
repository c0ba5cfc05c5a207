"""Transcripts to label ids and back: named normalizers, characters and sentencepiece.

A tokenizer normalizes what it encodes, so that its name travels with the vocabulary. Id 0 is the
CTC blank: no text encodes to it, and decoding drops it.
"""

import base64
import dataclasses
import html
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol

import sentencepiece

from speech_jax import files
from speech_jax.errors import UserError

BLANK = 0


class TextError(UserError):
    """A vocabulary that cannot be made, saved or loaded; the message says how to mend it."""


class UnknownCharacterError(UserError):
    """A text with a character that the vocabulary has not."""

    def __init__(self, character: str, alphabet: str):
        name = unicodedata.name(character, "unnamed")
        super().__init__(
            f"character {character!r} (U+{ord(character):04X}, {name}) is not in the alphabet "
            f"{alphabet!r}: add it there, correct the transcript or choose another normalizer"
        )


# ---- Normalizers -------------------------------------------------------------------------------

_APOSTROPHES = str.maketrans("\u2019\u2018\u02bc\u0060\u00b4", "'''''")


# Joiners choose a letter's form in Persian and a conjunct's in the scripts of India.
_JOINERS = "\u200c\u200d"


def _english(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).upper()
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^\w']|_", " ", text)


def _words(text: str) -> str:
    text = text.translate(_APOSTROPHES).lower()  # upper case has fewer letters: ı, ß and ς lose
    return "".join(c if _is_of_a_word(c) else " " for c in text)


def _moses(text: str) -> str:
    return _words(html.unescape(text))


def _is_of_a_word(character: str) -> bool:
    """Whether it is a letter, a mark (a vowel or tone of many scripts), a number or apostrophe."""
    return unicodedata.category(character)[0] in "LMN" or character in f"'{_JOINERS}"


# 'librispeech' is what 'english' was called; tokenizers of then have it in their files.
NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "upper": str.upper,
    "lower": str.lower,
    "words": _words,
    "english": _english,
    "librispeech": _english,
    "moses": _moses,
}


def normalize(text: str, name: str) -> str:
    """Returns `text` as the normalizer `name` writes it, in Unicode NFC with single spaces.

    'none' changes nothing more; 'upper' and 'lower' change case. 'words' keeps every letter, mark
    and number of every script, in lower case where the script has one, makes typographic
    apostrophes plain, and writes a space for all else (hyphens too). 'moses' does that to texts of
    the Moses tokenizer, which writes an apostrophe as &apos; (parallel corpora do). 'english' (also
    called 'librispeech') writes as LibriSpeech does: upper case, accents dropped too. Digits stay
    digits: no normalizer spells numbers.

    Raises TextError for an unknown name.
    """
    if name not in NORMALIZERS:
        raise TextError(f"unknown normalizer {name!r}; known: {', '.join(NORMALIZERS)}")
    text = NORMALIZERS[name](unicodedata.normalize("NFC", text))
    return " ".join(unicodedata.normalize("NFC", text).split())


def dropped(texts: Iterable[str], normalizer: str) -> Counter[str]:
    """Counts the letters, marks and numbers that a normalizer loses, by character.

    What only changes its case or its form is not lost, nor is punctuation; that a normalizer leaves
    out vowels, tones and accents, or whole scripts, shows here.
    """
    # All at once: Python counts characters fast, and only the distinct ones are looked at.
    together = "\n".join(texts)
    if normalizer == "moses":
        together = html.unescape(together)  # the name of a character is not its text
    return _parts(together) - _parts(normalize(together, normalizer))


def _parts(text: str) -> Counter[str]:
    """Counts the letters, marks and numbers of a text, apart from each other, in lower case."""
    parts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        for part in unicodedata.normalize("NFKD", character.upper().casefold()):
            if unicodedata.category(part)[0] in "LMN":
                parts[part] += count
    return parts


# ---- Tokenizers --------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What every tokenizer is."""

    normalizer: str

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the blank included."""
        ...

    @property
    def spellings(self) -> tuple[str, ...]:
        """What each id writes, with a space where a word begins; nothing for the blank."""
        ...

    def normalize(self, text: str) -> str:
        """Returns `text` as the tokenizer's normalizer writes it."""
        ...

    def encode(self, text: str) -> list[int]:
        """Normalizes `text` and returns its ids, never 0. Raises UnknownCharacterError."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; blanks are dropped, repeats are not merged."""
        ...

    def save(self, path: str | os.PathLike) -> None:
        """Writes one file that `load_tokenizer` reads; it appears whole or not at all."""
        ...


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer:
    """One id for each character of `alphabet`, from 1 on in its order; the space is one of them."""

    alphabet: str
    normalizer: str = "none"
    kind: ClassVar[str] = "characters"

    def __post_init__(self):
        repeated = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if not self.alphabet or repeated:
            raise TextError(
                f"alphabet {self.alphabet!r} "
                + (f"repeats {''.join(repeated)!r}" if repeated else "is empty")
                + "; it must name each character once"
            )
        object.__setattr__(self, "_ids", {c: i for i, c in enumerate(self.alphabet, BLANK + 1)})

    @property
    def vocabulary_size(self) -> int:
        return len(self.alphabet) + 1

    @property
    def spellings(self) -> tuple[str, ...]:
        return ("", *self.alphabet)

    def normalize(self, text: str) -> str:
        return normalize(text, self.normalizer)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in self.normalize(text)]
        except KeyError as error:
            raise UnknownCharacterError(error.args[0], self.alphabet) from None

    def decode(self, ids: Iterable[int]) -> str:
        text = "".join(self.alphabet[i - 1] for i in map(int, ids) if i != BLANK)
        return " ".join(text.split())

    def save(self, path: str | os.PathLike) -> None:
        _save(path, self.kind, normalizer=self.normalizer, alphabet=self.alphabet)


class SentencePieceTokenizer:
    """Pieces of words, from a serialized sentencepiece model whose unknown piece has id 0.

    Kudo and Richardson, "SentencePiece: a simple and language independent subword tokenizer and
    detokenizer for neural text processing" (2018).
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes, normalizer: str = "none"):
        self.model = model
        self.normalizer = normalizer
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocabulary_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def spellings(self) -> tuple[str, ...]:
        pieces = map(self._processor.id_to_piece, range(1, self.vocabulary_size))
        return ("", *(piece.replace(_SPACE, " ") for piece in pieces))

    def normalize(self, text: str) -> str:
        return normalize(text, self.normalizer)

    def encode(self, text: str) -> list[int]:
        text = self.normalize(text)
        ids = self._processor.encode(text)
        if BLANK in ids:  # the unknown piece: no text may become a blank
            alphabet = "".join(sorted(set("".join(self.spellings))))
            raise UnknownCharacterError(next(c for c in text if c not in alphabet), alphabet)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = self._processor.decode([i for i in map(int, ids) if i != BLANK])
        return " ".join(text.split())

    def save(self, path: str | os.PathLike) -> None:
        model = base64.b64encode(self.model).decode()
        _save(path, self.kind, normalizer=self.normalizer, model=model)


_SPACE = "\u2581"  # how sentencepiece writes a space


def make_tokenizer(
    kind: str,
    texts: Iterable[str],
    *,
    normalizer: str = "none",
    alphabet: str | None = None,
    vocabulary_size: int | None = None,
    algorithm: str = "unigram",
) -> Tokenizer:
    """Makes the tokenizer of training transcripts: the same texts give the same one.

    Args:
      kind: 'characters' or 'sentencepiece'.
      texts: the training transcripts.
      normalizer: see `normalize`.
      alphabet: the characters, for 'characters'; None for those of `texts`, sorted.
      vocabulary_size: number of ids with the blank, for 'sentencepiece'.
      algorithm: 'unigram' or 'bpe', for 'sentencepiece'.

    Raises TextError when the texts cannot give such a vocabulary.
    """
    if kind == CharacterTokenizer.kind:
        if alphabet is None:
            alphabet = "".join(sorted(set().union(*(normalize(t, normalizer) for t in texts))))
            if not alphabet:
                raise TextError("the transcripts hold no characters; state the alphabet")
        return CharacterTokenizer(alphabet, normalizer)
    if kind == SentencePieceTokenizer.kind:
        if not vocabulary_size:
            raise TextError(
                "a sentencepiece tokenizer needs vocabulary_size, 128 to 1024 as a rule"
            )
        normalized = [normalize(text, normalizer) for text in texts]
        model = _train_sentencepiece(normalized, vocabulary_size, algorithm)
        return SentencePieceTokenizer(model, normalizer)
    raise TextError(f"unknown tokenizer {kind!r}; known: characters, sentencepiece")


def _train_sentencepiece(texts: Sequence[str], vocabulary_size: int, algorithm: str) -> bytes:
    if algorithm not in ("unigram", "bpe"):
        raise TextError(f"unknown algorithm {algorithm!r}; known: unigram, bpe")
    if not any(texts):
        raise TextError("the transcripts hold no text to train a sentencepiece model on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocabulary_size,
            model_type=algorithm,
            character_coverage=1.0,
            max_sentence_length=max(10, max(len(text.encode()) for text in texts) + 1),
            normalization_rule_name="identity",  # normalized already
            num_threads=4,  # fixed, for sums of floats depend on how they are split
            unk_id=BLANK,  # what no text encodes to; there are no other special pieces
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=4,
        )
    except RuntimeError as error:
        message = str(error)
        if most := re.search(r"too high .*<= (\d+)", message):
            problem = f"too large for these transcripts: set it to {most[1]} or less, or add text"
        elif least := re.search(r"required_chars\. \d+ vs (\d+)", message):
            problem = (
                f"too small for the characters of these transcripts: set it to {least[1]} or more"
            )
        else:
            raise TextError(f"sentencepiece cannot be trained: {message}") from error
        raise TextError(f"vocabulary_size {vocabulary_size} is {problem}") from error
    return model.getvalue()


# ---- Files -------------------------------------------------------------------------------------


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises TextError for a file that is absent or damaged."""
    try:
        fields = files.read_sealed(files.expand(path))
        kind = fields.pop("kind")
        if not all(isinstance(value, str) for value in fields.values()):
            raise TypeError("its values must be strings")
        if kind == CharacterTokenizer.kind:
            tokenizer = CharacterTokenizer(**fields)
        elif kind == SentencePieceTokenizer.kind:
            model = base64.b64decode(fields.pop("model"), validate=True)
            tokenizer = SentencePieceTokenizer(model, **fields)
        else:
            raise TextError(f"it is of unknown kind {kind!r}, of a newer version")
        tokenizer.encode("")  # a normalizer that is not known shows here
        return tokenizer
    except FileNotFoundError as error:
        raise TextError(f"tokenizer {path} cannot be read ({error.strerror})") from error
    except TextError as error:
        raise TextError(f"tokenizer {path} cannot be used: {error}") from error
    except UserError as error:  # it names the file
        raise TextError(f"tokenizer {error}") from error
    except Exception as error:  # of sentencepiece, whatever a model's bytes make it throw
        raise TextError(f"tokenizer {path} is damaged ({error}); make it again") from error


def _save(path: str | os.PathLike, kind: str, **fields: str) -> None:
    files.write_sealed(files.expand(path), {"kind": kind} | fields)
