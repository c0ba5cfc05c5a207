"""Tasks: what is predicted from speech, and how wrong a prediction is.

A task is plain functions of parameters and batches:

    init(rng, batch) -> (params, state)
    loss(params, state, batch, rng=None, step=0) -> (sum, weight, aux)
    figures(sums) -> {name: float}, what is logged of some updates, the loss first
    check(figures, step), which raises a UserError where going on is of no use
    predict(params, state, batch) -> arrays, a row an utterance
    score(row, utterance, tokenizer) -> (counts, details), of one row of that, on the host

`loss` trains (dropout, augmentation) where it is given a key, and evaluates without one. It is a
sum over the rows of the batch with its weight beside it, never a mean, so that a sum over devices
and micro-batches is the loss of the global batch. aux is {"state": the new model state,
"sums": {name: float32 scalar}}, which the loop adds up and hands to `figures`, the loss, its weight
and the number of steps with them. What `figures` calls `accuracy` is shown beside the loss.

What `score` returns adds up to a split's score (metrics.py); a task of transcripts (`labelled`)
gets the tokenizer that its labels come from, the others None.

Wrappers (training/step.py: accumulation; training/adversarial.py) compose around its gradient.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax

from speech_jax import registry

TASKS = {
    "asr": "speech_jax.tasks.recognize:ASR",
    "best_rq": "speech_jax.tasks.best_rq:BestRQ",
    "contrastive": "speech_jax.tasks.contrastive:Contrastive",
}

Pytree = Any
Batch = dict[str, jax.Array]


class Task(Protocol):
    """The contract above; see it for what each function takes and returns."""

    labelled: ClassVar[bool]  # whether it learns from transcripts
    metric: ClassVar[str]  # that of a split's score which picks the best checkpoint; less is better
    encoder: nn.Module
    frontend: Any

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]: ...

    def loss(self, params, state, batch: Batch, rng=None, step=0): ...

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]: ...

    def check(self, figures: Mapping[str, float], step: int) -> None: ...

    def predict(self, params, state, batch: Batch) -> dict[str, jax.Array]: ...

    def score(self, row: Mapping[str, Any], utterance, tokenizer) -> tuple[Any, dict]: ...


def constructor(name: str):
    """The class of a task by its name in TASKS; an unknown name is a UserError."""
    module, _, attribute = registry.lookup("task", TASKS, name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def settings(name: str, **changes) -> dict[str, Any]:
    """All settings of a task, `name` included: a configuration section."""
    fields = {
        field.name: field.default
        for field in dataclasses.fields(constructor(name))
        if field.default is not dataclasses.MISSING
    }
    for key in changes:
        registry.lookup(f"{name} setting", fields, key)
    return {"name": name, **fields, **changes}
