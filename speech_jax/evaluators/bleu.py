"""BLEU and chrF2 of translations, by sacrebleu (Post 2018), and two runs beside each other.

  python -m speech_jax.evaluators.bleu runs/one/predictions/dev.jsonl \\
      runs/other/predictions/dev.jsonl

compares the predictions of two runs for one split by the paired bootstrap of Koehn (2004).
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from speech_jax import files
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.sources import Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import Row, page
from speech_jax.evaluators.errors import ErrorCounts, count_errors
from speech_jax.evaluators.page import Section

_DRAWS = 1_000


def _metrics() -> dict[str, BLEU | CHRF]:
    # Forced: without it sacrebleu asks in its log whether texts with final dots were tokenized.
    return {"bleu": BLEU(force=True), "chrf2": CHRF()}


class Bleu:
    """Compares translations with those of the corpus: as it writes them, once normalized.

    An utterance without a translation is counted and has no part in the measures.
    """

    rates: ClassVar = ("bleu", "chrf2")

    def __init__(self, target: Transcript, transcript: Transcript | None = None):
        """`transcript` reads what a prediction says of the words that were spoken, if it does."""
        self._target, self._transcript = target, transcript
        self._pairs: list[tuple[str, str]] = []  # reference, hypothesis
        self._words, self._spoken = ErrorCounts(), ErrorCounts()
        self._lacking = self._cut = 0

    def check(self, utterances: Sequence[Utterance]) -> None:
        """Raises UserError where no utterance has a translation."""
        if not any(self._target.text(utterance) for utterance in utterances):
            raise UserError(
                f"no utterance has a translation (the tag {self._target.tag!r}) to compare with: "
                "add it, name another tag as config.parts.target.tag, or another split"
            )

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Keeps one utterance; its line has both texts, and the transcript where there is one.

        It says `cut` of a translation that did not end by itself.
        """
        del example
        reference, hypothesis = self._target.text(utterance), self._target.read(prediction)
        line: dict[str, Any] = {"reference": reference, "hypothesis": hypothesis}
        if reference:
            self._pairs.append((reference, hypothesis))
            self._words += count_errors(reference, hypothesis)
        else:
            self._lacking += 1
        if not prediction["ended"]:
            self._cut += 1
            line["cut"] = True
        if self._transcript:
            said = self._transcript.text(utterance)
            line |= {"said": said, "transcript": self._transcript.read(prediction)}
            if said:
                self._spoken += count_errors(said, line["transcript"])
        return line

    def results(self) -> dict[str, Any]:
        """BLEU and chrF2 in 0 to 100, word errors of the translations, and what was counted.

        Also the errors of the transcripts, and the signatures of both measures.
        """
        measured = dict.fromkeys(self.rates) | {"signature": {}}
        if self._pairs:
            references, hypotheses = _columns(self._pairs)
            for name, metric in _metrics().items():
                measured[name] = metric.corpus_score(hypotheses, [references]).score
                measured["signature"][name] = str(metric.get_signature())
        measured["wer"] = self._words.wer
        if self._transcript:
            measured |= {"transcript_wer": self._spoken.wer, "transcript_cer": self._spoken.cer}
        counts = {"no_translation": self._lacking, "cut": self._cut}
        return {**measured, **counts, "translations": len(self._pairs)}

    def line(self) -> str:
        """Both measures, and what is to be known of them."""
        found = self.results()
        if found["bleu"] is None:
            return "no translation to compare with, so no BLEU"
        said = f"BLEU {found['bleu']:.2f}  chrF2 {found['chrf2']:.2f}"
        if found.get("transcript_cer") is not None:
            said += f"  transcript CER {100 * found['transcript_cer']:.2f}%"
        if self._lacking:
            said += f"  ({self._lacking} have no translation)"
        if self._cut:
            said += f"  ({self._cut} translations did not end, and were cut)"
        return said

    def tallies(self, line: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Word errors of a translation: BLEU is no share of anything, and has none."""
        if not line["reference"]:
            return {"wer": (0, 0)}
        counts = count_errors(line["reference"], line["hypothesis"])
        return {"wer": (counts.word_errors, counts.words)}

    def statistics(self, lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """What BLEU is made of, [n, 10]: lengths, and n-grams that are right and all of them."""
        pairs = [(one["reference"], one["hypothesis"] if one["reference"] else "") for one in lines]
        references, hypotheses = _columns(pairs)
        bleu = _metrics()["bleu"]
        return np.asarray(bleu._extract_corpus_statistics(hypotheses, [references]))

    def value(self, sums: np.ndarray) -> np.ndarray:
        """BLEU [draws] of sums of these [10, draws]."""
        bleu = _metrics()["bleu"]
        by_draw = sums.astype(int).T.tolist()
        scores = [bleu._compute_score_from_stats(one).score for one in by_draw]
        return np.where(sums[1] > 0, scores, np.nan)

    def sections(self, lines: Sequence[Mapping[str, Any]]) -> list[Section]:
        """Both measures with their intervals, by the bootstrap over utterances."""
        pairs = [(one["reference"], one["hypothesis"]) for one in lines if one["reference"]]
        if not pairs:
            return []
        references, hypotheses = _columns(pairs)
        rows = []
        for metric in _metrics().values():
            drawn = metric.corpus_score(hypotheses, [references], n_bootstrap=_DRAWS)
            interval = f"{drawn._mean - drawn._ci:.2f} to {drawn._mean + drawn._ci:.2f}"
            rows.append([drawn.name, drawn.score, interval, str(metric.get_signature())])
        body = page.table(["measure", "value", "95% interval", "signature of sacrebleu"], rows)
        return [Section("Translations", body)]


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    references, hypotheses = zip(*pairs, strict=True)
    return list(references), list(hypotheses)


# ---- Two runs ----------------------------------------------------------------------------------


def compare(before: pathlib.Path, after: pathlib.Path) -> dict[str, dict[str, Any]]:
    """How two files of predictions differ, by what is measured.

    Of the utterances that both have and that have a translation. `p` is the probability of such a
    difference between two of the same quality.

    Raises:
      UserError: a file that cannot be read or holds no translations, or no utterance is in both.
    """
    one, other = _lines(before), _lines(after)
    names = sorted(name for name in one.keys() & other.keys() if one[name]["reference"])
    if not names:
        raise UserError(
            f"{before} and {after} have no translated utterance in common: compare two predictions "
            "of one split"
        )
    references = [one[name]["reference"] for name in names]
    if differing := [name for name in names if other[name]["reference"] != one[name]["reference"]]:
        raise UserError(
            f"{before} and {after} have two references of {differing[0]}: evaluate both with one "
            "normalizer (config.parts.target.normalizer)"
        )
    systems = [
        (side, [lines[name]["hypothesis"] for name in names])
        for side, lines in (("before", one), ("after", other))
    ]
    test = PairedTest(systems, _metrics(), [references], test_type="bs", n_samples=_DRAWS)
    signatures, found = test()
    return {
        name: {
            "before": found[name][0].score,
            "after": found[name][1].score,
            # Of no difference at all sacrebleu says that it is sure.
            "p": float(found[name][1].p_value) if systems[0][1] != systems[1][1] else 1.0,
            "utterances": len(names),
            "signature": str(signatures[name]),
        }
        for name in signatures
    }


def _lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
        found = {line["id"]: {k: line[k] for k in ("reference", "hypothesis")} for line in lines}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): evaluate that run first"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no predictions of translations: evaluate that run again"
        ) from error
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.evaluators.bleu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", help="a file of predictions, .jsonl")
    parser.add_argument("after", help="the same of another run")
    chosen = parser.parse_args(arguments)
    try:
        found = compare(files.expand(chosen.before), files.expand(chosen.after))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, one in found.items():
        print(
            f"{name} {one['before']:.2f} before, {one['after']:.2f} after, "
            f"difference {one['after'] - one['before']:+.2f} (p = {one['p']:.4f})  "
            f"{one['utterances']} utterances, {one['signature']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
