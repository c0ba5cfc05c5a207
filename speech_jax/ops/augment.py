"""Augmentation in the step.

SpecAugment (Park et al. 2019, 2020): masks and a warp on normalized features. Mixup (Zhang et al.
2018): two utterances at once, for recognition as in MixSpeech (Meng et al. 2021). Vocal tract
length perturbation (Jaitly and Hinton 2013): the same words by another speaker.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.ops import features as feature_ops
from speech_jax.ops import masking

# The settings of config.spec_augment that change inputs; where all of them are 0, nothing does.
CHANGES = ("time_masks", "frequency_masks", "time_warp", "vocal_tract")

# LB, LD, SM, SS of Park et al. 2019, table 1; the Conformer's of Gulati et al. 2020.
POLICIES = {
    "librispeech_basic": {
        "time_warp": 80, "frequency_masks": 1, "frequency_width": 27,
        "time_masks": 1, "time_width": 100, "time_fraction": 1.0,
    },
    "librispeech_double": {
        "time_warp": 80, "frequency_masks": 2, "frequency_width": 27,
        "time_masks": 2, "time_width": 100, "time_fraction": 1.0,
    },
    "switchboard_mild": {
        "time_warp": 40, "frequency_masks": 2, "frequency_width": 15,
        "time_masks": 2, "time_width": 70, "time_fraction": 0.2,
    },
    "switchboard_strong": {
        "time_warp": 40, "frequency_masks": 2, "frequency_width": 27,
        "time_masks": 2, "time_width": 70, "time_fraction": 0.2,
    },
    "conformer": {
        "time_warp": 0, "frequency_masks": 2, "frequency_width": 27,
        "time_masks": 10, "time_width": 100_000, "time_fraction": 0.05,
    },
}  # fmt: skip


def mixup(
    rng: jax.Array, batch: Mapping[str, jax.Array], fraction: float
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Mixes a `fraction` of the rows of a batch, each with the row before it.

    A mixed row is share * its own waveform + (1 - share) * the other one's, with a share of
    Beta(1/2, 1/2). Of the loss, the own label counts `share`, and the other one the rest.

    Returns:
      The mixed batch, and the mixed batch with the labels of the others. The weights of a row in
      the two say how much either label counts; waveforms are float32, full scale is 1.
    """
    rows = batch["weight"].shape[0]
    chosen, drawn = jax.random.uniform(rng, (2, rows))
    share = jnp.square(jnp.sin(jnp.pi / 2 * drawn))
    other = {name: jnp.roll(value, 1, axis=0) for name, value in batch.items()}
    share = jnp.where((chosen < fraction) & (other["weight"] > 0), share, 1.0)
    mixed = {"audio_length": jnp.maximum(batch["audio_length"], other["audio_length"])}
    mixed["audio_length"] = jnp.where(share < 1, mixed["audio_length"], batch["audio_length"])
    for name in batch.keys() & {"audio", "features"}:
        own, second = batch[name], other[name]
        if name == "audio":
            own, second = feature_ops.to_waveform(own), feature_ops.to_waveform(second)
        each = share.reshape(rows, *[1] * (own.ndim - 1))
        mixed[name] = each * own + (1 - each) * second
    return (
        {**batch, **mixed, "weight": batch["weight"] * share},
        {**other, **mixed, "weight": other["weight"] * (1 - share)},
    )


def spec_augment(
    rng: jax.Array,
    features: jax.Array,
    lengths: jax.Array,
    *,
    time_warp: int,
    frequency_masks: int,
    frequency_width: int,
    time_masks: int,
    time_width: int,
    time_fraction: float,
    views: int = 1,
    extent: jax.Array | None = None,
) -> jax.Array:
    """Masks (with 0, the mean of normalized features) and warps each utterance on its own.

    Args:
      features: float32 [B, F, M]; lengths: int32 [B], frames.
      time_warp: the warped centre moves by at most this many frames; 0 turns the warp off.
      frequency_masks, frequency_width: count and largest width, in feature dimensions.
      time_masks, time_width, time_fraction: count and largest width, in frames and as a fraction
        of the utterance.
      views: copies of each warped row, with masks of their own, that come one behind the other.
      extent: float32, what the largest widths are multiplied by; None leaves them.

    Returns:
      float32 [B * views, F, M].
    """
    warp_rng, time_rng, frequency_rng = jax.random.split(rng, 3)
    if time_warp:
        features = _warp(warp_rng, features, lengths, time_warp)
    if views > 1:
        features, lengths = (jnp.repeat(x, views, axis=0) for x in (features, lengths))
    batch, frames, mels = features.shape
    masked = jnp.zeros((batch, frames, mels), bool)
    if time_masks:
        width = jnp.minimum(
            time_width, (time_fraction * lengths.astype(jnp.float32)).astype(jnp.int32)
        )
        widths = _scaled(jnp.broadcast_to(width[:, None], (batch, time_masks)), extent)
        masked |= masking.span_mask(time_rng, lengths, widths, frames)[:, :, None]
    if frequency_masks:
        widths = jnp.full((batch, frequency_masks), frequency_width, jnp.int32)
        widths = _scaled(widths, extent)
        whole = jnp.full((batch,), mels, jnp.int32)
        masked |= masking.span_mask(frequency_rng, whole, widths, mels)[:, None, :]
    return jnp.where(masked, 0.0, features)


