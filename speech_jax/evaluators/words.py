"""Words of a reference beside those of a hypothesis, and what a report says of them."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from speech_jax.decoding import confidence
from speech_jax.evaluators import page
from speech_jax.evaluators.page import Html, Section, element

# A word and what was said for it; None where there is none.
Pair = tuple[str | None, str | None]
# Rows of a table of confusions.
_MOST = 30


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Pair]:
    """A minimal alignment of two lists of words, in their order."""
    if reference == hypothesis:  # most are
        return list(zip(reference, hypothesis, strict=True))
    pairs: list[Pair] = []
    for _, i, i_end, j, j_end in Levenshtein.opcodes(reference, hypothesis).as_list():
        both = min(i_end - i, j_end - j)
        pairs += zip(reference[i : i + both], hypothesis[j : j + both], strict=True)
        pairs += ((word, None) for word in reference[i + both : i_end])
        pairs += ((None, word) for word in hypothesis[j + both : j_end])
    return pairs


def of_line(line: Mapping[str, Any]) -> list[Pair]:
    """The words of a line; its characters where words are not set apart by spaces."""
    texts = str(line["reference"]), str(line["hypothesis"])
    lists = [text.split() for text in texts]
    if max(map(len, texts)) > 20 * max(map(len, lists)):
        lists = [list("".join(of)) for of in lists]
    return align(*lists)


def drawn(pairs: Iterable[Pair]) -> Html:
    """Words above each other, with a sign between those that differ, from where the text begins.

    There is no `bdi` in it: the direction of an element with dir=auto does not depend on those.
    """
    cells = []
    for reference, hypothesis in pairs:
        kind, sign = "same", ""
        if reference is None:
            kind, sign = "inserted", "+"
        elif hypothesis is None:
            kind, sign = "deleted", "−"
        elif reference != hypothesis:
            kind, sign = "substituted", "×"
        cells.append(
            element(
                "span",
                element("span", reference or " "),
                element("i", sign, title=kind if sign else None),
                element("span", hypothesis or " "),
                class_=f"pair {kind}",
            )
        )
    return element("div", *cells, class_="aligned", dir="auto")


LEGEND = element(
    "p",
    "The reference stands above, the hypothesis below: ",
    element("span", "×", class_="sign"),
    " another word was heard, ",
    element("span", "−", class_="sign"),
    " a word was missed, ",
    element("span", "+", class_="sign"),
    " a word was heard that was not said.",
    class_="note",
)


def sections(lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Which words are taken for which, and whether the confidence can be relied on.

    `lines` are of predictions.jsonl, with "reference" and "hypothesis"; the words of a hypothesis
    may be there with their confidence, as "words": [[text, start, end, confidence], ...].
    """
    pairs = collections.Counter[Pair]()
    for line in lines:
        pairs.update(align(line["reference"].split(), line["hypothesis"].split()))
    found = [Section("Words that are confused", _confusions(pairs))]
    known = [pair for line in lines for pair in confidences(line)]
    if known:
        found.append(Section("Reliability of the confidence", _reliability(known)))
    return found


def _confusions(pairs: Mapping[Pair, int]) -> Html:
    words, said = collections.Counter[str](), collections.Counter[str]()
    for (word, hypothesis), count in pairs.items():
        if word is not None:
            words[word] += count
        if hypothesis is not None:
            said[hypothesis] += count
    wrong = [(pair, n) for pair, n in pairs.items() if pair[0] != pair[1]]
    wrong.sort(key=lambda one: (-one[1], one[0][0] or "", one[0][1] or ""))
    substituted = [(*pair, n) for pair, n in wrong if None not in pair]
    deleted = [(pair[0], n) for pair, n in wrong if pair[1] is None]
    inserted = [(pair[1], n) for pair, n in wrong if pair[0] is None]
    return page.side_by_side(
        _most(
            ["word", "heard as", "times", "of its uses"],
            [(a, b, n, page.percent(n / words[a], 1)) for a, b, n in substituted],
            "substitutions",
        ),
        _most(
            ["word that was missed", "times", "of its uses"],
            [(a, n, page.percent(n / words[a], 1)) for a, n in deleted],
            "deletions",
        ),
        _most(
            ["word that was not said", "times", "of its uses"],
            [(a, n, page.percent(n / said[a], 1)) for a, n in inserted],
            "insertions",
        ),
    )


def _most(heads: Sequence[str], rows: Sequence[Sequence[object]], what: str) -> Html:
    note = f"There are no {what}." if not rows else ""
    if len(rows) > _MOST:
        note = f"The {_MOST} most frequent of {len(rows):,} {what}."
    return page.table(heads, rows[:_MOST], note)


def confidences(line: Mapping[str, Any]) -> Iterable[tuple[float, bool]]:
    """(confidence, whether it is right) of each word of a hypothesis, as far as there are any."""
    words = [word for word in line.get("words") or [] if word[3] is not None]
    right = confidence.right_words(line["reference"], [word[0] for word in words])
    return zip((float(word[3]) for word in words), right, strict=True)


def _reliability(known: Sequence[tuple[float, bool]]) -> Html:
    sure, right = (np.asarray(column) for column in zip(*known, strict=True))
    bins, gap = confidence.reliability(sure.clip(0, 1), right)
    points = [(one.confidence, one.right) for one in bins]
    rows = [
        (
            f"{one.low:.1f} to {one.high:.1f}",
            one.words,
            page.percent(one.confidence, 1),
            page.percent(one.right, 1),
        )
        for one in bins
    ]
    curve = page.plot(
        "Words that are right, by their confidence",
        points,
        across=(0.0, 1.0),
        up=(0.0, 1.0),
        labels=("mean confidence", "share that is right"),
        marked=True,
        diagonal=True,
    )
    figures = page.definitions(
        {
            "words": len(known),
            "mean confidence": page.percent(float(sure.mean())),
            "words that are right": page.percent(float(right.mean())),
            "calibration error (ECE)": page.percent(gap),
            "area under the ROC curve of wrong words": confidence.area_under_roc(sure, right),
        }
    )
    table = page.table(["confidence", "words", "mean confidence", "right"], rows)
    return page.side_by_side(curve, page.join([figures, table]))
