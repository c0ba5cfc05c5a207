"""SpecAugment: masks of the stated number and width, valid frames only, rows independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.ops import augment, masking

LENGTHS = jnp.array([200, 120, 40, 0])
FEATURES = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4, 200, 80)), jnp.float32)
FEATURES = jnp.where(masking.length_mask(LENGTHS, 200)[:, :, None], FEATURES, 0.0)


@pytest.mark.parametrize("policy", sorted(augment.POLICIES))
def test_policies_mask_no_more_than_they_say(policy):
    settings = augment.POLICIES[policy]
    apply = jax.jit(lambda key: augment.spec_augment(key, FEATURES, LENGTHS, **settings))
    masked_frames = []
    for seed in range(8):
        out = np.asarray(apply(jax.random.key(seed)))
        assert np.isfinite(out).all()
        for row, length in enumerate(LENGTHS.tolist()):
            zero = out[row, :length] == 0
            frames = zero.all(axis=1)
            widest = min(settings["time_width"], int(settings["time_fraction"] * length))
            assert frames.sum() <= settings["time_masks"] * widest
            bands = zero[~frames].all(axis=0) if (~frames).any() else np.zeros(80, bool)
            assert bands.sum() <= settings["frequency_masks"] * settings["frequency_width"]
            assert not out[row, length:].any()
            masked_frames.append(frames.sum())
    assert max(masked_frames) > 0


def test_rows_and_keys_get_masks_of_their_own():
    features = jnp.ones((2, 200, 80))
    lengths = jnp.array([200, 200])
    settings = augment.POLICIES["conformer"]
    first = augment.spec_augment(jax.random.key(0), features, lengths, **settings)
    again = augment.spec_augment(jax.random.key(0), features, lengths, **settings)
    other = augment.spec_augment(jax.random.key(1), features, lengths, **settings)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_warp_is_monotonic_and_keeps_the_ends():
    ramp = jnp.broadcast_to(jnp.arange(200.0)[None, :, None], (4, 200, 1))
    warped = augment._warp(jax.random.key(3), ramp, LENGTHS, 40)
    for row, length in enumerate(LENGTHS.tolist()):
        valid = np.asarray(warped[row, :length, 0])
        assert (np.diff(valid) >= 0).all()
        if length:
            assert valid[0] == 0
            assert abs(valid[-1] - (length - 1)) < 3
    assert (np.abs(np.asarray(warped[0, :, 0]) - np.arange(200)) > 1).any()
