"""What an encoder listens to, and settings that it would not hear of (numbers: test_features)."""

import jax
import numpy as np
import pytest

from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd, unused

LOG_MEL = {"sample_rate": 16_000, "mels": 20, "window_ms": 25.0, "hop_ms": 10.0}


def test_lengths_on_the_host_stay_there():
    samples = np.asarray([0, 399, 400, 16_000])
    frames = FrontEnd("log_mel", LOG_MEL).lengths(samples)
    assert isinstance(frames, np.ndarray)
    assert frames.tolist() == [0, 0, 1, 98]
    assert FrontEnd("waveform", LOG_MEL).lengths(samples) is samples


@pytest.mark.parametrize(
    ("name", "cure"), [("spec_augment.time_masks", "mask_time"), ("features.mels", "leave it out")]
)
def test_settings_that_do_nothing_are_found(name, cure):
    changed = {"features.normalize": "none", "train.steps": 5, name: 40}
    assert list(unused("waveform", changed)) == [name]
    assert cure in unused("waveform", changed)[name]
    assert not unused("log_mel", changed)
    hidden = unused("log_mel", changed, augments=False)
    assert list(hidden) == [name for name in changed if name.startswith("spec_augment.")]
    # BEST-RQ makes its targets of log-mel.
    assert "features.mels" not in unused("waveform", changed, log_mel_targets=True)


def test_impossible_settings_are_named():
    with pytest.raises(UserError, match="must be 'utterance', 'global' or 'none'"):
        FrontEnd("log_mel", LOG_MEL, normalize="batch")
    with pytest.raises(UserError, match="'global' needs log-mel"):
        FrontEnd("waveform", LOG_MEL, normalize="global")
    for bands in (1, LOG_MEL["mels"] - 1):
        mean = np.zeros(bands, np.float32)
        with pytest.raises(UserError, match=f"of {bands} bands"):
            FrontEnd("log_mel", LOG_MEL, normalize="global", mean=mean, std=mean + 1)


def test_the_vocal_tract_is_stretched_in_training_alone():
    rng = np.random.default_rng(0)
    batch = {"audio": rng.integers(-9_000, 9_000, (2, 8_000)).astype(np.int16)}
    batch["audio_length"] = np.array([8_000, 6_000], np.int32)
    log_mel = {"sample_rate": 8_000, "mels": 20, "window_ms": 25.0, "hop_ms": 10.0}
    plain, stretched = (FrontEnd("log_mel", log_mel, vocal_tract=limit) for limit in (0.0, 0.2))
    expected = plain(batch)[0]
    np.testing.assert_array_equal(stretched(batch)[0], expected)
    one, other = (stretched(batch, jax.random.key(seed))[0] for seed in range(2))
    assert np.abs(one - expected).max() > 0.1
    assert np.abs(one - other).max() > 0.1
