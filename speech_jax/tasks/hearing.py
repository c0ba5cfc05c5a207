"""What tasks of a front end and a linen module on it share: the module applied to a batch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import ctc
from speech_jax.tasks import Batch, Pytree


def init(
    model: nn.Module, frontend: FrontEnd, rng: jax.Array, batch: Batch, *more: Any
) -> tuple[Pytree, Pytree]:
    """Parameters (float32) and model state (empty without batch norm); `more` is as of `heard`."""
    variables = model.init(rng, *frontend(batch), *more, True)
    params = variables.pop("params")
    return params, variables


def heard(
    model: nn.Module,
    frontend: FrontEnd,
    params: Pytree,
    state: Pytree,
    batch: Batch,
    rng: jax.Array | None,
    step: jax.Array | int,
    *more: Any,
    views: int = 1,
    method: str = "__call__",
) -> tuple[Any, Pytree]:
    """What a method of a model makes of the audio of a batch, and the new state.

    The method is called with inputs, lengths, `more` and whether it is deterministic: it trains
    where there is a key. `views` are as of FrontEnd.
    """
    keys = jax.random.split(rng) if rng is not None else (None, None)
    arguments = frontend(batch, keys[0], step, views)
    return applied(model, params, state, keys[1], *arguments, *more, method=method)


def applied(
    model: nn.Module,
    params: Pytree,
    state: Pytree,
    rng: jax.Array | None,
    *arguments: Any,
    method: str = "__call__",
) -> tuple[Any, Pytree]:
    """As `heard`, of the arguments that the front end would make; the key is for dropout."""
    return model.apply(
        {"params": params, **state},
        *arguments,
        rng is None,
        rngs=None if rng is None else {"dropout": rng},
        mutable=list(state),
        method=method,
    )


def ctc_part(
    logits: jax.Array, frames: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CTC's loss of the labels of a batch, how many they are, and the weight of what did not fit.

    A row that has no alignment has no part in the loss and in the labels.
    """
    labels, labels_length = batch["labels"], batch["labels_length"]
    feasible = ctc.ctc_feasible(frames, labels, labels_length)
    nats = ctc.ctc_loss(logits, frames, labels, labels_length, zero_infinity=True)
    weight = jnp.where(feasible, batch["weight"], 0.0)
    tokens = (weight * labels_length.astype(jnp.float32)).sum()
    return (nats * weight).sum(), tokens, (batch["weight"] - weight).sum()


def without_frames(frames: np.ndarray) -> dict[int, str]:
    """Why utterances cannot be used of which the encoder makes so many frames, by their index."""
    reason = "the encoder makes no frame of this audio"
    return {int(i): reason for i in np.flatnonzero(np.asarray(frames) < 1)}


def check_ctc(weight: float, what: str, cure: str = "train with more of it") -> None:
    """UserError where config.task.ctc_weight is 0, and `what` needs CTC."""
    if not weight:
        raise UserError(f"{what} needs CTC, which config.task.ctc_weight=0 leaves out: {cure}")
