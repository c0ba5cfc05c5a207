"""Every setting of a run, with its default; recipes in configs/ change some of them.

Sections are keyword arguments of what they configure: `model` of the encoder, `optimizer` of the
optax optimizer, `schedule` of the schedule, and so on. A recipe replaces such a section as a whole;
the command line overrides single values (`--config.train.steps=1000`). The result is checked before
any work is done.
"""

import difflib

from ml_collections import ConfigDict, config_dict

from speech_jax import models, tasks
from speech_jax.errors import UserError
from speech_jax.ops import augment
from speech_jax.training import groups
from speech_jax.training.adversarial import NORMS, SPACES, Adversary

MODES = {
    "data.source": ("librispeech", "manifest", "prepared", "synthetic"),
    "data.on_error": ("raise", "skip"),
    "text.tokenizer": ("characters", "sentencepiece"),
    "features.normalize": ("utterance", "global", "none"),
    "robustness.space": SPACES,
    "robustness.norm": NORMS,
}


def default() -> ConfigDict:
    """The settings that recipes start from."""
    config = ConfigDict()
    config.seed = 0

    config.data = data = ConfigDict()
    data.source = "librispeech"  # librispeech, manifest, prepared or synthetic
    data.root = ""  # the folder that holds the splits
    data.cache = ""  # for what is derived from the data; empty: ~/.cache/speech_jax
    data.train_splits = ""  # names joined by commas
    data.train_minutes = 0.0  # of the training splits, drawn with the seed; 0: all of them
    data.eval_splits = ""  # scored while training; the first one picks the best checkpoint
    data.test_splits = ""  # scored once, at the end, with the best checkpoint
    data.arguments = ConfigDict()  # further arguments of the source
    data.on_error = "skip"  # utterances that cannot be used: 'skip' (counted, named) or 'raise'
    data.sample_rate = 16_000
    data.min_seconds = 0.1
    data.max_seconds = 20.0  # longer training utterances are left out, or cropped if unlabelled
    data.batch_seconds = 120.0  # audio in a global batch, padding included
    data.buckets = 6  # batch shapes, each compiled once
    data.eval_buckets = 3
    data.speeds = (1.0,)  # speed perturbation: (0.9, 1.0, 1.1)
    data.noise_root = ""  # a folder of noise to add; empty: none
    data.noise_probability = 0.5
    data.noise_snr_db = (0.0, 30.0)
    data.threads = 4  # batches loaded at the same time

    config.text = text = ConfigDict()
    text.tokenizer = "characters"  # or sentencepiece, trained on the training transcripts
    text.normalizer = "librispeech"
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

    config.task = ConfigDict(tasks.settings("asr"))  # asr, contrastive or best_rq: see tasks/

    config.model = models.settings("conformer", "s")

    config.init = ConfigDict()
    config.init.folder = ""  # pretrained weights of the encoder: a workdir, or of Hugging Face

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

    config.train = train = ConfigDict()
    train.steps = 100_000
    train.accumulate = 1  # micro-batches that a batch is worked through in
    train.ema_decay = 0.0  # of the averaged parameters that are evaluated; 0: off
    train.log_every = 50
    train.eval_every = 2_000
    train.max_skipped = 100  # non-finite updates in all before the run stops

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 2_000
    checkpoint.keep = 3
    checkpoint.patience = 0  # evaluations without a better one before the run stops; 0: never
    checkpoint.watchdog_seconds = 0.0  # a step that takes longer ends the process; 0: off

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # -1: the devices that the other axes leave
    mesh.fsdp = 1
    mesh.tensor = 1
    return config.lock()


def split_names(value: str) -> list[str]:
    """'a, b' to ['a', 'b']."""
    return [name.strip() for name in value.split(",") if name.strip()]


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that cannot work, naming its key."""
    _check_keys(config, default(), "")
    for key, known in MODES.items():
        if _get(config, key) not in known:
            near = difflib.get_close_matches(str(_get(config, key)), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"config.{key}={_get(config, key)!r}{hint}: it must be one of {', '.join(known)}"
            )
    positive = (
        "data.sample_rate data.max_seconds data.batch_seconds data.buckets data.eval_buckets "
        "text.vocabulary_size train.steps train.accumulate train.log_every train.eval_every "
        "checkpoint.every checkpoint.keep schedule.peak"
    )
    for key in positive.split():
        if not _get(config, key) > 0:
            raise UserError(f"config.{key}={_get(config, key)!r} must be greater than 0")
    if config.data.train_minutes < 0:
        raise UserError(
            f"config.data.train_minutes={config.data.train_minutes} must not be negative"
        )
    if not 0 <= config.train.ema_decay < 1:
        raise UserError(f"config.train.ema_decay={config.train.ema_decay} must be in [0, 1)")
    if config.data.batch_seconds < config.data.max_seconds:
        raise UserError(
            f"config.data.batch_seconds={config.data.batch_seconds:g} is less than "
            f"config.data.max_seconds={config.data.max_seconds:g}: a batch must hold an utterance"
        )
    Adversary(**config.adversarial)
    if any(speed <= 0 for speed in config.data.speeds) or 1.0 not in config.data.speeds:
        raise UserError(f"config.data.speeds={config.data.speeds} must be positive and hold 1.0")


# Sections that are some constructor's keyword arguments: it checks their keys itself.
_FREE = ("task", "model", "optimizer", "schedule", "data.arguments")


def _check_keys(config, reference, prefix):
    for key in config:
        name = f"{prefix}{key}"
        if key not in reference:
            near = difflib.get_close_matches(key, list(reference), n=1)
            hint = f" (did you mean {prefix}{near[0]}?)" if near else ""
            raise UserError(f"unknown key config.{name}{hint}")
        if isinstance(reference[key], ConfigDict) and name not in _FREE:
            _check_keys(config[key], reference[key], f"{name}.")


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config
