"""Every setting of a run, with its default; recipes in configs/ change some of them.

Sections are keyword arguments of what they configure: `model` of the encoder, `optimizer` of the
optax optimizer, `schedule` of the schedule, and so on. A recipe replaces such a section as a whole;
the command line overrides single values (`--config.train.steps=1000`). The result is checked before
any work is done.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict, config_dict

from speech_jax import config_values as values
from speech_jax import models, registry, tasks
from speech_jax.data import parts
from speech_jax.decoding.decoder import Settings
from speech_jax.errors import UserError
from speech_jax.models import frontend
from speech_jax.ops import augment
from speech_jax.training import groups, peft
from speech_jax.training.adversarial import Adversary
from speech_jax.training.optim import OPTIMIZERS, SCHEDULES, make_optimizer

# Arguments of parts, schedules and optimizers that a run gives them, and nobody sets.
_GIVEN = (
    "source", "name", "moments", "known", "seed", "steps", "params", "schedule", "defaults",
    "on_error",
)  # fmt: skip
# Rules: pairs of a regular expression and a number, see rules.py.
_RULES = ("optimizer.decay", "optimizer.rates", "optimizer.frozen")


def default() -> ConfigDict:
    """The settings that recipes start from."""
    config = ConfigDict()
    config.seed = 0

    config.data = data = ConfigDict()
    data.source = "librispeech"  # or another of data/sources/
    data.root = ""  # the folder that holds the splits
    # For what is derived from the data, and compiled programs; empty: ~/.cache/speech_jax.
    data.cache = ""
    data.train_splits = ""  # names joined by commas; NAME.jsonl is a manifest beside any source
    data.only = ""  # utterances with these tags alone, of every split: "speaker=84", "speaker!=84"
    data.train_minutes = 0.0  # of the training splits, drawn with the seed; 0: all of them
    data.eval_splits = ""  # evaluated while training; the first one picks the best checkpoint
    data.test_splits = ""  # evaluated once, at the end, with the best checkpoint
    # Of portions of a split, such as train[:80%] and train[80%:]: a tag of which each value is in
    # all portions, and one of which each value is in one.
    data.portion_within = ""
    data.portion_together = ""
    # Further arguments of the source, see its open_split; None: its own default.
    data.arguments = arguments = ConfigDict()
    arguments.text_key = config_dict.placeholder(str)  # manifest, parquet: where the transcript is
    arguments.trust_durations = config_dict.placeholder(bool)  # manifest: stated ones, unread
    arguments.audio_key = config_dict.placeholder(str)  # parquet: where the audio is
    arguments.download = config_dict.placeholder(bool)  # librispeech: where a split is absent
    arguments.utterances = config_dict.placeholder(int)  # synthetic: how many
    arguments.seed = config_dict.placeholder(int)  # synthetic
    arguments.processes = config_dict.placeholder(int)  # synthetic
    arguments.language = config_dict.placeholder(str)  # synthetic: what is spoken
    arguments.translation = config_dict.placeholder(str)  # synthetic: what it is translated into
    data.on_error = "skip"  # utterances that cannot be used: 'skip' (counted, named) or 'raise'
    data.sample_rate = 16_000
    data.min_seconds = 0.1
    data.max_seconds = 20.0  # longer training utterances are left out, or cropped if unlabelled
    data.batch_seconds = 120.0  # audio in a global batch, padding included
    data.buckets = 6  # batch shapes, each compiled once
    data.eval_buckets = 3
    data.eval_max_seconds = 120.0  # longer utterances of evaluation splits are refused by name
    data.speeds = (1.0,)  # speed perturbation: (0.9, 1.0, 1.1)
    data.short_first = 0  # epochs at first, in which batches come in order of their bucket
    data.noise_root = ""  # a folder of noise to add; empty: none
    data.noise_probability = 0.5
    data.noise_snr_db = (0.0, 30.0)
    data.cache_hidden = False  # of a frozen encoder: hidden states are computed once and kept
    data.threads = 4  # batches loaded at the same time

    config.text = text = ConfigDict()
    text.tokenizer = "characters"  # or sentencepiece, trained on the training transcripts
    text.normalizer = "words"  # keeps the letters of every script; english drops accents
    text.vocabulary_size = 1024  # of sentencepiece, the blank included

    config.features = features = ConfigDict()
    features.mels = 80
    features.low_hz = 20.0
    features.high_hz = config_dict.placeholder(float)  # None: half the sample rate
    features.window_ms = 25.0
    features.hop_ms = 10.0
    features.preemphasis = 0.97
    features.floor = 0.0  # energy added before the logarithm: what is quieter hardly shows
    features.normalize = "utterance"  # utterance, global (of the training set) or none

    config.spec_augment = ConfigDict(augment.POLICIES["conformer"])  # see ops/augment.py
    config.spec_augment.start_step = 0
    config.spec_augment.ramp = 0  # updates from there on over which the masks grow to their widths
    config.spec_augment.vocal_tract = 0.0  # frequencies are stretched by 1 +- this; 0.1 is usual

    config.task = ConfigDict(tasks.settings("recognize"))  # or another of tasks/
    config.parts = ConfigDict()  # settings of single parts of a batch: parts.target.tag = "speaker"

    config.model = models.settings("conformer", "s")

    config.source = ""  # what a model was imported from, in the words of its own folder

    config.init = ConfigDict()
    config.init.folder = ""  # what to start from: a workdir, a saved model, or of Hugging Face
    config.init.take = "encoder"  # or model: of the same task, with its head and vocabulary
    config.init.new = ()  # ends of the paths of parameters that begin anew, whatever is there

    config.lora = ConfigDict()  # a change of low rank beside a frozen encoder, see training/peft.py
    config.lora.rank = 0  # 0: none
    config.lora.alpha = 16.0  # the change counts alpha / rank times
    config.lora.targets = peft.LoRA.targets  # the end of the paths of the kernels that get one

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adam, adamw, lion, nadamw or sgd
    config.optimizer.clip_norm = 1.0  # 0: off
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 1e-3  # decoupled; of adam and sgd in the gradient (L2)
    # Rules for the ends of parameters' paths, see rules.py; the first that matches holds.
    config.optimizer.decay = ((groups.NO_DECAY, 0.0),)  # what multiplies weight_decay
    config.optimizer.rates = ()  # what multiplies the learning rate
    config.optimizer.layer_decay = 1.0  # of the learning rate, from a layer to the one below it
    config.optimizer.frozen = ()  # updates for which a parameter stands still; -1: for ever

    config.schedule = ConfigDict()
    config.schedule.name = "noam"  # constant, cosine, exponential, noam, polynomial, tri_stage
    config.schedule.peak = 1e-3
    config.schedule.warmup = 10_000

    config.adversarial = adversarial = ConfigDict()  # see training/adversarial.py: Adversary
    adversarial.method = "none"  # none, fgsm, pgd or vat
    adversarial.space = "waveform"  # or features: log-mel in nats, before normalization
    adversarial.norm = "linf"  # or l2: root mean square over an utterance
    adversarial.epsilon = 0.001  # the bound, in the waveform as a fraction of full scale
    adversarial.snr_db = config_dict.placeholder(float)  # the bound in decibels, not epsilon
    adversarial.alpha = 0.5  # (1 - alpha) clean + alpha adversarial loss
    adversarial.steps = 3  # ascents of pgd and vat
    adversarial.step_size = 0.0  # of an ascent, as a fraction of epsilon; 0: the method's usual
    adversarial.random_start = False
    adversarial.warmup = 0  # steps over which epsilon rises from 0
    adversarial.every = 1  # only every so many steps are adversarial
    adversarial.same_masks = True  # dropout and SpecAugment as in the clean pass
    adversarial.statistics = "clean"  # batch norm learns from: clean, adversarial or both
    adversarial.int16 = False  # perturbations are whole steps of int16

    config.robustness = robustness = ConfigDict()  # what --mode=robustness measures
    robustness.space = "waveform"
    robustness.norm = "linf"
    robustness.epsilons = (0.0001, 0.0003, 0.001, 0.002, 0.003, 0.005, 0.01)
    robustness.noise_root = ""  # a folder of noise; empty: white noise
    robustness.noise_snr_db = (20.0, 10.0, 5.0, 0.0)

    # How logits become words: fields of Settings in decoding/decoder.py. None: what the model's
    # own record says, or else the default there; of the name that of the task.
    config.decoder = decoder = ConfigDict()
    # Of CTC greedy, beam or lexicon; of the task attend also attention, joint or rescore; of the
    # task transduce also transducer or transducer_beam.
    decoder.name = config_dict.placeholder(str)
    decoder.width = config_dict.placeholder(int)  # hypotheses of a beam
    decoder.labels = config_dict.placeholder(int)  # of a frame, that a hypothesis is extended by
    decoder.skip = config_dict.placeholder(float)  # frames whose blank is more probable; 1: none
    decoder.nbest = config_dict.placeholder(int)  # readings that are given
    decoder.lm = config_dict.placeholder(str)  # an .arpa, see python -m speech_jax.decoding.lm
    decoder.lm_weight = config_dict.placeholder(float)  # found by --mode=tune, as is the bonus
    decoder.bonus = config_dict.placeholder(float)  # nats for each label (beam) or word (lexicon)
    decoder.lexicon = config_dict.placeholder(str)  # a file of words; empty: those of the .arpa
    decoder.ctc_weight = config_dict.placeholder(float)  # of joint and rescore
    decoder.length_penalty = config_dict.placeholder(float)  # of attention and joint
    decoder.calibration = config_dict.placeholder(tuple)  # of confidences, by --mode=tune too

    config.train = train = ConfigDict()
    train.steps = 100_000
    train.accumulate = 1  # micro-batches that a batch is worked through in
    train.ema_decay = 0.0  # of the averaged parameters that are evaluated; 0: off
    train.log_every = 50
    train.eval_every = 2_000
    train.eval_epochs = 0.0  # epochs from one evaluation to the next; 0: eval_every says when
    train.compare = False  # the start, and its head fitted alone, are measured on the test too
    train.max_skipped = 100  # non-finite updates in all before the run stops

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 2_000
    checkpoint.keep = 3
    checkpoint.metric = ""  # what picks the best checkpoint; empty: what the task says
    checkpoint.mode = ""  # of that metric: 'min' or 'max'
    checkpoint.patience = 0  # evaluations without a better one before the run stops; 0: never
    checkpoint.patience_epochs = 0.0  # epochs without a better one, likewise
    checkpoint.min_delta = 0.0  # by which a better one is better at least
    checkpoint.watchdog_seconds = 0.0  # a step that takes longer ends the process; 0: off

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # -1: the devices that the other axes leave
    mesh.fsdp = 1
    mesh.tensor = 1
    return config.lock()


def choose_task(
    config: ConfigDict, argument: str, known: Mapping[str, tuple[Mapping, Mapping]]
) -> str:
    """The encoder of a recipe's argument, "ENCODER" or "ENCODER+TASK"; sets the task in `config`.

    Args:
      known: the recipe's tasks, `recognize` among them, which it is without one: each is a section
        `task`, and what the section `decoder` has beside its defaults.
    """
    encoder, _, name = argument.partition("+")
    task, decoder = registry.lookup("task of this recipe", known, name or "recognize")
    config.task = dict(task)
    config.decoder.update(decoder)
    return encoder


def completed(recorded: Mapping[str, Any], where: str) -> ConfigDict:
    """A configuration that was recorded in the file `where`, whole.

    A setting that the record lacks, because it is older than the setting, has its default; one that
    is unknown here is left out with a warning.

    Raises:
      UserError: the record is not that of a configuration.
    """
    config = default().unlock()
    try:
        recorded = renamed(recorded)
        if "model" in recorded:
            config.model = models.defaults(recorded["model"]["name"])
        if "task" in recorded:
            name = recorded["task"]["name"]
            # Of a task that is unknown here, a model can be started from, and exported.
            config.task = (
                tasks.settings(name) if name in tasks.TASKS else ConfigDict(recorded["task"])
            )
        for name in ("optimizer", "schedule", "parts"):
            if name in recorded:
                config[name] = ConfigDict()
        _merge(config, recorded, "", where)
        values.check_ranges(config)
        models.make_encoder(**config.model).output_lengths(1 << 20)  # its geometry
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} holds a configuration that cannot be used ({error}): bring it back"
        ) from error
    return config.lock()


# What had another name when a record was written: keys, and the values of a key.
_RENAMED_KEYS = {
    "model.features": "model.width",
    "task.beam": "decoder.width",
    "task.length_penalty": "decoder.length_penalty",
}
_RENAMED_VALUES = {
    "task.name": {"asr": "recognize"},
    "text.normalizer": {"librispeech": "english"},
}

# Settings that are gone, with the value that says what is done now in any case.
_GONE = {"optimizer.no_decay": "(bias|scale)$"}


def renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with today's names; what had no other name, and what is damaged, is as it was."""
    record = {key: dict(v) if isinstance(v, Mapping) else v for key, v in record.items()}

    def found(name: str) -> tuple[dict[str, Any], str]:
        section, _, key = name.partition(".")
        return (record[section] if isinstance(record.get(section), dict) else {}), key

    for old, new in _RENAMED_KEYS.items():
        (section, key), (other, name) = found(old), found(new)
        if key in section:
            value = section.pop(key)
            if other.get(name) is None:
                other[name] = value
    for name, value in _GONE.items():
        section, key = found(name)
        if section.get(key) == value:
            del section[key]
    for name, today in _RENAMED_VALUES.items():
        section, key = found(name)
        if isinstance(section.get(key), str):
            section[key] = today.get(section[key], section[key])
    return record


