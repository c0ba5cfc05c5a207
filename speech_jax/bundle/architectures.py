"""A config.json of Hugging Face's wav2vec2 and the settings of our encoder and task that it means.

Models of Transformer layers (Wav2Vec2*) and of Conformer layers (Wav2Vec2Conformer*).
"""

import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax import models
from speech_jax.bundle import names
from speech_jax.bundle.names import HEADS, architecture
from speech_jax.bundle.schema import (
    FLAG,
    TEXT,
    ModelFolderError,
    check,
    one_of,
    optional,
    several,
    table,
    whole,
)

# What a key may hold, where it stands in a config.json; other keys travel unread.
_SIZE = whole(1, 1 << 16)
_SETTINGS = {
    "architectures": optional(several(TEXT, least=0)),
    "hidden_size": _SIZE,
    "num_hidden_layers": whole(1, 1_000),
    "num_attention_heads": _SIZE,
    "intermediate_size": whole(1, 1 << 20),
    "do_stable_layer_norm": FLAG,
    "conv_dim": several(_SIZE, most=32),
    "conv_kernel": several(whole(1, 1_000), most=32),
    "conv_stride": several(whole(1, 1_000), most=32),
    "conv_bias": FLAG,
    "num_conv_pos_embeddings": whole(1, 10_000),
    "num_conv_pos_embedding_groups": _SIZE,
    "conv_depthwise_kernel_size": whole(1, 10_000),
    "vocab_size": optional(_SIZE),
    "pad_token_id": optional(whole(0, (1 << 31) - 1)),
    "num_codevector_groups": _SIZE,
    "num_codevectors_per_group": _SIZE,
    "codevector_dim": _SIZE,
    "proj_codevector_dim": _SIZE,
    "classifier_proj_size": _SIZE,
    "use_weighted_layer_sum": FLAG,
    "id2label": optional(table(TEXT)),
    # Ours has one value of these, or few.
    "feat_extract_activation": one_of("gelu"),
    "feat_extract_norm": one_of("group", "layer"),
    "layer_norm_eps": one_of(1e-5),
    "add_adapter": one_of(False),
    "quantization_config": one_of(None),
}
_OF_TYPE = {
    "wav2vec2": {"hidden_act": one_of("gelu"), "adapter_attn_dim": one_of(None)},
    "wav2vec2-conformer": {
        "hidden_act": one_of("swish", "silu"),
        "position_embeddings_type": one_of(*names.ATTENTION),
        "rotary_embedding_base": one_of(10_000),
    },
}
SCHEMA = {"model_type": one_of(*_OF_TYPE), **_SETTINGS}

# What a config.json that leaves a key out means by it.
_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "do_stable_layer_norm": False, "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "feat_extract_norm": "group", "conv_bias": False, "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16, "vocab_size": 32, "pad_token_id": 0,
    "num_codevector_groups": 2, "num_codevectors_per_group": 320, "codevector_dim": 256,
    "proj_codevector_dim": 256, "classifier_proj_size": 256, "use_weighted_layer_sum": False,
}  # fmt: skip
# What a Wav2Vec2Conformer has besides, or of another default.
_CONFORMER_DEFAULTS = {
    "hidden_act": "gelu", "position_embeddings_type": "relative", "rotary_embedding_base": 10_000,
    "conv_depthwise_kernel_size": 31, "vocab_size": None,
}  # fmt: skip

_LONGEST_FRAME = 160_000  # samples that one frame of the extractor may see


def complete(source: Mapping[str, Any], where: object) -> dict[str, Any]:
    """A config.json of the schema with the defaults of what it leaves out.

    Raises:
      ModelFolderError: it asks for what ours is not, or its numbers contradict each other.
    """
    config = {"model_type": "wav2vec2", **source}
    if config["model_type"] == "wav2vec2-conformer":
        config = _CONFORMER_DEFAULTS | config
    check(where, config, _OF_TYPE[config["model_type"]])
    config = _DEFAULTS | config
    geometry = [config[key] for key in ("conv_dim", "conv_kernel", "conv_stride")]
    if len(set(map(len, geometry))) > 1:
        raise ModelFolderError(f"{where}: conv_dim, conv_kernel and conv_stride differ in length")
    for part, total in (
        ("num_attention_heads", "hidden_size"),
        ("num_codevector_groups", "codevector_dim"),
        *(() if _is_conformer(config) else (("num_conv_pos_embedding_groups", "hidden_size"),)),
    ):
        if config[total] % config[part]:
            raise ModelFolderError(
                f"{where}: {part}={config[part]} does not divide {total}={config[total]}"
            )
    if _frame(*geometry[1:]) > _LONGEST_FRAME:
        raise ModelFolderError(
            f"{where}: a frame of these conv_kernel and conv_stride sees more than "
            f"{_LONGEST_FRAME} samples"
        )
    return config


