"""Evaluators: what is measured of a split. Adding one is a file here; a task names its own.

An evaluator gets every utterance once, in any order, and may keep what it needs of them:

    add(utterance, example, prediction) -> what a line of predictions.jsonl says of it
    results() -> {name: value}, None for what has no value (an error rate without a word)
    line() -> the same for people, in a few words
    rates: the names of those results that are logged while training

Some methods are optional. Two are for report.html (report.py); both are given what `add` returned:

    tallies(line) -> {name of a result: (errors, of how many)}: over a split, the sums of both have
        that result as their quotient. The first one says which utterances are worst.
    sections(lines) -> [page.Section] of its own: a confusion matrix, a table of classes

two for what is no such quotient, to tell what a training has gained (compare.py):

    statistics(lines) -> [n, k] numbers, of whose sums the first of `rates` is a function
    value(sums [k, draws]) -> that function [draws], NaN where it has no value; more is better

one more for a picture beside the predictions of a split, draw(path), a PNG, and one that is asked
before the model is: check(utterances), all of a split, raises UserError where they lack what they
are measured by.

`example` holds the utterance's row of the batch, `prediction` its row of what `task.predict`
returned, both as numpy arrays by name. Padding and filler rows never reach an evaluator.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from speech_jax.data.sources import Utterance

Row = Mapping[str, np.ndarray]


class Evaluator(Protocol):
    """The contract above."""

    rates: tuple[str, ...]

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]: ...

    def results(self) -> dict[str, float | None]: ...

    def line(self) -> str: ...
