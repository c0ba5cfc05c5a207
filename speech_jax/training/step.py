"""A training step: the gradient, its accumulation over micro-batches, and the update.

A gradient function is (params, state, batch, rng, step) -> (gradient of the loss sum, Loss).
Wrappers compose around it: `accumulate` here, adversarial training in training/adversarial.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from speech_jax.errors import UserError
from speech_jax.training import groups


class Loss(NamedTuple):
    """A loss sum, what to divide it by, and what came with it."""

    sum: jax.Array
    weight: jax.Array
    aux: dict[str, Any]


def gradients(task: Any) -> Callable:
    """The gradient of a task's loss sum with respect to its parameters."""

    def function(params, state, batch, rng, step):
        def loss(params):
            total, weight, aux = task.loss(params, state, batch, rng, step)
            return total, (weight, aux)

        (total, (weight, aux)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, Loss(total, weight, aux)

    return function


def accumulate(function: Callable, count: int) -> Callable:
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


# What every step adds to TrainState.sums; a task adds its own.
SUMS = ("loss", "weight", "grad_norm", "steps", "skipped", "samples", "padded_samples")


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `step` is also the position in the data.

    `sums` adds up what is logged and starts anew after each logged step; it is part of the state so
    that a resumed run logs what an uninterrupted one does. `ema` averages what is not frozen for
    ever.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    sums: dict[str, jax.Array]

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: averaged ones, where there are any."""
        return groups.join(self.ema, self.params) if self.ema else self.params


def measured(fields: Mapping[str, Any]) -> str:
    """The field whose lengths say how much data a batch holds: the audio, where there is any."""
    if "audio" in fields:
        return "audio"
    return next(name for name, field in fields.items() if field.has_length)


def average_decay(decay: float, step: jax.Array) -> jax.Array:
    """The decay of the averaged parameters at an update, warmed up.

    The average starts at the first weights, which are random: it follows the newest ones closely
    at first, so that it forgets them long before 1 / (1 - decay) updates are done.
    """
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_step(
    gradients: Callable,
    tx: optax.GradientTransformation,
    *,
    mask: Any = None,
    measured: str = "audio",
    ema_decay: float = 0.0,
    log_every: int = 1,
) -> Callable:
    """The update of a TrainState by a global batch: (state, batch) -> (state, sums, finite).

    `gradients` is what `gradients` or a wrapper of it returns; it is of the parameters that learn
    where `mask` (groups.trainable) says that others do not. `measured` is the field whose lengths
    are added up. An update that is not finite is skipped: everything but the step and the count of
    skipped updates stays as it was.
    """

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple:
        rng = jax.random.fold_in(state.rng, state.step)
        gradient, loss = gradients(state.params, state.model_state, batch, rng, state.step)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(loss.weight, 1.0), gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(norm)

        learned, still = groups.split(state.params, mask) if mask else (state.params, None)
        updates, opt_state = tx.update(gradient, state.opt_state, learned)
        learned = optax.apply_updates(learned, updates)
        params = groups.join(learned, still) if mask else learned
        ema = {}
        if ema_decay:
            share = 1 - average_decay(ema_decay, state.step)
            ema = optax.incremental_update(learned, state.ema, share)
        new = (params, loss.aux["state"], opt_state, ema)
        old = (state.params, state.model_state, state.opt_state, state.ema)
        params, model_state, opt_state, ema = jax.tree.map(
            lambda n, o: jnp.where(finite, n, o), new, old
        )

        now = {
            "loss": loss.sum,
            "weight": loss.weight,
            "grad_norm": norm,
            "steps": jnp.ones(()),
            "samples": batch[f"{measured}_length"].astype(jnp.float32).sum(),
            "padded_samples": jnp.asarray(math.prod(batch[measured].shape[:2]), jnp.float32),
            **loss.aux["sums"],
        }
        now = {name: jnp.where(finite, value, 0.0) for name, value in now.items()}
        now["skipped"] = 1.0 - finite.astype(jnp.float32)
        sums = jax.tree.map(jnp.add, state.sums, now)
        logged = (state.step + 1) % log_every == 0
        state = TrainState(
            step=state.step + 1,
            rng=state.rng,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=ema,
            sums=jax.tree.map(lambda x: jnp.where(logged, 0.0, x), sums),
        )
        return state, sums, finite

    return step
