"""SpecAugment (Park et al. 2019, 2020): masks and a warp on normalized features, in the step."""

import jax
import jax.numpy as jnp

from speech_jax.ops import masking

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
) -> jax.Array:
    """Masks (with 0, the mean of normalized features) and warps each utterance on its own.

    Args:
      features: float32 [B, F, M]; lengths: int32 [B], frames.
      time_warp: the warped centre moves by at most this many frames; 0 turns the warp off.
      frequency_masks, frequency_width: count and largest width, in feature dimensions.
      time_masks, time_width, time_fraction: count and largest width, in frames and as a fraction
        of the utterance.
    """
    batch, frames, mels = features.shape
    warp_rng, time_rng, frequency_rng = jax.random.split(rng, 3)
    if time_warp:
        features = _warp(warp_rng, features, lengths, time_warp)
    masked = jnp.zeros((batch, frames, mels), bool)
    if time_masks:
        width = jnp.minimum(
            time_width, (time_fraction * lengths.astype(jnp.float32)).astype(jnp.int32)
        )
        widths = jnp.broadcast_to(width[:, None], (batch, time_masks))
        masked |= masking.span_mask(time_rng, lengths, widths, frames)[:, :, None]
    if frequency_masks:
        widths = jnp.full((batch, frequency_masks), frequency_width, jnp.int32)
        whole = jnp.full((batch,), mels, jnp.int32)
        masked |= masking.span_mask(frequency_rng, whole, widths, mels)[:, None, :]
    return jnp.where(masked, 0.0, features)


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
