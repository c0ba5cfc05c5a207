"""Which layers of an encoder a head listens to, where it learns a sum of them."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from speech_jax.evaluators import figures


def found(params: Mapping[str, Any], path: pathlib.Path) -> dict[str, list[float]]:
    """{"layer_weights": shares} of the parameters of a task, drawn to `path`; {} without any."""
    if "layer_weights" not in params:
        return {}
    found = shares(params["layer_weights"])
    if jax.process_index() == 0:
        draw(found, path)
    return {"layer_weights": found}


def shares(weights: jax.Array) -> list[float]:
    """The share of each layer in the sum, the input of the first one first."""
    return np.asarray(jax.nn.softmax(weights)).tolist()


def names(shares: Sequence[float]) -> list[str]:
    """What the layers are called, the input of the first one first."""
    return ["input", *map(str, range(1, len(shares)))]


def draw(shares: Sequence[float], path: pathlib.Path) -> None:
    """Draws them as bars."""
    from matplotlib.figure import Figure  # takes half a second, and most runs need none

    figure = Figure(figsize=(3 + 0.3 * len(shares), 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(names(shares), shares)
    axes.axhline(1 / len(shares), color="gray", linewidth=1, linestyle=":")
    axes.set(xlabel="layer", ylabel="share")
    figures.save(figure, path)
