"""How often the class of an utterance is found, for each class, and which is taken for which."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from speech_jax.data.parts.category import Category
from speech_jax.data.sources import Utterance
from speech_jax.evaluators import Row, figures
from speech_jax.evaluators.page import Section, matrix, percent, table

# Classes of the largest confusion matrix that is drawn.
_DRAWN = 100

_OF_CLASSES = ("recall", "precision", "f1")


class Accuracy:
    """Counts which class is taken for which.

    An utterance of a class that is unknown to the model counts for nothing but `unknown`.
    """

    rates: ClassVar = ("accuracy", "balanced_accuracy", "macro_f1")

    def __init__(self, target: Category):
        self._target, self._unknown = target, 0
        self.confusion = np.zeros((target.count, target.count), np.int64)  # [truth, prediction]

    def add(self, utterance: Utterance, example: Row, prediction: Row) -> dict[str, Any]:
        """Counts one utterance; its line has its class, the predicted one and the probabilities."""
        del utterance
        truth, found = int(example["target"]), int(prediction["target"])
        if truth >= 0:
            self.confusion[truth, found] += 1
        else:
            self._unknown += 1
        probabilities = np.asarray(prediction["probabilities"]).tolist()
        named = zip(self._target.classes, probabilities, strict=True)
        return {
            "reference": self._target.read(example),
            "prediction": self._target.read(prediction),
            "probabilities": {name: round(value, 4) for name, value in named},
        }

    def results(self) -> dict[str, Any]:
        """Rates, and for each class how often it was there, found, and taken for which other.

        Balanced accuracy is the mean recall of the classes that are there. F1 is averaged over the
        classes that are there or were predicted, and is 0 for one that was never found.
        """
        there, predicted = self.confusion.sum(1), self.confusion.sum(0)
        right, total = np.diag(self.confusion), self.confusion.sum()
        recall, precision = right / np.maximum(there, 1), right / np.maximum(predicted, 1)
        f1 = 2 * right / np.maximum(there + predicted, 1)
        mean = lambda values, of: float(values[of].mean()) if of.any() else None
        return {
            "accuracy": float(right.sum() / total) if total else None,
            "error_rate": float(1 - right.sum() / total) if total else None,
            "balanced_accuracy": mean(recall, there > 0),
            "macro_f1": mean(f1, there + predicted > 0),
            "unknown": self._unknown,
            "classes": {
                name: {
                    "examples": int(there[i]),
                    "recall": float(recall[i]) if there[i] else None,
                    "precision": float(precision[i]) if predicted[i] else None,
                    "f1": float(f1[i]),
                    "taken_for": {
                        self._target.classes[j]: int(self.confusion[i, j])
                        for j in np.flatnonzero(self.confusion[i])
                    },
                }
                for i, name in enumerate(self._target.classes)
                if there[i] or predicted[i]
            },
        }

    def tallies(self, line: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Errors and what they are of, in one utterance."""
        known = line["reference"] != ""
        return {"error_rate": (int(known and line["reference"] != line["prediction"]), int(known))}

    def sections(self, lines: Sequence[Mapping[str, Any]]) -> list[Section]:
        """The confusion matrix, and a table of the classes."""
        known = [line for line in lines if line["reference"]]
        evaluator = Accuracy(self._target)
        place = {name: index for index, name in enumerate(self._target.classes)}
        for line in known:
            evaluator.confusion[place[line["reference"]], place[line["prediction"]]] += 1
        classes = evaluator.results()["classes"]
        rows = [
            (name, found["examples"], *(percent(found[key]) for key in _OF_CLASSES))
            for name, found in classes.items()
        ]
        matrix_of = matrix(self._target.classes, evaluator.confusion)
        return [
            Section("Classes", table(("class", "utterances", *_OF_CLASSES), rows)),
            Section("Confusions", matrix_of),
        ]

    def draw(self, path: pathlib.Path) -> None:
        """Draws the confusion matrix, in shares of each class, with the recall of each.

        Of more classes than a picture can show there is none.
        """
        count = self._target.count
        if count > _DRAWN:
            return
        from matplotlib.figure import Figure  # takes half a second, and most runs need none

        size = 3 + 0.3 * count
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.subplots()
        shares = self.confusion / np.maximum(self.confusion.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for truth, found in zip(*np.nonzero(self.confusion), strict=True):
            color = "white" if shares[truth, found] > 0.5 else "black"
            number = str(self.confusion[truth, found])
            axes.text(found, truth, number, ha="center", va="center", color=color, fontsize=7)
        names = self._target.classes
        recalls = [f"{name} ({100 * shares[i, i]:.0f}%)" for i, name in enumerate(names)]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), recalls)
        axes.set(xlabel="prediction", ylabel="class (recall)", title=self.line())
        axes.title.set_fontsize(8)
        figures.save(figure, path)

    def line(self) -> str:
        """The rates in per cent, and how many classes they are of where some were not there."""
        found = self.results()
        if found["accuracy"] is None:
            return "no utterance of a known class"
        there, count = np.count_nonzero(self.confusion.sum(1)), self._target.count
        return (
            f"accuracy {100 * found['accuracy']:.2f}%  "
            f"balanced {100 * found['balanced_accuracy']:.2f}%  "
            f"macro F1 {100 * found['macro_f1']:.2f}%"
            + (f"  {there} of {count} classes" if there < count else "")
        )
