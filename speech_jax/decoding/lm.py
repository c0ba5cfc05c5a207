"""Builds n-gram language models from text.

    python -m speech_jax.decoding.lm build text.txt lm.arpa --order 3
    python -m speech_jax.decoding.lm build text.txt.gz lm.arpa.gz --order 6 --model runs/digits

Smoothing is modified Kneser-Ney, interpolated (Chen and Goodman, "An empirical study of smoothing
techniques for language modeling", 1999), with the counts, discounts and vocabulary of KenLM's lmplz
(Heafield et al., "Scalable modified Kneser-Ney language model estimation", 2013).
"""

import argparse
import gzip
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from speech_jax import files
from speech_jax.data import text as texts
from speech_jax.decoding.ngram import (
    BEGIN,
    END,
    LOWEST,
    SPACE,
    UNKNOWN,
    LanguageModelError,
    Level,
    NGrams,
)
from speech_jax.errors import UserError

_SPECIAL = (UNKNOWN, BEGIN, END)
# Discounts where the counts are too few to say them: those of lmplz --discount_fallback.
_FALLBACK = (0.0, 0.5, 1.0, 1.5)


def build(sentences: Iterable[Sequence[str]], order: int) -> NGrams:
    """The model of n-grams up to `order`, of sentences as units (texts without white space).

    Raises:
      LanguageModelError: there is no unit at all.
    """
    ids = {unit: number for number, unit in enumerate(_SPECIAL)}
    spoken: list[int] = []
    for sentence in sentences:
        spoken.append(ids[BEGIN])
        spoken.extend([ids.setdefault(unit, len(ids)) for unit in sentence])
        spoken.append(ids[END])
    if len(ids) == len(_SPECIAL):
        raise LanguageModelError("the text is empty: a language model is made of sentences")
    grams = _grams(np.asarray(spoken, np.int64), len(ids), order)
    levels: list[Level] = []
    # Below the first level every unit but the beginning is as probable as any other.
    lower = np.full(1, 1 / (len(ids) - 1))
    for n, gram in enumerate(grams, 1):
        count = gram.count if n == order else _different(gram, grams[n])
        if n == 1:
            count[ids[BEGIN]] = 0
        size = len(lower)
        discount = _discounts(count)[np.minimum(count, 3)]
        total = np.maximum(np.bincount(gram.before, count, size), 1)
        backoff = np.bincount(gram.before, discount, size) / total
        own = (count - discount) / total[gram.before]
        lower = own + backoff[gram.before] * lower[gram.end]
        if levels:
            goes_on = np.bincount(gram.before, minlength=size) > 0
            levels[-1].backoff[:] = np.where(goes_on, _log10(backoff), 0)
        log10 = _log10(lower)
        levels.append(
            Level(gram.before, gram.unit.astype(np.int32), log10, np.zeros(len(log10), np.float32))
        )
    levels[0].log10[ids[BEGIN]] = LOWEST
    return NGrams(list(ids), levels)


class _Grams(NamedTuple):
    # The n-grams of a level, sorted; each int64 [N].
    before: np.ndarray  # which one of the level below its units but the last are
    end: np.ndarray  # and its units but the first
    unit: np.ndarray  # the last one
    count: np.ndarray  # how often it is said
    begins: np.ndarray  # bool, whether it begins a sentence


def _grams(spoken: np.ndarray, vocabulary: int, order: int) -> list[_Grams]:
    """All n-grams of sentences that follow each other, which each begin with BEGIN, by level."""
    begin = _SPECIAL.index(BEGIN)
    starts = np.flatnonzero(spoken == begin)
    place = np.arange(len(spoken)) - np.repeat(starts, np.diff([*starts, len(spoken)]))
    units = np.arange(vocabulary)
    none = np.zeros(vocabulary, np.int64)
    found = [_Grams(none, none, units, np.bincount(spoken, minlength=vocabulary), units == begin)]
    node = spoken  # of the n-gram that ends at each place
    for n in range(2, order + 1):
        where = np.flatnonzero(place >= n - 1)
        key = node[where - 1] * vocabulary + spoken[where]
        distinct, first, inverse, count = np.unique(
            key, return_index=True, return_inverse=True, return_counts=True
        )
        at = where[first]
        before, unit = np.divmod(distinct, vocabulary)
        found.append(_Grams(before, node[at], unit, count, place[at] == n - 1))
        node = np.full(len(spoken), -1)
        node[where] = inverse
    return found


def _different(gram: _Grams, longer: _Grams) -> np.ndarray:
    """How many units come before each n-gram; for those that begin a sentence, how often."""
    return np.where(gram.begins, gram.count, np.bincount(longer.end, minlength=len(gram.unit)))