def _frame(kernels: list[int], strides: list[int]) -> int:
    """How many samples one frame of the extractor sees."""
    before = [math.prod(strides[:index]) for index in range(len(strides))]
    return 1 + sum((kernel - 1) * step for kernel, step in zip(kernels, before, strict=True))


def _is_conformer(config: Mapping[str, Any]) -> bool:
    return config["model_type"] == "wav2vec2-conformer"


def encoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of models.make_encoder that a complete config.json means."""
    settings = {
        "name": "wav2vec2",
        "width": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "feed_forward": config["intermediate_size"],
        "conv_channels": tuple(config["conv_dim"]),
        "conv_kernels": tuple(config["conv_kernel"]),
        "conv_strides": tuple(config["conv_stride"]),
        "conv_norm": config["feat_extract_norm"],
        "conv_bias": config["conv_bias"],
    }
    if _is_conformer(config):
        return settings | {
            "name": "wav2vec2_conformer",
            "kernel": config["conv_depthwise_kernel_size"],
            "attention": names.ATTENTION[config["position_embeddings_type"]],
        }
    return settings | {
        "pre_norm": config["do_stable_layer_norm"],
        "position_kernel": config["num_conv_pos_embeddings"],
        "position_groups": config["num_conv_pos_embedding_groups"],
    }


# By our name of an encoder, the settings that config.json knows of.
KNOWN = {
    settings["name"]: tuple(settings)
    for settings in (
        encoder_settings(_DEFAULTS | _CONFORMER_DEFAULTS | {"model_type": kind})
        for kind in _OF_TYPE
    )
}


def head_of(config: Mapping[str, Any], tensors: Collection[str], where: object) -> str:
    """The name in HEADS of a model, as config.json says, or where it does not, its tensors do."""
    encoder = encoder_settings(config)["name"]
    named = {architecture(head, encoder): head for head in HEADS}
    for first in (config.get("architectures") or [])[:1]:
        if first not in named:
            raise ModelFolderError(
                f"{where}: architecture {first!r} is not supported, only {', '.join(named)}"
            )
        return named[first]
    marks = {"lm_head.weight": "ctc", "project_q.weight": "pretraining"}
    marks["classifier.weight"] = "classification"
    return next((head for key, head in marks.items() if key in tensors), "none")


def class_names(config: Mapping[str, Any], where: object) -> list[str]:
    """The names of a classification head's classes, in the order of its outputs.

    Raises ModelFolderError for an id2label that is no numbering of different names.
    """
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    ordered = [labels.get(str(index)) for index in range(len(labels))]
    if None in ordered or len(set(ordered)) < len(ordered):
        raise ModelFolderError(f"{where}: id2label must give 0, 1, ... a different name each")
    return ordered


def from_settings(
    settings: Mapping[str, Any], head: str, params: Mapping[str, Any], labels: list[str] | None
) -> dict[str, Any]:
    """What config.json says of a model of ours: the inverse of the above.

    Args:
      settings: of the encoder, those of KNOWN.
      params: the whole model's; the head's sizes are taken from them.
      labels: of the classes of a classification head.
    """
    config = {
        "architectures": [architecture(head, settings["name"])],
        "hidden_size": settings["width"],
        "num_hidden_layers": settings["num_layers"],
        "num_attention_heads": settings["heads"],
        "intermediate_size": settings["feed_forward"],
        "conv_dim": list(settings["conv_channels"]),
        "conv_kernel": list(settings["conv_kernels"]),
        "conv_stride": list(settings["conv_strides"]),
        "num_feat_extract_layers": len(settings["conv_channels"]),
        "feat_extract_norm": settings["conv_norm"],
        "conv_bias": settings["conv_bias"],
    }
    if settings["name"] == "wav2vec2_conformer":
        theirs = {ours: theirs for theirs, ours in names.ATTENTION.items()}
        if settings["attention"] not in theirs:
            raise ModelFolderError(
                f"attention={settings['attention']!r} is not in their Conformers, only "
                f"{' and '.join(theirs)}"
            )
        config |= {
            "model_type": "wav2vec2-conformer",
            "hidden_act": "swish",
            "conv_depthwise_kernel_size": settings["kernel"],
            "position_embeddings_type": theirs[settings["attention"]],
            **names.unused_config(settings),
        }
    else:
        config |= {
            "model_type": "wav2vec2",
            "do_stable_layer_norm": settings["pre_norm"],
            "num_conv_pos_embeddings": settings["position_kernel"],
            "num_conv_pos_embedding_groups": settings["position_groups"],
        }
    return config | _of_head(head, params, labels)


def _of_head(head: str, params: Mapping[str, Any], labels: list[str] | None) -> dict[str, Any]:
    try:
        if head == "ctc":
            return {"vocab_size": len(params["head"]["bias"])}
        if head == "classification":
            if labels is None or len(labels) != len(params["classifier"]["bias"]):
                labels = [f"LABEL_{i}" for i in range(len(params["classifier"]["bias"]))]
            return {
                "classifier_proj_size": len(params["projector"]["bias"]),
                "use_weighted_layer_sum": "layer_weights" in params,
                "id2label": {str(i): name for i, name in enumerate(labels)},
                "label2id": {name: i for i, name in enumerate(labels)},
            }
        if head == "pretraining":
            groups, codes, width = params["quantizer"]["codebook"].shape
            return {
                "num_codevector_groups": groups,
                "num_codevectors_per_group": codes,
                "codevector_dim": groups * width,
                "proj_codevector_dim": len(params["project_target"]["bias"]),
            }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFolderError(f"the model lacks parameters of a {head} head: {error}") from error
    return {}


# ---- Shapes ------------------------------------------------------------------------------------


def shapes(config: Mapping[str, Any], head: str) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, with those of layer 0 for all layers.

    Raises ModelFolderError for a complete config.json that describes no encoder.
    """
    settings = encoder_settings(config) | {"num_layers": 1}
    found = dict(_encoder_shapes(tuple(settings.items())))
    width, features = config["hidden_size"], config["conv_dim"][-1]
    groups, codes = config["num_codevector_groups"], config["num_codevectors_per_group"]
    dimension, final = config["codevector_dim"], config["proj_codevector_dim"]
    dense = []
    if head == "ctc":
        dense = [("head", width, config["vocab_size"])]
    elif head == "classification":
        middle, count = config["classifier_proj_size"], len(config.get("id2label") or range(2))
        dense = [("projector", width, middle), ("classifier", middle, count)]
        found["layer_weights"] = (config["num_hidden_layers"] + 1,)
    elif head == "pretraining":
        found["quantizer/codebook"] = (groups, codes, dimension // groups)
        dense = [
            ("quantizer/project", features, groups * codes),
            ("project_hidden", width, final),
            ("project_target", dimension, final),
        ]
    for name, rows, columns in dense:
        found |= {f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)}
    return found


@functools.lru_cache
def _encoder_shapes(settings: tuple[tuple[str, Any], ...]) -> Mapping[str, tuple[int, ...]]:
    # Of one layer: a configuration of a million is not to be traced before its tensors are seen.
    encoder = models.make_encoder(**dict(settings), scan=False)
    samples = _frame(encoder.conv_kernels, encoder.conv_strides)
    inputs = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        tree = jax.eval_shape(
            lambda x, n: encoder.init(jax.random.key(0), x, n, True), inputs, lengths
        )
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelFolderError(f"config.json describes no encoder: {why}") from error
    found = {"encoder": tree.pop("params")}
    if tree:
        found["state"] = {collection: {"encoder": inner} for collection, inner in tree.items()}
    flat = flax.traverse_util.flatten_dict(found, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that take no memory, however many they are."""
    return np.broadcast_to(np.zeros((), np.float32), shape)
