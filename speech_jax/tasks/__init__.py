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

Wrappers (accumulation here, adversarial training in tasks/adversarial.py) compose around
`gradients(task)`, a function (params, state, batch, rng, step) -> (gradient of the sum, Loss).
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from speech_jax import registry
from speech_jax.errors import UserError

TASKS = {
    "asr": "speech_jax.tasks.asr:ASR",
    "best_rq": "speech_jax.tasks.pretrain:BestRQ",
    "contrastive": "speech_jax.tasks.pretrain:Contrastive",
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


class Loss(NamedTuple):
    """A loss sum, what to divide it by, and what came with it."""

    sum: jax.Array
    weight: jax.Array
    aux: dict[str, Any]


def gradients(task: Task):
    """The gradient of a task's loss sum with respect to its parameters."""

    def function(params, state, batch, rng, step):
        def loss(params):
            total, weight, aux = task.loss(params, state, batch, rng, step)
            return total, (weight, aux)

        (total, (weight, aux)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, Loss(total, weight, aux)

    return function


def accumulate(function, count: int):
    """Runs a gradient function on `count` micro-batches in turn and adds up what they return.

    Micro-batch i holds rows i, i + count, ..., so that rows stay on their devices. Sums and
    weights add up, so apart from dropout the result is that of the whole batch.
    """
    if count == 1:
        return function

    def accumulated(params, state, batch, rng, step):
        def split(x):
            if x.shape[0] % count:
                raise UserError(f"{x.shape[0]} rows cannot be accumulated in {count} parts")
            return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

        def one(carry, part):
            state, total = carry
            index, rows = part
            gradient, loss = function(params, state, rows, jax.random.fold_in(rng, index), step)
            state = loss.aux.pop("state")
            return (state, jax.tree.map(jnp.add, total, (gradient, loss))), None

        parts = jnp.arange(count), jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda: function(params, state, first[1], rng, step))
        shapes[1].aux.pop("state")
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (state, (gradient, loss)), _ = jax.lax.scan(one, (state, zeros), parts)
        loss.aux["state"] = state
        return gradient, loss

    return accumulated
