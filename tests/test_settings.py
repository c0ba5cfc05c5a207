"""Any value of any setting, from the command line or a recipe: it is used, or one line names it."""

import json
import math
import random
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

import runs
from speech_jax import config as settings
from speech_jax import experiment, main
from speech_jax.data.batch import Bucket
from speech_jax.data.parts.audio import Audio
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.errors import UserError
from speech_jax.setup import make_adversary, make_setup
from speech_jax.training import sharding

pytestmark = [
    pytest.mark.optax,
    pytest.mark.filterwarnings("ignore:.*load_module"),  # how ml_collections reads a recipe
]

# As they are typed, and as a recipe has them.
TYPED = (
    "", "x", "None", "True", "-1", "0", "1", "2", "3", "0.5", "1.5", "-0.1", "1e400", "nan", "inf",
    "1e9", "1" + "0" * 400, "(1.0,)", "(0.9, 1.0)", "()", "[]", "{}", "('x', 1)", "'x", "(1,", "é",
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 10**12, 10**400, 0.5, 1.5, -0.1, 1e9, 1e-12, math.nan,
    math.inf, "", "x", "none", "adam", "wav2vec2", (), (1.0,), (0.9, 1.0), (-1.0, 1.0), ("x", 1),
    (None,), [[1]], {}, {"x": 1}, (("encoder", 0.5),), (("(", 1.0),),
)  # fmt: skip
# Keys that a recipe need not have.
OPEN = (
    "optimizer.eps", "optimizer.mu_dtype", "optimizer.nesterov", "optimizer.momentum",
    "schedule.final", "schedule.hold", "schedule.power", "parts.labels.tag", "parts.labels.x",
    "data.arguments.x",
)  # fmt: skip
# Sections of which a step is made: an accepted value must trace.
TRACED = (
    "features", "spec_augment", "task", "model", "optimizer", "schedule", "adversarial", "train",
    "lora",
)  # fmt: skip


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def put(config, key, value):
    *sections, last = key.split(".")
    try:
        with config.unlocked(), config.ignore_type():
            for section in sections:
                if section not in config:
                    config[section] = {}
                config = config[section]
            config[last] = value
    except main.NOT_A_VALUE as error:  # where a recipe is read
        raise UserError(f"{key}: {error}") from error


def typed(config, key, text, monkeypatch):
    """The configuration with a value of the command line, read as main reads it."""
    found, arguments = flags.FlagValues(), ["main", f"--config.{key}={text}"]
    monkeypatch.setattr(sys, "argv", arguments)
    settings.make_room(config, arguments)
    config_flags.DEFINE_config_dict("config", config, flag_values=found, lock_config=True)
    try:
        found(arguments)
    except (flags.Error, *main.NOT_A_VALUE) as error:
        raise UserError(main.said(error, arguments)) from error
    return found.config


def use(config, key):
    """Checks it as main does, and builds what a step is made of, abstractly."""
    settings.check(config)
    parts = {
        "audio": Audio(sample_rate=config.data.sample_rate),
        "labels": Transcript(CharacterTokenizer("abc "), "labels"),
    }
    task = experiment.make_task(config, parts)
    make_adversary(config)
    if key.partition(".")[0] in TRACED:
        fields = parts["audio"].fields | parts["labels"].fields
        bucket = Bucket(8, (("samples", 32_000), ("labels", 8)))
        mesh = sharding.make_mesh(**config.mesh)
        make_setup(config, task, fields, mesh, bucket)


def base(root):
    config = runs.tiny_config(root)
    config.features.normalize = "utterance"
    return config


def test_any_value_of_any_key_is_used_or_refused_by_name(tmp_path, monkeypatch):
    keys = sorted({*flat(json.loads(base(tmp_path).to_json())), *OPEN})
    rng, used, wrong = random.Random(0), 0, []
    for number in range(240):
        key, by_hand = rng.choice(keys), number % 3 == 0
        value = rng.choice(TYPED if by_hand else VALUES)
        try:
            config = base(tmp_path)
            if by_hand:
                config = typed(config, key, value, monkeypatch)
            else:
                put(config, key, value)
            use(config, key)
            used += 1
        except UserError as error:
            name = key.rpartition(".")[2]
            if "\n" in str(error) or name not in str(error):
                wrong.append(f"{key}={value!r:.60}: {error}")
        except Exception as error:
            wrong.append(f"{key}={value!r:.60}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)
    assert used > 40


def checked(monkeypatch, given: str):
    """The configuration of a recipe and flags, read and checked as main does."""
    arguments = ["main", f"--config={runs.ROOT / 'configs' / 'quickstart.py'}"]
    arguments += [f"--config.{one}" for one in given.split()]
    found = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=found, lock_config=True)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(flags, "FLAGS", found)
    main._parse_flags(arguments)
    settings.check(found.config)
    return found.config


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("schedule.final=0.25", 0.25),
        ("schedule.name=exponential schedule.hold=3", 3),
        ("optimizer.eps=1e-7", 1e-7),
        ("optimizer.name=sgd optimizer.momentum=0.9", 0.9),
        ("optimizer.mu_dtype=bfloat16", "bfloat16"),
        ("parts.labels.tag=translation", "translation"),
        ("data.arguments.audio_key=sound", "sound"),
    ],
)
def test_flags_set_keys_that_a_recipe_has_not(monkeypatch, given, value):
    """A recipe replaces sections as a whole: what is chosen may take keys that it does not name."""
    key = given.split()[-1].partition("=")[0]
    assert config_path.get_value(key, checked(monkeypatch, given)) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("schedule.hold=3", r"unknown key of config\.schedule \(cosine\) 'hold'; known: peak"),
        ("schedule.final=x", r"config\.schedule\.final='x' must be a number"),
        ("optimizer.momentum=0.9", r"unknown key of config\.optimizer \(adamw\) 'momentum'"),
        ("optimizer.name=sgd optimizer.momentum=x", r"optimizer\.momentum='x' must be a number"),
        ("optimizer.mu_dtype=x", r"config\.optimizer\.mu_dtype='x': it must be one of"),
        ("parts.labls.tag=x", r"unknown part in config\.parts 'labls' \(did you mean 'labels'"),
        ("parts.labels.tga=x", r"unknown setting of config\.parts\.labels 'tga'"),
        ("parts.labels.source=x", r"unknown setting of config\.parts\.labels 'source'"),
        ("parts.labels=x", r"config\.parts\.labels='x' must be a section"),
        ("train.steps=ten", r"--config\.train\.steps=ten must be a whole number$"),
        ("schedule.peak=x", r"--config\.schedule\.peak=x must be a number$"),
        ("model.remat=perhaps", r"--config\.model\.remat=perhaps must be True or False$"),
        ("trian.steps=3", r"--config\.trian\.steps=3: there is no key 'trian'"),
        ("train.stepss=3", r"--config\.train\.stepss=3: there is no key 'stepss' \(did you"),
        ("features.high_hz=9000", r"config\.features\.high_hz=9000\.0 must be .* at most 8000"),
        ("features.hop_ms=0.01", r"config\.features\.hop_ms=0\.01 must be from a sample of config"),
        ("data.source=manifst", "did you mean 'manifest'?"),
    ],
)
def test_flags_that_cannot_be_are_one_line(monkeypatch, given, message):
    with pytest.raises((SystemExit, UserError), match=message) as raised:
        checked(monkeypatch, given)
    assert "\n" not in str(raised.value)
