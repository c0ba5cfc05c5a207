"""wav2vec 2.0 folders of Hugging Face transformers as bundles, read and written without PyTorch.

  python -m speech_jax.bundle.huggingface import SRC DST  # a folder of theirs, saved as ours
  python -m speech_jax.bundle.huggingface export SRC DST  # any bundle, as a folder of theirs

Models of Transformer layers (Wav2Vec2*) and of Conformer layers (Wav2Vec2Conformer*), as
transformers 4 and 5 write them. A CTC head is the task 'recognize', with the CTC blank as id 0 and
a part 'labels' where the vocabulary is one of characters; a pretraining head is 'contrastive', a
classification head 'classify', with a part 'target', and no head is 'encoder'. What the folder's
JSON says besides is kept as text in config.source, and is written again.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
from absl import logging
from ml_collections import ConfigDict

from speech_jax import config as defaults
from speech_jax import models, tasks
from speech_jax.bundle import architectures, names, schema, vocabulary
from speech_jax.bundle.format import Bundle, appearing
from speech_jax.bundle.names import HEADS, architecture
from speech_jax.bundle.schema import FLAG, TEXT, ModelFolderError, one_of, optional, several, whole
from speech_jax.bundle.tensors import read_safetensors, read_tensors, to_float32
from speech_jax.data.parts import Part
from speech_jax.data.parts.audio import Audio, Crop
from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.errors import UserError
from speech_jax.files import dump_json, expand, write_atomically

_TASKS = {
    "ctc": "recognize",
    "pretraining": "contrastive",
    "classification": "classify",
    "none": "encoder",
}
# Settings of a classification head, as theirs has them.
_KNOWN_HEAD = {"pooling": "mean", "standardize": False, "activation": "none", "margin": 0.0}
_EXTRACTOR = {
    "do_normalize": FLAG,
    "sampling_rate": whole(4_000, 192_000),
    "feature_size": one_of(1),
    "feature_extractor_type": one_of("Wav2Vec2FeatureExtractor"),
}
# The JSON files of a folder that are read, kept and written.
_SCHEMAS = {
    "config.json": architectures.SCHEMA,
    "preprocessor_config.json": _EXTRACTOR,
    "processor_config.json": {"feature_extractor": schema.OBJECT},
    **vocabulary.SCHEMAS,
}


# ---- From Hugging Face -------------------------------------------------------------------------


def read(folder: str | os.PathLike) -> Bundle:
    """The model in a Hugging Face folder.

    Raises:
      ModelFolderError: for a missing or damaged file, an architecture that is not ours, a missing
        or left-over tensor, a shape that does not fit the configuration.
    """
    folder = expand(folder)
    files = {
        name: schema.read(folder / name, checks)
        for name, checks in _SCHEMAS.items()
        if name == "config.json" or os.path.exists(folder / name)
    }
    return _assembled(files, read_tensors(folder), folder)


def _assembled(
    files: Mapping[str, Any], tensors: Mapping[str, np.ndarray], folder: pathlib.Path
) -> Bundle:
    """The bundle of a folder's JSON files, which are of their schemas, and its tensors."""
    where = folder / "config.json"
    config = architectures.complete(files["config.json"], where)
    head = architectures.head_of(config, tensors, where)
    extractor = _extractor(files, folder)
    order, symbols = _blank_first(config, files, folder) if head == "ctc" else ([], None)
    params = convert(tensors, config, head, folder)
    ours = _configuration(config, head, params, extractor)
    with ours.unlocked():
        ours.source = json.dumps(files, ensure_ascii=False)
    parts: dict[str, Part] = {"audio": Audio(sample_rate=ours.data.sample_rate)}
    if head == "ctc":
        params["head"] = _reordered(params["head"], order)
        if tokenizer := vocabulary.tokenizer(files, symbols):
            parts["labels"] = Transcript(tokenizer=tokenizer, name="labels")
            ours.text.normalizer = tokenizer.normalizer
    elif head == "classification":
        classes = tuple(architectures.class_names(config, where))
        parts["target"] = Category(classes=classes, name="target", tag="label")
    elif head == "pretraining":
        parts["audio"] = Crop(sample_rate=ours.data.sample_rate, longest=ours.data.max_seconds)
    state = params.pop("state", {})
    return Bundle(config=ours, parts=parts, params=params, state=state)