def _discounts(count: np.ndarray) -> np.ndarray:
    """What is taken from counts of 0, 1, 2 and more (Chen and Goodman, equation 26)."""
    t = np.bincount(np.minimum(count, 5), minlength=6)[:5].astype(float)
    if t[1:4].all():
        y = t[1] / (t[1] + 2 * t[2])
        found = np.asarray([0, *(k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3))])
        if (found >= 0).all() and (found <= np.arange(4)).all():
            return found
    return np.asarray(_FALLBACK)


def _log10(probability: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(probability, 10**LOWEST)).astype(np.float32)


# ---- The command -------------------------------------------------------------------------------


def _lines(paths: Iterable[str]) -> Iterator[str]:
    """The lines of text files, plain or compressed; '-' is the standard input."""
    for path in paths:
        if path == "-":
            yield from sys.stdin
            continue
        try:
            with (gzip.open if path.endswith(".gz") else open)(
                files.expand(path), "rt", encoding="utf-8"
            ) as file:
                yield from file
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise LanguageModelError(f"{path} cannot be read as text: {error}") from error


def _writer(arguments: argparse.Namespace) -> Callable[[str], list[str]]:
    """From a line to its units; UnknownCharacterError for a line that has no such units."""
    if not arguments.model:
        return lambda line: texts.normalize(line, arguments.normalizer).split()
    tokenizer = texts.load_tokenizer(files.expand(arguments.model) / "tokenizer.json")
    if arguments.unit == "words":
        return lambda line: tokenizer.normalize(line).split()
    units = [spelling.replace(" ", SPACE) for spelling in tokenizer.spellings]
    return lambda line: [units[label] for label in tokenizer.encode(line)]


def _build(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    write, left_out, total = _writer(arguments), [], 0

    def sentences() -> Iterator[list[str]]:
        nonlocal total
        for line in _lines(arguments.text):
            try:
                units = write(line)
            except texts.UnknownCharacterError as error:
                left_out.append(str(error))
                continue
            if units:
                total += len(units)
                yield units

    made = build(sentences(), arguments.order)
    made.write(files.expand(arguments.out))
    sizes = ", ".join(f"{len(level)} {n}-grams" for n, level in enumerate(made.levels, 1))
    print(
        f"{arguments.out}: {sizes} of {total} {arguments.unit or 'units'} in "
        f"{time.monotonic() - started:.1f} s"
    )
    if left_out:
        print(f"{len(left_out)} lines are left out, the first because {left_out[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.decoding.lm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command = parser.add_subparsers(required=True, metavar="build").add_parser(
        "build",
        help="make one from text",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Makes an n-gram language model of sentences, one a line, in the ARPA format.",
        epilog="""\
which model for which decoder:
  config.decoder.name=beam     n-grams of the labels of your model: give it as --model. For
                               characters order 5 to 8 is usual, for pieces of words 3 to 4.
      python -m speech_jax.decoding.lm build text.txt lm.arpa --order 6 --model runs/my
      python -m speech_jax.main --mode=evaluate --config=... --workdir=runs/my \\
          --config.decoder.name=beam --config.decoder.lm=lm.arpa
  config.decoder.name=lexicon  n-grams of words, written as the model's vocabulary writes them;
                               order 3 or 4 is usual.
      python -m speech_jax.decoding.lm build text.txt words.arpa --order 3 --model runs/my \\
          --unit words

what text: the more like what will be said the better; never the transcripts of the split that is
measured. The transcripts of LibriSpeech's folders as text:
      cat train-clean-100/*/*/*.trans.txt | cut -d' ' -f2- > text.txt
""",
    )
    command.add_argument("text", nargs="+", help="text files, plain or .gz; - is standard input")
    command.add_argument("out", help="the file to write, .arpa or .arpa.gz")
    command.add_argument("--order", type=int, default=3, help="units of the longest n-grams (3)")
    command.add_argument("--model", default="", help="a workdir or saved model: write as it writes")
    command.add_argument(
        "--unit",
        choices=("words", "labels"),
        help="what n-grams are made of; labels of --model if there is one, else words",
    )
    command.add_argument(
        "--normalizer",
        default="none",
        choices=tuple(texts.NORMALIZERS),
        help="how words are written without --model: english is upper case without punctuation",
    )
    command.set_defaults(run=_build)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 and one line on the standard error where it cannot."""
    arguments = _parser().parse_args(argv)
    try:
        if not 1 <= arguments.order <= 12:
            raise LanguageModelError(f"--order={arguments.order} must be 1 to 12")
        if arguments.unit == "labels" and not arguments.model:
            raise LanguageModelError("--unit=labels needs a --model, whose labels they are")
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