def _merge(config: ConfigDict, recorded: Mapping[str, Any], prefix: str, where: str) -> None:
    for key, value in recorded.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(config.get(key), ConfigDict):
            _merge(config[key], value, f"{name}.", where)
        elif key in config or name.startswith(_OPEN) or not prefix:
            value = tuple(value) if isinstance(value, list) else value
            if isinstance(like := config.get(key), ConfigDict):
                raise UserError(f"config.{name}={values.shown(value)} must be a section")
            if key in config:
                values.check_type(value, like, name)
            with config.ignore_type():
                config[key] = ConfigDict(value) if isinstance(value, Mapping) else value
        else:
            logging.warning("%s: the setting %s is unknown here and is left out", where, name)


def make_room(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Adds what flags set in the open sections, whose keys a recipe need not have, as None.

    What is None and has no type gets that of any value.

    `check` says whether what is configured takes such a key.
    """
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("-").removeprefix("config.")
        names, section = key.split("."), config
        for name in names if all(map(str.isidentifier, names)) else ():
            if not isinstance(section, ConfigDict):
                break  # a key below a value, which is refused
            last, there = name is names[-1], name in section
            if not there and not key.startswith(_OPEN):
                break
            if not there or (last and section.get_type(name) is type(None)):
                added = config_dict.placeholder(object) if last else ConfigDict()
                with section.unlocked(), section.ignore_type():
                    section[name] = added
            section = section[name]


def split_names(value: str) -> list[str]:
    """'a, b' to ['a', 'b']."""
    return [name.strip() for name in value.split(",") if name.strip()]


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that cannot work, naming its key."""
    _check_keys(config, _reference(config), "")
    values.check_choices(config)
    _check_keywords(config)
    values.check_ranges(config)
    for key in _RULES:
        for rule in values.get(config, key) or ():
            pair = isinstance(rule, tuple | list) and len(rule) == 2
            if not pair or not isinstance(rule[0], str) or not values.is_number(rule[1]):
                raise UserError(
                    f"config.{key} holds {values.shown(rule)}, which is not a rule: a rule is the "
                    "end of a parameter's path and a number, such as ('encoder/.*', 0.5)"
                )
    for key, patterns in (("init.new", config.init.new), ("lora.targets", [config.lora.targets])):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(
                    f"config.{key}: {values.shown(pattern)} is not a regular expression ({error})"
                ) from error
    data = config.data
    if data.batch_seconds < data.max_seconds:
        raise UserError(
            f"config.data.batch_seconds={data.batch_seconds:g} is less than "
            f"config.data.max_seconds={data.max_seconds:g}: a batch must hold an utterance"
        )
    if data.min_seconds > data.max_seconds:
        raise UserError(
            f"config.data.min_seconds={data.min_seconds:g} is more than "
            f"config.data.max_seconds={data.max_seconds:g}: no utterance is left"
        )
    if config.features.window_ms > 1000 * data.max_seconds:
        raise UserError(
            f"config.features.window_ms={config.features.window_ms:g} is longer than any utterance "
            f"(config.data.max_seconds={data.max_seconds:g}): 25 is usual"
        )
    low, high = config.features.low_hz, config.features.high_hz
    if not low < (high or data.sample_rate / 2) <= data.sample_rate / 2:
        raise UserError(
            f"config.features.high_hz={high} must be above config.features.low_hz={low:g} and at "
            f"most {data.sample_rate / 2:g}, half of config.data.sample_rate"
        )
    if 1.0 not in data.speeds:
        raise UserError(f"config.data.speeds={data.speeds} must hold 1.0")
    if len(data.noise_snr_db) != 2 or data.noise_snr_db[0] > data.noise_snr_db[1]:
        raise UserError(
            f"config.data.noise_snr_db={data.noise_snr_db} must be two ratios in dB, the lower "
            "one first"
        )
    if bool(config.checkpoint.metric) != bool(config.checkpoint.mode):
        raise UserError(
            f"config.checkpoint.metric={config.checkpoint.metric!r} and "
            f"config.checkpoint.mode={config.checkpoint.mode!r} must both be set, or neither"
        )
    Adversary(**config.adversarial)
    changed = _changed(config)
    listens = models.listens(config.model.name)
    of_log_mel = config.task.name == "best_rq" or config.task.get("mel", False)
    augments = getattr(tasks.constructor(config.task.name), "augments", True)
    # A recipe for several encoders may say more than one of them heeds.
    for name, why in frontend.unused(listens, changed, of_log_mel, augments).items():
        logging.warning("config.%s=%r does nothing, %s", name, changed[name], why)
    Settings.of(config.decoder).check_files()


def _changed(config: ConfigDict) -> dict[str, Any]:
    """The settings of the front end that are not the defaults, by name."""
    reference = default()
    return {
        f"{section}.{key}": value
        for section in ("features", "spec_augment")
        for key, value in config[section].items()
        if value != reference[section].get(key)
    }


def _reference(config: ConfigDict) -> ConfigDict:
    """The defaults, with the settings of the encoder and the task that `config` names."""
    reference = default().unlock()
    for section, defaults_of in (("model", models.defaults), ("task", tasks.settings)):
        name = config[section].get("name")
        if not isinstance(name, str):
            raise UserError(
                f"config.{section}.name={values.shown(name)} must be a name: say which {section}"
            )
        try:
            reference[section] = ConfigDict(defaults_of(name))
        except UserError as error:
            raise UserError(f"config.{section}.name: {error}") from error
    return reference


# Sections whose keys are those of what they configure, which are not listed here.
_OPEN = ("optimizer.", "schedule.", "data.arguments.", "parts.")
# Sections that are some constructor's keyword arguments: it checks their keys itself.
_FREE = ("optimizer", "schedule", "data.arguments", "parts")


def _check_keys(config: ConfigDict, reference: ConfigDict, prefix: str) -> None:
    """Checks that the keys are known and that values have the types of their defaults."""
    for key in config:
        name = f"{prefix}{key}"
        if key not in reference:
            near = difflib.get_close_matches(key, list(reference), n=1)
            hint = f" (did you mean {prefix}{near[0]}?)" if near else ""
            raise UserError(f"unknown key config.{name}{hint}")
        value, like = config[key], reference[key]
        if name in _FREE:
            _check_free(value, reference.get(key), name)
        elif isinstance(like, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UserError(
                    f"config.{name}={values.shown(value)} must be a section: give single keys of it"
                )
            _check_keys(value, like, f"{name}.")
        else:
            values.check_type(value, like, name)


def _check_keywords(config: ConfigDict) -> None:
    """Checks the sections that are keyword arguments: of parts, the schedule and the optimizer."""
    kinds = tasks.constructor(config.task.name).parts
    for name, section in config.parts.items():
        make = parts.constructor(registry.lookup("part in config.parts", kinds, name)).make
        known = _keywords(make)
        _check_free(section, ConfigDict(known), f"parts.{name}")
        for key in section:
            registry.lookup(f"setting of config.parts.{name}", known, key)
    optimizer = _keywords(make_optimizer) | _keywords(OPTIMIZERS[config.optimizer.name])
    schedule = _keywords(SCHEDULES[config.schedule.name])
    for name, known in (("optimizer", optimizer), ("schedule", schedule)):
        usual = default()[name]
        for key, value in config[name].items():
            if key in known:
                values.check_type(value, usual.get(key, known[key]), f"{name}.{key}")
            elif key != "name" and value != usual.get(key):
                registry.lookup(f"key of config.{name} ({config[name].name})", known, key)


def _keywords(function: Callable) -> dict[str, Any]:
    """The settings among a function's arguments, with their defaults; None where there is none."""
    empty, variadic = inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD
    return {
        key: None if parameter.default is empty else parameter.default
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in _GIVEN and parameter.kind is not variadic
    }


def _check_free(section: Any, like: ConfigDict, name: str) -> None:
    if not isinstance(section, ConfigDict):
        raise UserError(
            f"config.{name}={values.shown(section)} must be a section: give single keys of it"
        )
    for key, value in section.items():
        if not isinstance(value, ConfigDict):
            values.check_type(value, like.get(key, value), f"{name}.{key}")