def _configuration(
    config: Mapping[str, Any], head: str, params: Mapping[str, Any], extractor: Mapping[str, Any]
) -> ConfigDict:
    """The defaults, and what a complete config.json and the extractor say."""
    task, changes = _TASKS[head], {}
    if head == "pretraining":
        groups, codes, width = params["quantizer"]["codebook"].shape
        changes = {"groups": groups, "codes": codes, "code_features": groups * width}
        changes["final_features"] = len(params["project_target"]["bias"])
    elif head == "classification":
        changes = {"units": len(params["projector"]["bias"]), "activation": "none"}
        changes["layer_sum"] = "layer_weights" in params
    known = task in tasks.TASKS
    ours = defaults.default()
    with ours.unlocked():
        settings = architectures.encoder_settings(config)
        ours.model = models.settings(**settings, variant="large", scan=False)
        ours.task = tasks.settings(task, **changes) if known else {"name": task, **changes}
    ours.data.sample_rate = extractor.get("sampling_rate", 16_000)
    ours.features.normalize = "utterance" if extractor.get("do_normalize", True) else "none"
    return ours


def _extractor(files: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """The settings of the feature extractor, which transformers 5 keeps in the processor's."""
    inner = files.get("processor_config.json", {}).get("feature_extractor", {})
    schema.check(folder / "processor_config.json", inner, _EXTRACTOR)
    return inner or files.get("preprocessor_config.json", {})


def _blank_first(
    config: Mapping[str, Any], files: Mapping[str, Any], folder: object
) -> tuple[list[int], list[str | None] | None]:
    """Their ids in the order of ours, and the symbols in that order, if there is a vocabulary."""
    size, blank = config["vocab_size"], config["pad_token_id"]
    if size is None:
        raise ModelFolderError(f"{folder}/config.json: vocab_size is missing")
    if blank is None or blank >= size:
        raise ModelFolderError(
            f"{folder}/config.json: pad_token_id={blank!r} must be the CTC blank, one of the "
            f"{size} ids of the vocabulary"
        )
    order = [blank, *(index for index in range(size) if index != blank)]
    symbols = vocabulary.symbols(files, size, blank, folder)
    return order, symbols and [symbols[index] for index in order]


def _reordered(head: Mapping[str, np.ndarray], order: Any) -> dict[str, np.ndarray]:
    """A CTC head with its outputs in another order."""
    return {name: np.ascontiguousarray(value[..., order]) for name, value in head.items()}


def convert(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], head: str, folder: object = ""
) -> dict[str, Any]:
    """Their tensors (numpy, by name) as our tree of parameters; each has its place and its shape.

    The model state, if there is one, is in it as "state". `config` is a config.json with all
    settings, `folder` a name for errors.
    """
    settings = architectures.encoder_settings(config)
    left = _usual_names(tensors, settings, head, folder)
    shapes = architectures.shapes(config, head)
    groups, weighted = config["num_codevector_groups"], config["use_weighted_layer_sum"]
    params = {}
    for entry in names.entries(settings, head, groups, weighted):
        expected = entry.dump(architectures.zeros(shapes[names.first_layer(entry.ours)]))
        for name, part in zip(entry.theirs, expected, strict=True):
            if name not in left:
                raise ModelFolderError(f"{folder}: tensor {name!r} is missing")
            if left[name].shape != part.shape:
                raise ModelFolderError(
                    f"{folder}: tensor {name!r} has the shape {left[name].shape}, but config.json "
                    f"asks for {part.shape}"
                )
        loaded = entry.load(*(to_float32(left.pop(name), name, folder) for name in entry.theirs))
        params[entry.ours] = np.ascontiguousarray(loaded)
    if left:
        raise ModelFolderError(
            f"{folder}: tensor {schema.short(min(left))} (of {len(left)} such) has no place in "
            f"a {architecture(head, settings['name'])} of this configuration"
        )
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _usual_names(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], head: str, folder: object
) -> dict[str, np.ndarray]:
    """What is used of their tensors, by the names that `names.entries` gives them."""
    start = names.prefix(head, settings["name"])
    left = {}
    for name, value in tensors.items():
        usual = names.usual(name)
        if names.is_unused(usual, settings["name"]):
            continue
        if usual in left:
            raise ModelFolderError(f"{folder}: tensor {usual!r} is there under two names")
        left[usual] = value
    # Absent where the model was never masked; then nothing depends on its value.
    left.setdefault(f"{start}masked_spec_embed", np.zeros(settings["width"], np.float32))
    names.split_weight_norm(left, start)
    return left


