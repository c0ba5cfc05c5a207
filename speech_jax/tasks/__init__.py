"""Tasks: what is predicted from speech, and how wrong a prediction is.

A task is plain functions of parameters and batches:

    init(rng, batch) -> (params, state)
    loss(params, state, batch, rng=None, step=0) -> (sum, weight, aux)
    predict(params, state, batch) -> arrays, a row an utterance

`loss` trains (dropout, augmentation) where it is given a key, and evaluates without one. It is a
sum over the rows of the batch with its weight beside it, never a mean, so that a sum over devices
and micro-batches is the loss of the global batch. aux is {"state": the new model state,
"sums": {name: float32 scalar}}, the sums being what the loop logs.

Wrappers (accumulation here, adversarial training in tasks/adversarial.py) compose around
`gradients(task)`, a function (params, state, batch, rng, step) -> (gradient of the sum, Loss).
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from speech_jax.errors import UserError

Pytree = Any
Batch = dict[str, jax.Array]


class Task(Protocol):
    """The contract above; see it for what each function takes and returns."""

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]: ...

    def loss(self, params, state, batch: Batch, rng=None, step=0): ...

    def predict(self, params, state, batch: Batch) -> dict[str, jax.Array]: ...


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
