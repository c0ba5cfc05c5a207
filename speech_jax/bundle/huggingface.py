"""wav2vec 2.0 checkpoints of Hugging Face transformers, read and written without PyTorch.

Those of Transformer layers (Wav2Vec2*) and of Conformer layers (Wav2Vec2Conformer*).

  python -m speech_jax.deploy.hf import SRC DST    # a Hugging Face folder to a model folder
  python -m speech_jax.bundle.huggingface export SRC DST    # and back, or from the workdir of a run

A model folder is what fine-tuning starts from:

  model.json          {"encoder": keyword arguments of models.make_encoder (architecture only),
                      "head": a name of hf_names.HEADS, "normalize": of the waveform, as in
                      config.features.normalize, "vocabulary": symbols by id, the CTC blank
                      first, or null, "labels": names by id, or null, "source": the config.json
                      that the model was imported with, or null}
  params.safetensors  float32 parameters by their path ("encoder/layer_0/attention/qkv/kernel"),
                      the encoder's layers unrolled; model state too, under "state/"
  tokenizer.json      where the vocabulary is one of characters (data/text.py)
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from speech_jax import evaluate, models
from speech_jax.bundle import names as hf_names
from speech_jax.bundle.names import HEADS, architecture
from speech_jax.bundle.tensors import (
    ModelFolderError,
    read_json,
    read_safetensors,
    read_tensors,
)
from speech_jax.data import text
from speech_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as plain data: see the module's docstring for the fields.

    `params` is a nested dict of float32 numpy arrays: {"encoder": ..., and the head's own};
    `state` likewise, of the collections that are no parameters: {"batch_stats": {"encoder": ...}}
    with batch norm, else {}.
    """

    encoder: dict[str, Any]
    params: dict[str, Any]
    head: str
    normalize: str = "utterance"
    vocabulary: list[str] | None = None
    labels: list[str] | None = None
    source: dict[str, Any] | None = None
    state: dict[str, Any] = dataclasses.field(default_factory=dict)


# ---- From Hugging Face -------------------------------------------------------------------------

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

# By model type, settings that ours has one value of, or few.
_COMMON = {
    "feat_extract_activation": ("gelu",),
    "feat_extract_norm": ("group", "layer"),
    "layer_norm_eps": (1e-5,),
    "add_adapter": (False,),
}
_REQUIRED = {
    "wav2vec2": _COMMON | {"hidden_act": ("gelu",), "adapter_attn_dim": (None,)},
    "wav2vec2-conformer": _COMMON
    | {
        "hidden_act": ("swish", "silu"),
        "position_embeddings_type": tuple(hf_names.ATTENTION),
        "rotary_embedding_base": (10_000,),
    },
}


def read(folder) -> Model:
    """The model in a Hugging Face folder.

    Raises:
      ModelFolderError: for a missing or damaged file, an architecture that is not ours, a missing
        or left-over tensor, a shape that does not fit the configuration.
    """
    folder = pathlib.Path(folder)
    source = read_json(folder / "config.json")
    config = _complete(source, folder)
    tensors = read_tensors(folder)
    head = _head(folder, config, tensors)
    if head == "ctc" and config["vocab_size"] is None:
        raise ModelFolderError(f"{folder / 'config.json'}: vocab_size is missing")
    params = convert(tensors, config, head, folder)
    state = params.pop("state", {})
    vocabulary = _read_vocabulary(folder, config) if head == "ctc" else None
    if head == "ctc":
        order = _blank_first(config["pad_token_id"], config["vocab_size"], folder)
        params["head"] = {name: value[..., order] for name, value in params["head"].items()}
        vocabulary = vocabulary and [vocabulary[i] for i in order]
    preprocessor = folder / "preprocessor_config.json"
    preprocessing = read_json(preprocessor) if preprocessor.exists() else {}
    labels = source.get("id2label") if head == "classification" else None
    return Model(
        encoder=_encoder_settings(config),
        params=params,
        head=head,
        normalize="utterance" if preprocessing.get("do_normalize", True) else "none",
        vocabulary=vocabulary,
        labels=labels and [labels[str(i)] for i in range(len(labels))],
        source=source,
        state=state,
    )


def _complete(source, folder) -> dict[str, Any]:
    """A config.json with the defaults of what it leaves out; all that is in it is supported."""
    config = {"model_type": "wav2vec2", **source}
    kind = config["model_type"]
    if kind == "wav2vec2-conformer":
        config = _CONFORMER_DEFAULTS | config
    for key, allowed in {"model_type": tuple(_REQUIRED), **_REQUIRED.get(kind, {})}.items():
        if key in config and config[key] not in allowed:
            raise ModelFolderError(
                f"{folder / 'config.json'}: {key}={config[key]!r} is not supported, "
                f"only {' or '.join(map(repr, allowed))}"
            )
    return _DEFAULTS | config


