"""Tasks: what is predicted from an utterance, and how wrong a prediction is.

Adding one is a file and a line here. A task is plain functions of parameters and batches:

    init(rng, batch) -> (params, state)
    loss(params, state, batch, rng=None, step=0) -> (sum, weight, aux)
    predict(params, state, batch) -> arrays with a row an utterance
    unusable(sizes) -> {position: reason}, on the host, before anything is loaded
    figures(sums) -> {name: float}: what is logged of some updates, the loss first
    check(figures, step): raises a UserError where going on is of no use
    evaluator(parts) -> what scores a split (evaluators/)

`loss` trains (dropout, augmentation) where it is given a key, and evaluates without one. It is a
sum over the rows of the batch with its weight beside it, never a mean, so that a sum over devices
and micro-batches is the loss of the global batch. aux is {"state": the new model state,
"sums": {name: float32 scalar}}, which the loop adds up and hands to `figures`, together with the
loss, its weight and the number of steps. What `figures` calls `accuracy` is shown beside the loss.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from speech_jax import registry

TASKS = {
    "attend": "speech_jax.tasks.attend:Attend",
    "best_rq": "speech_jax.tasks.best_rq:BestRQ",
    "classify": "speech_jax.tasks.classify:Classify",
    "contrastive": "speech_jax.tasks.contrastive:Contrastive",
    "next_sample": "speech_jax.tasks.next_sample:NextSample",
    "next_sample_of_speakers": "speech_jax.tasks.next_sample:NextSampleOfSpeakers",
    "recognize": "speech_jax.tasks.recognize:Recognize",
    "translate": "speech_jax.tasks.translate:Translate",
    "transduce": "speech_jax.tasks.transduce:Transduce",
}

Pytree = Any
Batch = Mapping[str, jax.Array]


class Task(Protocol):
    """The contract above; see it for what each function takes and returns.

    A constructor's arguments are the settings of the section `task`, and by name, if it wants them:
    `encoder`, `frontend`, `counts`, how many symbols each part has that has symbols, and
    `examples`, how often each of them was there when a part was made, where it knows. One that
    wants the `decoder` gets one of the part that it names as `text` ('labels' if it names none).
    Its `searches` are all that config.decoder.name may be, where they are not those of CTC alone
    (decoding/decoder.py, OF_CTC), and usual_decoder(**settings) gives the settings of the decoder
    that hold where config.decoder says nothing. One whose own search has weights to be tuned does
    it in two halves: project(params, state, batch) -> (frames [B, T, D], lengths [B]), and
    search(params, frames, lengths, fusion) -> what predict gives.
    `augments` is False where nothing changes its inputs in training (config.spec_augment).
    `of_use`, if it has that, names the settings that may change when a trained model is used.
    """

    parts: ClassVar[Mapping[str, str]]  # name in a batch -> kind (data/parts/)
    along: ClassVar[str]  # the dimension that batch shapes are made by

    @property
    def best(self) -> tuple[str, str]: ...  # what of a split picks a model, and 'min' or 'max'

    @property
    def rules(self) -> tuple: ...  # the sharding of all parameters (training/sharding.py)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]: ...

    def loss(self, params: Pytree, state: Pytree, batch: Batch, rng=None, step=0): ...

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]: ...

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]: ...

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]: ...

    def check(self, figures: Mapping[str, float], step: int) -> None: ...

    def evaluator(self, parts: Mapping[str, Any]) -> Any: ...


def constructor(name: str) -> type[Task]:
    """The class of a task by its name in TASKS; an unknown name is a UserError."""
    module, _, attribute = registry.lookup("task", TASKS, name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def of_use(name: str) -> tuple[str, ...]:
    """The settings of a task that say how a trained model is used, not what it has learned."""
    return getattr(constructor(name), "of_use", ())


# What experiment.py makes for a task, which is no setting though it may have a default.
_GIVEN = ("encoder", "frontend", "counts", "decoder")


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """All settings of a task, `name` included: a configuration section."""
    fields = {
        field.name: field.default
        for field in dataclasses.fields(constructor(name))
        if field.default is not dataclasses.MISSING and field.name not in _GIVEN
    }
    for key in changes:
        registry.lookup(f"{name} setting", fields, key)
    return {"name": name, **fields, **changes}
