"""The tokenizer files of a CTC model in a Hugging Face folder, and the tokenizer that they mean.

Their Wav2Vec2CTCTokenizer spells a text character by character, with a symbol for the space and
symbols that stand for no text. `files` is what the JSON files of a folder hold, by name; it travels
with a bundle, so that they are written again as they were.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from speech_jax.bundle.schema import (
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    ModelFolderError,
    one_of,
    optional,
    short,
    table,
    whole,
)
from speech_jax.data import text

_TOKEN = Kind(
    "a text, null or an object with 'content'",
    lambda x: x is None or isinstance(x, str) or isinstance(content(x), str),
)
_ID = whole(0, (1 << 31) - 1)
_NAMED = ("pad_token", "unk_token", "bos_token", "eos_token")
_OURS = ("Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer")  # what spells character by character
SCHEMAS = {
    "vocab.json": {},  # every value an id; see `_ids`
    "added_tokens.json": {},
    "special_tokens_map.json": dict.fromkeys(_NAMED, _TOKEN),
    "tokenizer_config.json": {
        **dict.fromkeys(_NAMED, _TOKEN),
        "word_delimiter_token": _TOKEN,
        "do_lower_case": FLAG,
        "added_tokens_decoder": table(OBJECT),
        "tokenizer_class": optional(TEXT),
        "target_lang": one_of(None),
    },
}
Files = Mapping[str, dict[str, Any]]


def content(token: Any) -> Any:
    """The text of a token, which stands alone or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


# ---- From Hugging Face -------------------------------------------------------------------------


def symbols(files: Files, size: int, blank: int, where: object) -> list[str | None] | None:
    """The symbols by id of a head of `size` outputs, None for an id without one.

    None in all where there is no vocabulary.

    Raises:
      ModelFolderError: ids beyond the head, two symbols of one id or two ids of one symbol, a
        blank that the tokenizer takes for another symbol.
    """
    if "vocab.json" not in files:
        return None
    found: dict[int, str] = {}
    for name, ids in _ids(files, where):
        for symbol, index in ids:
            if index >= size and name != "vocab.json":
                continue  # a token of the tokenizer alone, which the model never says
            if index >= size:
                raise ModelFolderError(
                    f"{where}/{name}: {short(symbol)} has the id {index}, but the model's ids, of "
                    f"vocab_size={size}, end at {size - 1}"
                )
            if found.setdefault(index, symbol) != symbol:
                raise ModelFolderError(
                    f"{where}/{name}: id {index} is both {short(found[index])} and {short(symbol)}"
                )
    by_symbol = {symbol: index for index, symbol in found.items()}
    if len(by_symbol) < len(found):
        twice = next(s for i, s in found.items() if by_symbol[s] != i)
        raise ModelFolderError(f"{where}: the tokenizer has {short(twice)} under two ids")
    pad = _declared(files).get("pad_token")
    if by_symbol.get(pad, blank) != blank:
        raise ModelFolderError(
            f"{where}: the tokenizer's pad_token {short(pad)} has the id {by_symbol[pad]}, but "
            f"pad_token_id, the CTC blank, is {blank}: make them equal"
        )
    return [found.get(index) for index in range(size)]


def _ids(files: Files, where: object) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """(file, [(symbol, id), ...]) of all files that give ids."""
    for name in ("vocab.json", "added_tokens.json"):
        ids = list(files.get(name, {}).items())
        for symbol, index in ids:
            if not _ID.fits(index):
                raise ModelFolderError(
                    f"{where}/{name}: {short(symbol)} has the id {short(index)}, which is not "
                    f"{_ID.words}"
                )
        yield name, ids
    name, ids = "tokenizer_config.json", []
    for key, token in files.get(name, {}).get("added_tokens_decoder", {}).items():
        if not re.fullmatch("[0-9]{1,9}", key) or not isinstance(content(token), str):
            raise ModelFolderError(
                f"{where}/{name}: added_tokens_decoder has {short(key)}: {short(token)}, which is "
                "no id with a token"
            )
        ids.append((content(token), int(key)))
    yield name, ids


def _declared(files: Files) -> dict[str, str]:
    """The special tokens that the files name; tokenizer_config.json is what their class reads."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key in _NAMED:
            token = content(files.get(name, {}).get(key))
            named |= {key: token} if token is not None else {}
    return named


def tokenizer(files: Files, in_order: list[str | None] | None) -> text.CharacterTokenizer | None:
    """The tokenizer whose ids are those of symbols in order, the blank first.

    None where texts are not spelled by character: symbols of several, or another class of theirs.
    Symbols that stand for no text have ids of their own, which no text encodes to: they stand in
    the alphabet as characters of Unicode's private use areas.
    """
    config = files.get("tokenizer_config.json", {})
    if not in_order or len(in_order) < 2:
        return None
    if config.get("tokenizer_class") not in (None, *_OURS):
        return None
    delimiter = content(config.get("word_delimiter_token", "|"))  # None: they have no spaces
    special = {*_declared(files).values()} - {delimiter}
    if delimiter not in (None, " ") and delimiter in in_order:
        special.add(" ")  # their texts have the delimiter where there was a space
    alphabet = []
    for index, symbol in enumerate(in_order[1:]):
        if symbol is None or symbol in special:
            alphabet.append(_private(index, in_order))
        elif symbol == delimiter:
            alphabet.append(" ")
        elif _MARK.fullmatch(symbol):
            alphabet.append(_private(index, in_order))
        else:
            alphabet.append(symbol)
    if any(len(character) != 1 for character in alphabet):
        return None
    return text.CharacterTokenizer("".join(alphabet), _normalizer(alphabet))


_MARK = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")  # <s>, </s>, <unk>, [UNK]


def _private(index: int, taken: list[str | None]) -> str:
    """A character that no transcript holds: of the private area, or of the supplementary one."""
    character = chr(0xE000 + index if index < 6_400 else 0xF0000 + index)
    while character in taken:
        character = chr(ord(character) + len(taken))
    return character


def _normalizer(alphabet: list[str]) -> str:
    letters = "".join(character for character in alphabet if character.isalpha())
    if letters.isupper():
        return "librispeech" if letters.isascii() else "upper"
    return "lower" if letters.islower() else "none"


# ---- To Hugging Face ---------------------------------------------------------------------------


def made_files(made: text.CharacterTokenizer) -> dict[str, dict[str, Any]]:
    """The files of a tokenizer that no folder came with; the blank is <pad>, of id 0.

    There is no token for what is unknown: their class then fails, where with one beyond the head or
    with the blank it would train on it.
    """
    delimiter = " " if "|" in made.alphabet else "|"
    spelled = [delimiter if character == " " else character for character in made.alphabet]
    special = {"pad_token": "<pad>", "unk_token": None, "bos_token": None, "eos_token": None}
    return {
        "vocab.json": {symbol: index for index, symbol in enumerate(["<pad>", *spelled])},
        "tokenizer_config.json": special
        | {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "word_delimiter_token": delimiter,
            "do_lower_case": False,
        },
        "special_tokens_map.json": {"pad_token": "<pad>"},
    }
