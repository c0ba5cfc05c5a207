"""What single values of a configuration must be: their types, choices and ranges, by key."""

import dataclasses
import difflib
import math
from typing import Any

from ml_collections import ConfigDict

from speech_jax.data.sources import SOURCES
from speech_jax.data.text import NORMALIZERS
from speech_jax.decoding.decoder import Settings
from speech_jax.errors import UserError
from speech_jax.training.adversarial import NORMS, SPACES
from speech_jax.training.optim import OPTIMIZERS, SCHEDULES

# What a value must be, beside having the type of its default.
CHOICES = {
    "data.source": SOURCES,
    "data.on_error": ("raise", "skip"),
    "text.tokenizer": ("characters", "sentencepiece"),
    "text.normalizer": NORMALIZERS,
    "init.take": ("encoder", "model"),
    "features.normalize": ("utterance", "global", "none"),
    "robustness.space": SPACES,
    "robustness.norm": NORMS,
    "model.dtype": ("float32", "bfloat16"),
    "model.subsampling_kind": ("plane", "separable", "time"),
    "checkpoint.mode": ("", "min", "max"),
    "task.pooling": ("mean", "statistics", "attentive"),
    "task.activation": ("relu", "none"),
    "task.predictor": ("stateless", "recurrent"),
    "optimizer.name": OPTIMIZERS,
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "schedule.name": SCHEDULES,
}
# What is None by default, and a value of its type.
_LIKE = {
    "features.high_hz": 0.0,
    "adversarial.snr_db": 0.0,
    "model.attention_dropout": 0.0,
    "model.subsampling_channels": 0,
    "optimizer.momentum": 0.0,
    **{f"decoder.{field.name}": field.default for field in dataclasses.fields(Settings)},
}
_ABOVE_ZERO = ("must be greater than 0", lambda value: value > 0)
_FROM_ZERO = ("must be at least 0", lambda value: value >= 0)
_SHARE = ("must be in [0, 1]", lambda value: 0 <= value <= 1)
_SHARE_BELOW_ONE = ("must be in [0, 1)", lambda value: 0 <= value < 1)
_SEED = ("must be in [0, 2**31)", lambda value: 0 <= value < 2**31)
RANGES = {
    "seed": _SEED,
    **dict.fromkeys(
        (
            "data.sample_rate", "data.max_seconds", "data.batch_seconds", "data.buckets",
            "data.eval_buckets", "data.eval_max_seconds",
            "text.vocabulary_size", "features.mels", "features.window_ms",
            "features.hop_ms", "features.high_hz", "robustness.epsilons", "train.steps",
            "train.accumulate", "train.log_every", "train.eval_every", "checkpoint.every",
            "checkpoint.keep", "schedule.peak", "data.speeds", "model.width", "model.heads",
            "model.num_layers", "model.kernel", "model.expansion", "model.feed_forward",
            "model.conv_channels", "model.conv_kernels", "model.conv_strides", "model.conv_bands",
            "model.subsampling_channels", "model.position_groups", "model.cycle", "model.taps",
            "model.hop", "task.codes",
            "task.groups", "task.negatives", "task.mask_length", "task.scale", "task.cohort",
            "task.layers", "task.heads", "task.labels_per_frame",
            "task.context", "task.width", "task.most", "lora.alpha",
        ),
        _ABOVE_ZERO,
    ),
    **dict.fromkeys(
        (
            "data.train_minutes", "data.min_seconds", "data.threads", "features.low_hz",
            "features.floor", "spec_augment.start_step", "spec_augment.time_masks",
            "spec_augment.frequency_masks", "spec_augment.time_width", "spec_augment.time_warp",
            "spec_augment.frequency_width", "spec_augment.ramp", "data.short_first",
            "task.consistency", "task.consistency_warmup",
            "optimizer.clip_norm", "optimizer.weight_decay",
            "schedule.warmup", "schedule.hold", "train.max_skipped", "checkpoint.patience",
            "checkpoint.patience_epochs", "checkpoint.min_delta", "train.eval_epochs",
            "checkpoint.watchdog_seconds", "model.position_kernel", "model.feature_gradient",
            "model.lookahead", "model.context", "model.dense_before", "model.dense_after",
            "task.units", "task.balance", "task.margin", "task.durations",
            "task.sigma", "task.span",
            "task.warmup", "model.adapter", "lora.rank",
        ),
        _FROM_ZERO,
    ),
    **dict.fromkeys(
        (
            "data.noise_probability", "spec_augment.time_fraction", "features.preemphasis",
            "model.mask_time", "model.mask_channel", "task.mask_fraction", "task.mixup",
            "task.omega", "optimizer.eps", "optimizer.eps_root",
        ),
        _SHARE,
    ),
    **dict.fromkeys(
        (
            "train.ema_decay", "optimizer.b1", "optimizer.b2", "optimizer.momentum",
            "model.dropout", "model.attention_dropout", "model.input_dropout",
            "model.layer_drop", "task.feature_dropout", "task.dropout",
            "task.smoothing", "task.ctc_weight", "task.inter_ctc", "spec_augment.vocal_tract",
        ),
        _SHARE_BELOW_ONE,
    ),
}  # fmt: skip


