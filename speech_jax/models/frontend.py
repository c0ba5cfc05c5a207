"""From a batch's PCM to the inputs of an encoder; training, evaluation and export share it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.ops import augment, features, masking


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """Waveform or normalized log-mel, with SpecAugment in training.

    Attributes:
      listens: 'log_mel' or 'waveform', as the encoder says.
      log_mel: keyword arguments of ops.features.log_mel.
      normalize: 'utterance' (its own mean and variance), 'global' (`mean` and `std` [mels] of the
        training set) or 'none'.
      spec_augment: keyword arguments of ops.augment.spec_augment; None turns it off.
      spec_augment_start: the first step that is augmented.
      spec_augment_ramp: steps from there on over which the masks grow to their widths.
      vocal_tract: v, for frequencies that are stretched in training by a factor between 1 - v and
        1 + v, drawn for each utterance (augment.vocal_tract); 0.0 turns it off.
    """

    listens: str
    log_mel: Mapping[str, float]
    normalize: str = "utterance"
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    spec_augment: Mapping[str, float] | None = None
    spec_augment_start: int = 0
    spec_augment_ramp: int = 0
    vocal_tract: float = 0.0

    def __post_init__(self) -> None:
        if self.normalize not in ("utterance", "global", "none"):
            raise UserError(
                f"config.features.normalize={self.normalize!r} must be 'utterance', 'global' or "
                "'none'"
            )
        if (self.listens, self.normalize) == ("waveform", "global"):
            raise UserError(
                "config.features.normalize='global' needs log-mel, and this encoder listens to "
                "the waveform: use 'utterance' or 'none'"
            )
        if self.mean is not None and len(self.mean) != self.log_mel["mels"]:
            raise UserError(
                f"features.json has the mean of {len(self.mean)} bands, and "
                f"config.features.mels={self.log_mel['mels']}: they must be of the same features"
            )

    @property
    def varies(self) -> bool:
        """Whether two views of an utterance may differ in training."""
        hides = self.spec_augment or {}
        names = "time_masks", "frequency_masks"
        return self.listens == "log_mel" and any(hides.get(name) for name in names)

    def lengths(self, samples: int | np.ndarray | jax.Array) -> int | np.ndarray | jax.Array:
        """Frames (or samples, for an encoder of waveforms) that come out for `samples`."""
        if self.listens == "waveform":
            return samples
        rate = self.log_mel["sample_rate"]
        window_ms, hop_ms = self.log_mel["window_ms"], self.log_mel["hop_ms"]
        return features.frame_count(samples, *features.frame_geometry(rate, window_ms, hop_ms))

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
        views: int = 1,
    ) -> tuple[jax.Array, jax.Array]:
        """Inputs ([B, T] or [B, F, mels], float32) and lengths, augmented if there is a key.

        With `views`, so many of each row come one behind the other, with masks of their own.
        """
        if self.listens == "waveform":
            waveform, lengths = features.to_waveform(batch["audio"]), batch["audio_length"]
            return _viewed(self._normalize_waveform(waveform, lengths), lengths, views)
        inputs, lengths = self.features(batch)
        if rng is not None and self.vocal_tract:
            rng, key = jax.random.split(rng)
            names = ("mels", "sample_rate", "low_hz", "high_hz")
            bands = {name: self.log_mel[name] for name in names if name in self.log_mel}
            inputs = augment.vocal_tract(key, inputs, self.vocal_tract, **bands)
        if self.normalize != "none":
            inputs = features.normalize(inputs, lengths, self.mean, self.std)
        viewed = _viewed(inputs, lengths, views)
        if rng is None or not self.spec_augment:
            return viewed
        extent = None
        if self.spec_augment_ramp:
            gone = (step - self.spec_augment_start) / self.spec_augment_ramp
            extent = jnp.clip(gone, 0.0, 1.0)
        augmented = augment.spec_augment(
            rng, inputs, lengths, **self.spec_augment, views=views, extent=extent
        )
        return jnp.where(step >= self.spec_augment_start, augmented, viewed[0]), viewed[1]

    def features(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Log-mel [B, F, mels] before normalization, and frames; a batch may bring `features`."""
        if "features" in batch:
            return batch["features"], self.lengths(batch["audio_length"])
        waveform = features.to_waveform(batch["audio"])
        return features.log_mel(waveform, batch["audio_length"], **self.log_mel)

    def _normalize_waveform(self, waveform: jax.Array, lengths: jax.Array) -> jax.Array:
        if self.normalize == "none":
            return waveform
        valid = masking.length_mask(lengths, waveform.shape[1])
        mean, variance = masking.masked_mean_and_variance(waveform, valid, axes=(1,))
        return jnp.where(valid, (waveform - mean) * jax.lax.rsqrt(variance + 1e-7), 0.0)


def _viewed(inputs: jax.Array, lengths: jax.Array, views: int) -> tuple[jax.Array, jax.Array]:
    if views == 1:
        return inputs, lengths
    # Of a row, one behind the other: so they stay on its device.
    return jnp.repeat(inputs, views, axis=0), jnp.repeat(lengths, views, axis=0)


def unused(
    listens: str,
    changed: Mapping[str, Any],
    log_mel_targets: bool = False,
    augments: bool = True,
) -> dict[str, str]:
    """Settings of `features` and `spec_augment` that do nothing, each with what does it instead.

    Args:
      listens: as of FrontEnd.
      changed: the settings that somebody chose, by name: {"spec_augment.time_masks": 2}.
      log_mel_targets: whether the task computes log-mel whatever the encoder listens to (BEST-RQ).
      augments: whether the task changes its inputs in training.
    """
    found, of_waveform = {}, "for the encoder listens to the waveform: "
    for name in changed:
        section, _, key = name.partition(".")
        if section == "spec_augment" and not augments:
            found[name] = "for this task hides what it predicts by itself: leave it out"
        elif listens == "waveform" and section == "spec_augment":
            masks = "mask with config.model.mask_time and mask_channel"
            found[name] = of_waveform + ("leave it out" if key == "vocal_tract" else masks)
        elif (listens, section) != ("waveform", "features") or key == "normalize":
            continue
        elif not log_mel_targets:
            found[name] = of_waveform + "leave it out"
    return found
