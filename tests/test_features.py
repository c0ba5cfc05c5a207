"""The front end: equal to an independent implementation, blind to padding."""

import jax
import jax.numpy as jnp
import kaldi_native_fbank
import numpy as np
import pytest
import scipy.fft

from speech_jax.ops import features

log_mel = jax.jit(features.log_mel, static_argnames=("sample_rate", "mels"))


def kaldi_log_mel(samples, sample_rate, mels):
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.samp_freq = sample_rate
    options.mel_opts.num_bins = mels
    options.energy_floor = 0
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(sample_rate, samples.tolist())
    bank.input_finished()
    return np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])


@pytest.mark.parametrize(("sample_rate", "mels"), [(16_000, 80), (8_000, 40)])
def test_log_mel_equals_kaldi(sample_rate, mels):
    time = np.arange(sample_rate) / sample_rate
    chirp = np.sin(2 * np.pi * (200 + 1500 * time) * time)
    noise = np.random.default_rng(0).standard_normal(sample_rate)
    samples = (0.3 * chirp + 0.02 * noise + 0.05).astype(np.float32)
    ours, lengths = log_mel(
        samples[None], jnp.array([sample_rate]), sample_rate=sample_rate, mels=mels
    )
    theirs = kaldi_log_mel(samples, sample_rate, mels)
    assert int(lengths[0]) == len(theirs)
    np.testing.assert_allclose(ours[0], theirs, atol=1e-3)


def test_padding_changes_nothing():
    rng = np.random.default_rng(1)
    audio = np.zeros((2, 9_000), np.float32)
    audio[0, :5_000] = rng.uniform(-1, 1, 5_000)
    lengths = jnp.array([5_000, 0])
    short, frames = log_mel(audio[:, :5_000], lengths)
    long, same_frames = log_mel(audio, lengths)
    count = int(frames[0])
    assert frames.tolist() == same_frames.tolist() == [1 + (5_000 - 400) // 160, 0]
    np.testing.assert_array_equal(short[0, :count], long[0, :count])
    assert not np.any(long[0, count:])
    assert not np.any(long[1])
    normalized = features.normalize(long, frames)
    np.testing.assert_allclose(normalized[0, :count].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normalized[0, :count].std(0), 1, atol=1e-2)
    assert not np.any(normalized[1])


def test_garbage_in_the_padding_is_never_seen():
    audio = np.random.default_rng(2).uniform(-1, 1, (1, 6_000)).astype(np.float32)
    dirty = audio.copy()
    dirty[:, 4_000:] = 7.0
    np.testing.assert_array_equal(
        log_mel(audio, jnp.array([4_000]))[0], log_mel(dirty, jnp.array([4_000]))[0]
    )


def test_global_normalization_uses_the_given_moments():
    x = jnp.ones((1, 3, 2))
    out = features.normalize(x, jnp.array([2]), jnp.array([1.0, 0.0]), jnp.array([2.0, 0.5]))
    np.testing.assert_allclose(out[0], [[0, 2], [0, 2], [0, 0]])


def test_bad_settings_name_the_cure():
    with pytest.raises(ValueError, match="shorter than a window"):
        features.log_mel(jnp.zeros((1, 100)), jnp.array([100]))
    with pytest.raises(ValueError, match="low_hz < high_hz"):
        features.log_mel(jnp.zeros((1, 800)), jnp.array([800]), sample_rate=8_000, high_hz=7_600.0)


def test_pcm_becomes_unit_range_and_floats_pass():
    pcm = np.array([[-32768, 0, 32767]], np.int16)
    np.testing.assert_array_equal(features.to_waveform(pcm), [[-1, 0, 32767 / 32768]])
    wave = jnp.array([[0.25]])
    assert features.to_waveform(wave) is wave


def test_what_is_quieter_than_the_floor_hardly_shows():
    rng = np.random.default_rng(0)
    loud, quiet = (
        jnp.asarray(scale * rng.standard_normal((1, 8_000)), jnp.float32) for scale in (0.1, 3e-5)
    )
    lengths = jnp.array([8_000])
    exact, _ = log_mel(loud, lengths)
    above, _ = features.log_mel(loud, lengths, floor=1e-3)
    np.testing.assert_allclose(above, jnp.log(jnp.exp(exact) + 1e-3), atol=1e-5)
    silence, _ = features.log_mel(0 * quiet, lengths, floor=1e-3)
    hushed, _ = features.log_mel(quiet, lengths, floor=1e-3)
    assert np.abs(hushed - silence).max() < 0.1
    assert np.abs(log_mel(quiet, lengths)[0] - log_mel(0 * quiet, lengths)[0]).max() > 3


def test_the_cosine_transform_equals_scipy():
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 7)).astype(np.float32)
    for axis, count in ((3, 5), (2, 2)):
        expected = np.take(scipy.fft.dct(x, axis=axis, norm="ortho"), np.arange(count), axis)
        found = features.cosine_transform(x, count, axis)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # The targets of BEST-RQ come from these matrices: they are scipy's to the last bit.
    for size, count in ((80, 13), (4, 2), (8, 2)):
        scipys = scipy.fft.dct(np.eye(size), norm="ortho")[:, :count].astype(np.float32)
        np.testing.assert_array_equal(features.cosines(size)[:, :count].astype(np.float32), scipys)