def _scaled(widths: jax.Array, extent: jax.Array | None) -> jax.Array:
    if extent is None:
        return widths
    return jnp.round(widths.astype(jnp.float32) * extent).astype(widths.dtype)


def vocal_tract(
    rng: jax.Array,
    log_mel: jax.Array,
    limit: float,
    *,
    mels: int,
    sample_rate: int,
    low_hz: float = 20.0,
    high_hz: float | None = None,
) -> jax.Array:
    """Stretches the frequencies of each utterance by a factor of its own, as another speaker would.

    Vocal tract length perturbation (Jaitly and Hinton 2013): a factor drawn from [1 - limit,
    1 + limit] up to 4,800 Hz, or 0.6 of the highest frequency where that is less, and from there on
    a line to the highest one. What a band gets lies between two bands, so it is interpolated.

    Args:
      log_mel: float32 [B, F, mels], before normalization; the rest is that of features.log_mel.
    """
    highest = high_hz or sample_rate / 2
    corner = min(4_800.0, 0.6 * highest)
    ends = feature_ops.hz_to_mel(low_hz), feature_ops.hz_to_mel(highest)
    step = (ends[1] - ends[0]) / (mels + 1)
    centres = feature_ops.mel_to_hz(ends[0] + step * np.arange(1, mels + 1))  # [M]
    factor = 1 + limit * (2 * jax.random.uniform(rng, (log_mel.shape[0], 1)) - 1)  # [B, 1]
    centres, knee = jnp.asarray(centres, jnp.float32)[None], corner / jnp.maximum(factor, 1.0)
    slope = (highest - factor * knee) / (highest - knee)
    warped = jnp.where(centres < knee, factor * centres, highest - slope * (highest - centres))
    place = (1127.0 * jnp.log1p(warped / 700.0) - ends[0]) / step - 1  # of bands, [B, M]
    place = jnp.clip(place, 0.0, mels - 1.0)
    # As a product: a gather along bands is slow everywhere.
    bands = jnp.arange(mels, dtype=jnp.float32)[None, :, None]
    weight = jnp.maximum(0.0, 1.0 - jnp.abs(place[:, None, :] - bands))  # [B, M from, M to]
    return jnp.einsum("bfm,bmn->bfn", log_mel, weight, precision=jax.lax.Precision.HIGHEST)


def _warp(rng: jax.Array, features: jax.Array, lengths: jax.Array, limit: int) -> jax.Array:
    """Moves a random frame of each utterance by up to `limit`, the rest following linearly."""
    centre_rng, shift_rng = jax.random.split(rng)
    batch, frames, _ = features.shape
    length = lengths.astype(jnp.float32)
    reach = jnp.minimum(float(limit), jnp.maximum(length / 2 - 1, 0.0))
    centre = reach + jax.random.uniform(centre_rng, (batch,)) * (length - 2 * reach)
    target = centre + (2 * jax.random.uniform(shift_rng, (batch,)) - 1) * reach * 0.999
    position = jnp.arange(frames, dtype=jnp.float32)[None, :]
    centre, target, length = centre[:, None], target[:, None], length[:, None]
    before = position * centre / jnp.maximum(target, 1e-3)
    after = centre + (position - target) * (length - centre) / jnp.maximum(length - target, 1e-3)
    source = jnp.where(position < target, before, after)
    source = jnp.clip(source, 0.0, jnp.maximum(length - 1, 0.0))
    source = jnp.where(position < length, source, position)
    left = jnp.floor(source).astype(jnp.int32)
    right = jnp.minimum(left + 1, frames - 1)
    fraction = (source - left.astype(jnp.float32))[:, :, None]
    at_left = jnp.take_along_axis(features, left[:, :, None], axis=1)
    at_right = jnp.take_along_axis(features, right[:, :, None], axis=1)
    return at_left * (1 - fraction) + at_right * fraction