def _encoder_settings(config) -> dict[str, Any]:
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
    if config["model_type"] == "wav2vec2-conformer":
        return settings | {
            "name": "wav2vec2_conformer",
            "kernel": config["conv_depthwise_kernel_size"],
            "attention": hf_names.ATTENTION[config["position_embeddings_type"]],
        }
    return settings | {
        "pre_norm": config["do_stable_layer_norm"],
        "position_kernel": config["num_conv_pos_embeddings"],
        "position_groups": config["num_conv_pos_embedding_groups"],
    }


def _head(folder, config, tensors) -> str:
    encoder = _encoder_settings(config)["name"]
    named = {architecture(head, encoder): head for head in HEADS}
    architectures = config.get("architectures") or []
    if architectures:
        if architectures[0] not in named:
            raise ModelFolderError(
                f"{folder / 'config.json'}: architecture {architectures[0]!r} is not supported, "
                f"only {', '.join(named)}"
            )
        return named[architectures[0]]
    marks = {"lm_head.weight": "ctc", "project_q.weight": "pretraining"}
    marks["classifier.weight"] = "classification"
    return next((head for key, head in marks.items() if key in tensors), "none")


def convert(tensors, config, head: str, folder="") -> dict[str, Any]:
    """Their tensors (numpy, by name) as our tree of parameters; each has its place and its shape.

    The model state, if there is one, is in it as "state". `config` is a config.json with all
    settings, `folder` a name for errors.
    """
    settings = _encoder_settings(config)
    tensors = {
        hf_names.old_weight_norm(name): value
        for name, value in tensors.items()
        if not hf_names.is_unused(name, settings["name"])
    }
    embedding = hf_names.prefix(head, settings["name"]) + "masked_spec_embed"
    # Absent where the model was never masked; then nothing depends on its value.
    tensors.setdefault(embedding, np.zeros(settings["width"], np.float32))
    shapes = flax.traverse_util.flatten_dict(_shapes(config, settings, head), sep="/")
    params = {}
    entries = hf_names.entries(
        settings, head, config["num_codevector_groups"], config["use_weighted_layer_sum"]
    )
    for entry in entries:
        zero = np.broadcast_to(np.zeros((), np.float32), shapes[entry.ours])
        for name, expected in zip(entry.theirs, entry.dump(zero), strict=True):
            if name not in tensors:
                raise ModelFolderError(f"{folder}: tensor {name!r} is missing")
            if tensors[name].shape != expected.shape:
                raise ModelFolderError(
                    f"{folder}: tensor {name!r} has the shape {tensors[name].shape}, but "
                    f"config.json asks for {expected.shape}"
                )
        loaded = entry.load(*(tensors.pop(name) for name in entry.theirs))
        params[entry.ours] = np.ascontiguousarray(loaded, np.float32)
    if tensors:
        raise ModelFolderError(
            f"{folder}: tensor {min(tensors)!r} (of {len(tensors)} such) has no place in "
            f"a {architecture(head, settings['name'])} of this configuration"
        )
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _shapes(config, settings, head) -> dict[str, Any]:
    """The shapes that our parameters have."""
    encoder = models.make_encoder(**settings, scan=False)
    inputs = jax.ShapeDtypeStruct((1, 16_000), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        tree = jax.eval_shape(
            lambda x, n: encoder.init(jax.random.key(0), x, n, True), inputs, lengths
        )
    except (ValueError, TypeError) as error:
        raise ModelFolderError(f"config.json describes no encoder: {error}") from error
    dense = lambda rows, columns: {"kernel": (rows, columns), "bias": (columns,)}
    width, features = config["hidden_size"], config["conv_dim"][-1]
    groups, codes = config["num_codevector_groups"], config["num_codevectors_per_group"]
    dimension, final = config["codevector_dim"], config["proj_codevector_dim"]
    tree = jax.tree.map(lambda leaf: leaf.shape, tree)
    shapes = {"encoder": tree.pop("params")}
    shapes["state"] = {collection: {"encoder": inner} for collection, inner in tree.items()}
    if head == "ctc":
        shapes["head"] = dense(width, config["vocab_size"])
    elif head == "classification":
        labels = len(config.get("id2label") or range(2))
        shapes["projector"] = dense(width, config["classifier_proj_size"])
        shapes["classifier"] = dense(config["classifier_proj_size"], labels)
        shapes["layer_weights"] = (config["num_hidden_layers"] + 1,)
    elif head == "pretraining":
        codebook = (groups, codes, dimension // groups)
        shapes["quantizer"] = {"codebook": codebook, "project": dense(features, groups * codes)}
        shapes["project_hidden"] = dense(width, final)
        shapes["project_target"] = dense(dimension, final)
    return shapes


def _blank_first(blank, size, folder) -> list[int]:
    if blank is None or not 0 <= blank < size:
        raise ModelFolderError(
            f"{folder / 'config.json'}: pad_token_id={blank!r} must be the CTC blank, one of the "
            f"{size} ids of the vocabulary"
        )
    return [blank, *(i for i in range(size) if i != blank)]


def _read_vocabulary(folder, config) -> list[str] | None:
    path = folder / "vocab.json"
    if not path.exists():
        return None
    ids = {int(i): symbol for symbol, i in read_json(path).items()}
    size = config["vocab_size"]
    if any(not 0 <= i < size for i in ids):
        raise ModelFolderError(f"{path}: the largest id is {max(ids)}, but vocab_size is {size}")
    return [ids.get(i, f"<unused{i}>") for i in range(size)]


# ---- To Hugging Face ---------------------------------------------------------------------------


def write(model: Model, folder) -> None:
    """Writes a model as a Hugging Face folder, which appears whole or not at all."""
    config = _config(model)
    groups = config.get("num_codevector_groups")
    params = _flat(model)
    weighted = "layer_weights" in params
    tensors = hf_names.unused(model.encoder, model.head)
    for entry in hf_names.entries(model.encoder, model.head, groups, weighted):
        if entry.ours not in params:
            raise ModelFolderError(f"the model lacks the parameter {entry.ours!r}")
        parts = entry.dump(params.pop(entry.ours))
        tensors |= {
            name: np.ascontiguousarray(part) for name, part in zip(entry.theirs, parts, strict=True)
        }
    if params:
        name = architecture(model.head, model.encoder["name"])
        raise ModelFolderError(f"parameter {min(params)!r} has no place in a {name}")
    with _appearing(folder) as partial:
        safetensors.numpy.save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        _write_json(partial / "config.json", config)
        _write_json(partial / "preprocessor_config.json", _preprocessor(model))
        if model.vocabulary:
            for name, content in _tokenizer_files(model.vocabulary).items():
                _write_json(partial / name, content)


def _config(model: Model) -> dict[str, Any]:
    settings, params = model.encoder, model.params
    config = dict(model.source or {})
    # Their model has a mask embedding only where masking is on.
    if not (config.get("mask_time_prob", 0.05) or config.get("mask_feature_prob", 0.0)):
        config["mask_time_prob"] = 0.05
    config |= {
        "architectures": [architecture(model.head, settings["name"])],
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
        theirs = {ours: theirs for theirs, ours in hf_names.ATTENTION.items()}
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
            **hf_names.unused_config(settings),
        }
    else:
        config |= {
            "model_type": "wav2vec2",
            "do_stable_layer_norm": settings["pre_norm"],
            "num_conv_pos_embeddings": settings["position_kernel"],
            "num_conv_pos_embedding_groups": settings["position_groups"],
        }
    if model.head == "ctc":
        config |= {"vocab_size": params["head"]["bias"].shape[0], "pad_token_id": 0}
    elif model.head == "classification":
        config["classifier_proj_size"] = params["projector"]["bias"].shape[0]
        config["use_weighted_layer_sum"] = "layer_weights" in params
        names = model.labels or [f"LABEL_{i}" for i in range(len(params["classifier"]["bias"]))]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    elif model.head == "pretraining":
        groups, codes, width = params["quantizer"]["codebook"].shape
        config |= {
            "num_codevector_groups": groups,
            "num_codevectors_per_group": codes,
            "codevector_dim": groups * width,
            "proj_codevector_dim": params["project_target"]["bias"].shape[0],
        }
    return config


def _preprocessor(model: Model) -> dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": model.normalize == "utterance",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16_000,
    }


def _tokenizer_files(vocabulary: list[str]) -> dict[str, Any]:
    special = {"pad_token": vocabulary[0], "unk_token": "<unk>"}
    special |= {"bos_token": None, "eos_token": None}
    config = special | {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": "|"}
    return {
        "vocab.json": {symbol: i for i, symbol in enumerate(vocabulary)},
        "tokenizer_config.json": config | {"do_lower_case": False},
        "special_tokens_map.json": {k: v for k, v in special.items() if v},
    }


# ---- Model folders -----------------------------------------------------------------------------


def _flat(model: Model) -> dict[str, np.ndarray]:
    """Parameters and state by path."""
    tree = {**model.params, "state": model.state}
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}


def save(model: Model, folder) -> None:
    """Writes a model folder, which appears whole or not at all."""
    described = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("params", "state")
    }
    with _appearing(folder) as partial:
        _write_json(partial / "model.json", described)
        safetensors.numpy.save_file(_flat(model), partial / "params.safetensors")
        tokenizer = _tokenizer(model.vocabulary)
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer.json")


