"""Encoders by name. Adding one is a file and a line here; nothing is imported until asked for.

An encoder is a linen module called as `encoder(inputs, lengths, deterministic)` that returns
`(hidden [B, T', D], lengths' [B])`. Its output for an utterance depends neither on padding nor on
neighbours (tests/test_encoders.py has the contract, a row for each encoder). It has

    width            of the residual stream, D
    num_layers       L; with the argument `layers_too` hidden is [B, T', L + 1, D], the input of
                     the first layer and the output of each, the last one as it is without
    listens          'waveform' (inputs [B, T]) or 'log_mel' (inputs [B, F, M])
    output_lengths   how many frames come out for so many inputs
    rules            of sharding, one for each of its parameters (training/sharding.py)
    VARIANTS         settings of its published sizes, by name
    above            where it has parameters behind its layers: an expression of their paths in the
                     encoder, whole ones, for learning rates that fall from layer to layer

and, where it listens to the waveform and can be pretrained by masks, `geometry()`, the samples that
a frame sees and those from frame to frame, and an argument `mask` bool [B, T'] of frames to hide.
"""

import dataclasses
import importlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from speech_jax import registry

ENCODERS = {
    "conformer": "speech_jax.models.conformer:Conformer",
    "deepspeech": "speech_jax.models.deepspeech:DeepSpeech",
    "wav2vec2": "speech_jax.models.wav2vec2:Wav2Vec2",
    "wavenet": "speech_jax.models.wavenet:WaveNet",
    "wavenet_waveform": "speech_jax.models.waveform:WaveformWaveNet",
    "wav2vec2_conformer": "speech_jax.models.wav2vec2_conformer:Wav2Vec2Conformer",
}


def make_encoder(name: str, **kwargs: Any) -> nn.Module:
    """The encoder `name` with its constructor's keyword arguments.

    Raises:
      ValueError: for an unknown name or argument, naming the nearest known one.
    """
    return registry.call(_constructor(name), kwargs, what=f"model ({name})")


def settings(name: str, variant: str, **changes: Any) -> dict[str, Any]:
    """All settings of an encoder's published size, `name` included: a configuration section.

    Raises:
      ValueError: for an unknown name, variant or setting, naming the nearest known one.
    """
    chosen = registry.lookup(f"{name} variant", _constructor(name).VARIANTS, variant)
    fields = defaults(name)
    if "features" in changes:  # what recipes of before call the width
        changes["width"] = changes.pop("features")
    for key in changes:
        registry.lookup(f"{name} setting", fields, key)
    return {**fields, **chosen, **changes}


def defaults(name: str) -> dict[str, Any]:
    """All settings of an encoder as its constructor has them, `name` included."""
    constructor = _constructor(name)
    fields = dataclasses.fields(constructor)
    return {"name": name} | {
        field.name: field.default for field in fields if field.name not in ("parent", "name")
    }


def listens(name: str) -> str:
    """What an encoder listens to: 'log_mel' or 'waveform'."""
    return _constructor(name).listens


def _constructor(name: str) -> type[nn.Module]:
    module, _, attribute = registry.lookup("encoder", ENCODERS, name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """An encoder's parameters for scan=True: layer_0, layer_1, ... become one tree, layers."""
    count = sum(name.startswith("layer_") for name in params)
    if not count:
        return params
    each = [params[f"layer_{i}"] for i in range(count)]
    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *each)}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`; parameters that are not stacked come back as they are."""
    rest = dict(params)
    stacked = rest.pop("layers", None)
    if stacked is None:
        return rest
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = {
        f"layer_{i}": jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), stacked)
        for i in range(count)
    }
    return rest | layers