def read_model_folder(folder: str | os.PathLike) -> Bundle:
    """The model in a folder that we wrote before there were bundles: model.json and its weights.

    Raises ModelFolderError for a missing or damaged file, or weights that do not fit.
    """
    folder = expand(folder)
    said = schema.read(folder / "model.json", _MODEL)
    flat = read_safetensors(folder / "params.safetensors")
    try:
        head, encoder = said["head"], {"name": said["encoder"]["name"]}
        for key in architectures.KNOWN[encoder["name"]][1:]:
            encoder[key] = said["encoder"][names.BEFORE.get(key, key)]
        params = flax.traverse_util.unflatten_dict(flat, sep="/")
        config = {"pad_token_id": 0, **(said.get("source") or {})}
        config |= architectures.from_settings(encoder, head, params, said.get("labels"))
        extractor = _NEW_EXTRACTOR | {"do_normalize": said["normalize"] == "utterance"}
        files = {"config.json": config, "preprocessor_config.json": extractor}
        schema.check(folder / "model.json", config, architectures.SCHEMA)
        if symbols := list(said.get("vocabulary") or ()):
            symbols.insert(config["pad_token_id"], symbols.pop(0))  # the blank was the first
            kept = {s: index for index, s in enumerate(symbols) if not s.startswith("<unused")}
            files["vocab.json"] = kept
        if head == "ctc":
            back = np.argsort(_blank_first(config, files, folder)[0])
            flat |= {f"head/{key}": v for key, v in _reordered(params["head"], back).items()}
        tensors = _tensors(flat, encoder, head)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError) and str(folder) in str(error):
            raise
        raise ModelFolderError(f"{folder}: model.json is not of these weights: {error}") from error
    return _assembled(files, tensors, folder)


_MODEL = {
    "encoder": schema.OBJECT,
    "head": one_of(*HEADS),
    "normalize": one_of("utterance", "none"),
    "vocabulary": optional(several(TEXT)),
    "labels": optional(several(TEXT)),
    "source": optional(schema.OBJECT),
}


# ---- To Hugging Face ---------------------------------------------------------------------------


def write(bundle: Bundle, folder: str | os.PathLike) -> None:
    """Writes a bundle as a Hugging Face folder, which appears whole or not at all.

    Raises:
      ModelFolderError: transformers has no such model, or the folder cannot be written.
    """
    settings, head = _described(bundle.config)
    unstack = lambda tree: {**tree, "encoder": models.unstack_layers(tree.get("encoder", {}))}
    params = unstack(bundle.params)
    files = _files(bundle, settings, head, params)
    if head == "ctc":
        back = np.argsort(_blank_first(files["config.json"], files, folder)[0])
        params["head"] = _reordered(params["head"], back)
    params["state"] = {name: unstack(tree) for name, tree in bundle.state.items()}
    tensors = _tensors(flax.traverse_util.flatten_dict(params, sep="/"), settings, head)
    with appearing(folder) as partial:
        safetensors.numpy.save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        for name, content in files.items():
            write_atomically(partial / name, dump_json(content))


def _described(config: ConfigDict) -> tuple[dict[str, Any], str]:
    """(settings of the encoder that config.json knows of, head) of a configuration."""
    task, model = config.task.name, config.model.to_dict()
    head = next((head for head, name in _TASKS.items() if name == task), None)
    if head is None or model["name"] not in architectures.KNOWN:
        raise ModelFolderError(
            f"a model of task {task} with a {model['name']} is not known to transformers, only "
            f"{' or '.join(architectures.KNOWN)} with {' or '.join(_TASKS.values())}"
        )
    if head == "classification":
        for key, value in _KNOWN_HEAD.items():
            if config.task.get(key, value) != value:
                raise ModelFolderError(
                    f"a head with task.{key}={config.task[key]!r} is not known to transformers, "
                    f"only one with {value!r}"
                )
    if config.features.normalize not in ("utterance", "none"):
        raise ModelFolderError(
            f"features.normalize={config.features.normalize!r} is not known to transformers, only "
            "'utterance' or 'none'"
        )
    return {key: model[key] for key in architectures.KNOWN[model["name"]]}, head