def load(folder) -> Model:
    """Reads a model folder, a Hugging Face folder, or the best checkpoint of a workdir.

    Raises:
      ModelFolderError: naming the file or key that is missing, damaged or unsupported.
    """
    folder = pathlib.Path(folder)
    if (folder / "checkpoints").is_dir():
        return _from_run(folder)
    if not (folder / "model.json").exists() and (folder / "config.json").exists():
        return read(folder)
    described = read_json(folder / "model.json")
    tensors = read_safetensors(folder / "params.safetensors")
    params = flax.traverse_util.unflatten_dict(tensors, sep="/")
    state = params.pop("state", {})
    try:
        model = Model(params=params, state=state, **described)
        if model.head not in HEADS:
            raise KeyError(model.head)
    except (TypeError, KeyError) as error:
        raise ModelFolderError(f"{folder / 'model.json'} describes no model: {error}") from error
    sequences = {k: tuple(v) for k, v in model.encoder.items() if isinstance(v, list)}
    return dataclasses.replace(model, encoder=model.encoder | sequences)


_HEAD_OF_TASK = {"asr": "ctc", "contrastive": "pretraining"}
_ARCHITECTURES = {
    settings["name"]: tuple(settings)
    for settings in (
        _encoder_settings(_DEFAULTS | _CONFORMER_DEFAULTS | {"model_type": kind})
        for kind in _REQUIRED
    )
}