def check_choices(config: ConfigDict) -> None:
    """Raises UserError for a name that is none of CHOICES."""
    for key, known in CHOICES.items():
        value = get(config, key)
        if value is not None and (not isinstance(value, str) or value not in known):
            near = difflib.get_close_matches(str(value), list(known), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"config.{key}={shown(value)}{hint}: it must be one of {', '.join(known)}"
            )


def check_ranges(config: ConfigDict) -> None:
    """Raises UserError for a number outside of RANGES, and for convolutions that do not match."""
    for key, (demand, fits) in RANGES.items():
        value = get(config, key)
        if value is None:
            continue
        several = value if isinstance(value, tuple | list) else (value,)
        if not all(is_number(each) for each in several):
            raise UserError(f"config.{key}={shown(value)} must hold numbers alone")
        if not all(map(fits, several)):
            raise UserError(f"config.{key}={shown(value)} {demand}")
    of_convolutions = {
        f"config.model.{key}": value
        for key, value in config.model.items()
        if key.startswith("conv_") and isinstance(value, tuple | list)
    }
    if len(set(map(len, of_convolutions.values()))) > 1:
        raise UserError(
            f"{', '.join(of_convolutions)} must be of equal length: a number for each convolution"
        )
    rate = config.data.sample_rate
    for key in ("window_ms", "hop_ms"):
        if not 500 <= config.features[key] * rate < 1e9:
            raise UserError(
                f"config.features.{key}={config.features[key]:g} must be from a sample of "
                f"config.data.sample_rate={rate} to a quarter of an hour: 25 and 10 are usual"
            )


def shown(value: Any) -> str:
    """A value in an error: on one line that is not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_number(value: Any) -> bool:
    """Whether it is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def check_type(value: Any, like: Any, name: str) -> None:
    """A value must be of its default's type; what is None by default may be anything finite."""
    if like is None and value is not None:
        like = _LIKE.get(name)
    if value is None or like is None:
        if like is not None:
            raise UserError(f"config.{name}=None must be {_KINDS.get(type(like), 'a value')}")
    elif isinstance(like, tuple | list):
        if not isinstance(value, tuple | list):
            raise UserError(
                f"config.{name}={shown(value)} must be a tuple, such as {tuple(like)!r}"
            )
    elif type(like) in _KINDS:
        wanted = (int, float) if type(like) is float else type(like)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(like, bool):
            raise UserError(f"config.{name}={shown(value)} must be {_KINDS[type(like)]}")
    for each in value if isinstance(value, tuple | list) else (value,):
        if isinstance(each, int) and not -(2**63) <= each < 2**63:
            raise UserError(f"config.{name}={shown(value)} must be of 64 bits")
        if isinstance(each, float) and not math.isfinite(each):
            raise UserError(f"config.{name}={shown(value)} must be finite")


def get(config: ConfigDict, key: str) -> Any:
    """The value of a key; None where the encoder, task or optimizer has no such setting."""
    section, _, name = key.rpartition(".")
    return (config[section] if section else config).get(name)
