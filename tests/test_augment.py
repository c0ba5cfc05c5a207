"""SpecAugment: masks of the stated number and width, valid frames only, rows independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.models import frontend
from speech_jax.ops import augment, masking
from speech_jax.ops import features as feature_ops
from speech_jax.tasks import recognize

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


def mixed_batch():
    rng = np.random.default_rng(0)
    batch = {
        "audio": rng.integers(-9_000, 9_000, (6, 400), np.int16),
        "audio_length": np.array([400, 300, 200, 400, 350, 0], np.int32),
        "labels": np.arange(6, dtype=np.int32)[:, None],
        "weight": np.array([1, 1, 1, 1, 1, 0], np.float32),
    }
    batch["audio"] *= np.arange(400) < batch["audio_length"][:, None]
    return jax.tree.map(jnp.asarray, batch)


def test_a_mixed_row_is_of_two_utterances_and_counts_for_both():
    batch = mixed_batch()
    wave = np.asarray(batch["audio"], np.float32) / 2**15
    own, other = augment.mixup(jax.random.key(1), batch, 1.0)
    np.testing.assert_array_equal(own["labels"], batch["labels"])
    np.testing.assert_array_equal(other["labels"], np.roll(batch["labels"], 1, axis=0))
    np.testing.assert_array_equal(own["audio"], other["audio"])
    share = np.asarray(own["weight"])
    # The first row's other is filler, and the last row is.
    assert share[0] == 1
    assert share[5] == 0 < other["weight"][5]
    assert np.all((share[1:5] > 0) & (share[1:5] < 1))
    for row in range(1, 5):
        expected = share[row] * wave[row] + (1 - share[row]) * wave[row - 1]
        np.testing.assert_allclose(own["audio"][row], expected, atol=1e-6)
        assert own["weight"][row] + other["weight"][row] == pytest.approx(1)
    np.testing.assert_array_equal(own["audio_length"], [400, 400, 300, 400, 400, 350])
    # Without a row to mix, the batch is what it was.
    own, other = augment.mixup(jax.random.key(1), batch, 0.0)
    np.testing.assert_array_equal(own["audio"], wave)
    np.testing.assert_array_equal(own["audio_length"], batch["audio_length"])
    np.testing.assert_array_equal(own["weight"], batch["weight"])
    assert not np.any(other["weight"])
    # About as many are mixed as are asked for, and mostly of one of the two (Beta(1/2, 1/2)).
    shares = np.concatenate(
        [augment.mixup(jax.random.key(key), batch, 0.5)[0]["weight"][1:5] for key in range(150)]
    )
    mixed = shares[shares < 1]
    assert 0.42 < len(mixed) / len(shares) < 0.58
    assert 0.4 < np.mean((mixed < 0.146) | (mixed > 0.854)) < 0.6


class Rows(recognize.Recognize):
    """A recognizer whose logits are the waveform itself, eight frames of four symbols."""

    def logits(self, params, state, batch, rng=None, step=0):
        del params, step
        noise = jax.random.normal(rng, (6, 8, 4)) if rng is not None else 0.0
        logits = feature_ops.to_waveform(batch["audio"])[:, :32].reshape(6, 8, 4) + noise
        return logits, jnp.full(6, 8), state


def test_the_loss_of_mixed_speech_is_that_of_both_transcripts():
    batch = mixed_batch()
    batch |= {"labels": 1 + batch["labels"] % 3, "labels_length": jnp.ones(6, jnp.int32)}
    mixing, plain = (Rows(None, None, {"labels": 4}, mixup=mixup) for mixup in (1.0, 0.0))
    rng = jax.random.key(3)
    total, tokens, _ = mixing.loss({}, {}, batch, rng)
    rng, key = jax.random.split(rng)
    each = [plain.loss({}, {}, one, rng) for one in augment.mixup(key, batch, 1.0)]
    assert total == pytest.approx(float(each[0][0] + each[1][0]), rel=1e-6)
    assert tokens == pytest.approx(float(each[0][1] + each[1][1])) == pytest.approx(5, abs=1)
    assert each[1][0] > 0
    # It is not done in evaluation.
    assert mixing.loss({}, {}, batch)[0] == plain.loss({}, {}, batch)[0]


def test_views_share_a_warp_and_have_masks_of_their_own():
    settings = augment.POLICIES["switchboard_strong"]
    off = {"time_masks": 0, "frequency_masks": 0}
    for change, alike in ((off, True), ({}, False)):
        both = augment.spec_augment(
            jax.random.key(0), FEATURES, LENGTHS, **{**settings, **change}, views=2
        )
        assert both.shape == (8, 200, 80)
        assert np.array_equal(both[::2], both[1::2]) == alike
        assert (both[::2] != FEATURES).any()


def test_masks_grow_with_their_extent():
    settings = augment.POLICIES["conformer"]
    masked = [
        augment.spec_augment(jax.random.key(0), FEATURES, LENGTHS, **settings, extent=extent)
        for extent in (jnp.float32(0), jnp.float32(0.5), jnp.float32(1), None)
    ]
    np.testing.assert_array_equal(masked[0], FEATURES)
    np.testing.assert_array_equal(masked[2], masked[3])
    hidden = [(one == 0).sum() - (FEATURES == 0).sum() for one in masked]
    assert hidden[0] == 0 < hidden[1] < hidden[2]


def test_a_front_end_begins_to_mask_at_its_step():
    log_mel = {"sample_rate": 16_000, "mels": 80, "window_ms": 25.0, "hop_ms": 10.0}
    masks = {"time_warp": 0} | augment.POLICIES["conformer"]
    one = frontend.FrontEnd(
        "log_mel", log_mel, "none", spec_augment=masks, spec_augment_start=10, spec_augment_ramp=10
    )
    # Of 200 frames at 10 ms with windows of 25.
    batch = {"features": FEATURES[:1], "audio_length": jnp.array([32_240])}
    hidden = [
        int((one(batch, jax.random.key(0), step)[0] == 0).sum()) for step in (0, 9, 10, 15, 20, 99)
    ]
    assert hidden[0] == hidden[1] == hidden[2] == 0 < hidden[3] < hidden[4] == hidden[5]
    views, lengths = one(batch, jax.random.key(0), 99, views=2)
    assert views.shape[0] == 2
    assert lengths.tolist() == [200, 200]


def test_a_stretched_vocal_tract_moves_tones():
    """A peak moves to another frequency, flat spectra stay, rows have factors of their own."""
    bands = {"mels": 80, "sample_rate": 16_000}
    ends = feature_ops.hz_to_mel(20.0), feature_ops.hz_to_mel(8_000.0)
    centres = feature_ops.mel_to_hz(np.linspace(*ends, 82)[1:-1])
    peak = 30  # about 1 kHz
    logs = -jnp.square((jnp.arange(80.0) - peak) / 3)
    logs = jnp.broadcast_to(logs[None, None], (64, 2, 80))
    run = jax.jit(lambda x, limit: augment.vocal_tract(jax.random.key(0), x, limit, **bands))
    np.testing.assert_allclose(run(jnp.ones((3, 2, 80)), 0.2), 1.0, atol=1e-5)
    np.testing.assert_allclose(run(logs, 0.0), logs, atol=1e-3)
    moved = np.asarray(run(logs, 0.2))
    np.testing.assert_array_equal(moved[:, 0], moved[:, 1])
    factors = centres[peak] / centres[moved[:, 0].argmax(axis=1)]
    assert 0.78 < factors.min() < 0.85
    assert 1.15 < factors.max() < 1.22
    assert np.isfinite(moved).all()
