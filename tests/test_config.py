"""Recipes resolve to what golden text says; a value that cannot work is named before any work."""

import importlib
import json
import os
import pathlib

import pytest

from speech_jax import config as defaults
from speech_jax import experiment, tasks
from speech_jax.data.parts.audio import Audio

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECIPES = {
    "quickstart": ("quickstart", []),
    "spoken_digits": ("spoken_digits", []),
    "spoken_digits_wav2vec2": ("spoken_digits", ["wav2vec2"]),
    "spoken_digits_attend": ("spoken_digits", ["conformer+attend"]),
    "spoken_digits_tdt": ("spoken_digits", ["conformer+tdt"]),
    "librispeech": ("librispeech", ["conformer_s"]),
    "librispeech_conformer_tiny": ("librispeech", ["conformer_tiny"]),
    "librispeech_without_argument": ("librispeech", []),
    "librispeech_conformer_l": ("librispeech", ["conformer_l"]),
    "librispeech_deepspeech": ("librispeech", ["deepspeech"]),
    "librispeech_wavenet_tiny": ("librispeech", ["wavenet_tiny"]),
    "pretrain_wav2vec2_base": ("pretrain_wav2vec2_base", []),
    "pretrain_best_rq": ("pretrain_best_rq", []),
    "pretrain_wavenet": ("pretrain_wavenet", []),
    "pretrain_wavenet_mel": ("pretrain_wavenet", ["mel"]),
    "speaker_id": ("speaker_id", []),
    "verification": ("verification", []),
    "translate_quickstart": ("translate_quickstart", ["en-de"]),
    "mboshi": ("mboshi", []),
    "finetune_wav2vec2_10m": ("finetune_wav2vec2", ["10m"]),
}


def resolve(name):
    module, arguments = RECIPES[name]
    return importlib.import_module(f"configs.{module}").get_config(*arguments)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve_to_their_golden_text(name):
    """After a change that is meant, run this file with SPEECH_JAX_UPDATE_GOLDEN=1."""
    config = resolve(name)
    defaults.check(config)
    text = json.dumps(json.loads(config.to_json()), indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("SPEECH_JAX_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


class Labels:
    """A part of 32 symbols."""

    count = 32


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_their_task(name):
    config = resolve(name)
    kinds = tasks.constructor(config.task.name).parts
    parts = {"audio": Audio()} | {name: Labels() for name in kinds.keys() - {"audio"}}
    task = experiment.make_task(config, parts)
    assert task.encoder.output_lengths(task.frontend.lengths(16_000)) in (13, 25, 49, 50)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.source", "librispech", "did you mean 'librispeech'"),
        ("data.on_error", "ignore", "raise, skip"),
        ("text.tokenizer", "bpe", "characters, sentencepiece"),
        ("features.normalize", "batch", "utterance, global, none"),
        ("data.batch_seconds", 5.0, "a batch must hold an utterance"),
        ("data.speeds", (0.9, 1.1), "hold 1.0"),
        ("data.train_minutes", -1.0, "must be at least 0"),
        ("train.steps", 0, "greater than 0"),
        ("train.ema_decay", 1.0, r"in \[0, 1\)"),
        ("schedule.peak", -1.0, "greater than 0"),
    ],
)
def test_impossible_values_are_named(key, value, message):
    config = defaults.default()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"config.{key}=.*{message}"):
        defaults.check(config)


def test_unknown_keys_are_named_with_the_nearest():
    config = defaults.default()
    with config.unlocked():
        config.data.batch_second = 3.0
    with pytest.raises(
        ValueError, match=r"config.data.batch_second.*did you mean data.batch_seconds"
    ):
        defaults.check(config)


def test_split_names_are_joined_by_commas():
    assert defaults.split_names(" a, b,,c ") == ["a", "b", "c"]
    assert defaults.split_names("") == []


def test_fine_tuning_takes_as_much_speech_as_its_argument_says():
    from configs import finetune_wav2vec2

    minutes = {
        name: finetune_wav2vec2.get_config(name).data.train_minutes for name in ("10m", "10h")
    }
    assert minutes == {"10m": 10.0, "10h": 600.0}