def _from_run(workdir) -> Model:
    run = evaluate.open_run(workdir)
    name, settings = run.config.task.name, run.config.model.to_dict()
    if name not in _HEAD_OF_TASK or settings["name"] not in _ARCHITECTURES:
        raise ModelFolderError(
            f"{workdir} is of task {name} with a {settings['name']}: what transformers knows is "
            f"{' or '.join(_ARCHITECTURES)} with {' or '.join(_HEAD_OF_TASK)}"
        )
    if run.config.data.sample_rate != 16_000:
        raise ModelFolderError(
            f"{workdir} is of audio at {run.config.data.sample_rate} Hz, their models of 16000"
        )
    alphabet = getattr(run.tokenizer, "alphabet", None)  # pieces of words are not for their class
    unstack = lambda tree: {**tree, "encoder": models.unstack_layers(tree["encoder"])}
    return Model(
        encoder={key: settings[key] for key in _ARCHITECTURES[settings["name"]]},
        params=unstack(run.params),
        head=_HEAD_OF_TASK[name],
        normalize=run.config.features.normalize,
        vocabulary=alphabet and ["<pad>", *alphabet.replace(" ", "|")],
        state={collection: unstack(tree) for collection, tree in run.state.items()},
    )


# The symbols that stand for no text; in our alphabet, characters that no transcript holds.
_SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")


def _tokenizer(vocabulary) -> text.Tokenizer | None:
    """The character tokenizer with these ids, or None where symbols are longer than one character.

    Special symbols have ids of their own, which no text encodes to: they stand in the alphabet as
    characters of Unicode's private use area.
    """
    if not vocabulary:
        return None
    alphabet = ""
    for index, symbol in enumerate(vocabulary[1:]):
        if symbol in _SPECIAL or symbol.startswith("<unused"):
            symbol = chr(0xE000 + index)
        alphabet += " " if symbol == "|" else symbol
    if len(alphabet) != len(vocabulary) - 1 or len(set(alphabet)) != len(alphabet):
        return None
    letters = "".join(c for c in alphabet if c.isalpha())
    normalizer = "upper" if letters.isupper() else "lower" if letters.islower() else "none"
    if normalizer == "upper" and set(letters) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        normalizer = "librispeech"
    return text.CharacterTokenizer(alphabet, normalizer)


def _write_json(path, content) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


@contextlib.contextmanager
def _appearing(folder):
    """A scratch folder that becomes `folder` at the end; nothing is left where that fails."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelFolderError(f"{folder} exists and is not empty: name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ModelFolderError(f"cannot write {folder}: {error}") from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise ModelFolderError(f"cannot write {folder}: {error}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(arguments=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.bundle.huggingface", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("import", "export"))
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("destination", type=pathlib.Path)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "import":
            model = read(chosen.source)
            save(model, chosen.destination)
        else:
            model = load(chosen.source)
            write(model, chosen.destination)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    name = architecture(model.head, model.encoder["name"])
    print(f"{chosen.destination}: {name}, {count:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