def _tensors(
    params: Mapping[str, np.ndarray], settings: Mapping[str, Any], head: str
) -> dict[str, np.ndarray]:
    """Their tensors of parameters and state by path."""
    left, tensors = dict(params), names.unused(settings, head)
    for entry in names.entries(settings, head, weighted="layer_weights" in params):
        if entry.ours not in left:
            raise ModelFolderError(f"the model lacks the parameter {entry.ours!r}")
        parts = entry.dump(np.asarray(left.pop(entry.ours), np.float32))
        tensors |= {
            name: np.ascontiguousarray(part) for name, part in zip(entry.theirs, parts, strict=True)
        }
    if left:
        name = architecture(head, settings["name"])
        raise ModelFolderError(f"parameter {min(left)!r} has no place in a {name}")
    return tensors


def _files(
    bundle: Bundle, settings: Mapping[str, Any], head: str, params: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The JSON files by name: what the model came with, changed to what it is now."""
    source = _source(bundle.config)
    config = dict(source.get("config.json", {}))
    # Their model has a mask embedding only where masking is on.
    if not (config.get("mask_time_prob", 0.05) or config.get("mask_feature_prob", 0.0)):
        config["mask_time_prob"] = 0.05
    config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
    labels = None
    if head == "classification":
        target = bundle.parts.get("target")
        known = architectures.class_names(config, "config.source")
        labels = list(target.classes) if target else known
    config |= architectures.from_settings(settings, head, params, labels)
    files = {"config.json": config, **_extractor_files(bundle.config, source)}
    if head == "ctc":
        config["pad_token_id"], made = _tokenizer_files(bundle, source, config["vocab_size"])
        files |= made
    return files


def _source(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The JSON files that a bundle came with, by name; none where it is not from such a folder."""
    text = config.get("source", "")
    try:
        files = json.loads(text or "{}")
        if not isinstance(files, dict) or not all(isinstance(v, dict) for v in files.values()):
            raise ValueError("it is not an object of objects")
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFolderError(f"config.source is damaged ({error}): import it again") from error
    for name, checks in _SCHEMAS.items():
        schema.check(f"config.source, {name}", files.get(name, {}), checks)
    return {name: files[name] for name in _SCHEMAS if name in files}


def _extractor_files(config: ConfigDict, source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    changes = {
        "do_normalize": config.features.normalize == "utterance",
        "sampling_rate": config.data.sample_rate,
    }
    old, new = "preprocessor_config.json", "processor_config.json"
    files = {name: dict(source[name]) for name in (old, new) if name in source}
    inner = files.get(new, {}).get("feature_extractor")
    if inner:
        files[new]["feature_extractor"] = inner | changes
    if old in files or not inner:
        files[old] = files.get(old, _NEW_EXTRACTOR) | changes
    for content in files.values():  # their language model is not ours to write
        if content.get("processor_class") == "Wav2Vec2ProcessorWithLM":
            content["processor_class"] = "Wav2Vec2Processor"
    return files


_NEW_EXTRACTOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "do_normalize": True,
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}


def _tokenizer_files(
    bundle: Bundle, source: Mapping[str, Any], size: int
) -> tuple[int, dict[str, dict[str, Any]]]:
    """(the id of the blank, files by name): those that it came with, if it has that vocabulary."""
    tokenizer = getattr(bundle.parts.get("labels"), "tokenizer", None)
    came = {"pad_token_id": 0} | source.get("config.json", {})
    if source and came.get("vocab_size", size) == size and came["pad_token_id"] is not None:
        _, symbols = _blank_first(came | {"vocab_size": size}, source, "config.source")
        if vocabulary.tokenizer(source, symbols) == tokenizer:
            files = {name: source[name] for name in vocabulary.SCHEMAS if name in source}
            return came["pad_token_id"], files
    if tokenizer is None or isinstance(tokenizer, CharacterTokenizer):
        return 0, vocabulary.made_files(tokenizer) if tokenizer else {}
    logging.warning("the folder has no tokenizer: theirs spells characters, this one has pieces")
    return 0, {}


# ---- The command -------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from speech_jax import bundle as bundles  # which imports this module

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
            bundle = read(chosen.source)
            bundles.save(bundle, chosen.destination)
        else:
            bundle = bundles.open(chosen.source)
            write(bundle, chosen.destination)
        settings, head = _described(bundle.config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(leaf.size for leaf in jax.tree.leaves(bundle.params))
    name = architecture(head, settings["name"])
    without = " (without a tokenizer)" if head == "ctc" and "labels" not in bundle.parts else ""
    print(f"{chosen.destination}: {name}, {count:,} parameters{without}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
