"""Decoding, resampling, speed and noise: what comes out, and what a bad file says."""

import io
import math
import pathlib

import numpy as np
import pytest
import soundfile

from speech_jax.data import audio

RATE = 16000


def tone(hertz: float, seconds: float, rate: int = RATE, peak: float = 8000) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return np.rint(peak * np.sin(2 * np.pi * hertz * time)).astype(np.int16)


def pitch(samples: np.ndarray, rate: int = RATE) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * rate / len(samples)


def write(path, samples, rate=RATE, **kwargs) -> str:
    soundfile.write(path, samples, rate, **kwargs)
    return str(path)


@pytest.mark.parametrize("extension", ["wav", "flac", "aiff", "caf", "au", "w64"])
def test_sixteen_bit_mono_comes_through_unchanged(tmp_path, extension):
    every_value = np.arange(-32768, 32768, dtype=np.int32).astype(np.int16)
    path = write(tmp_path / f"all.{extension}", every_value, subtype="PCM_16")
    np.testing.assert_array_equal(audio.decode(path, RATE), every_value)
    assert audio.decode(path, RATE).dtype == np.int16
    assert audio.duration(path) == 65536 / RATE


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE", "PCM_24", "PCM_32"])
def test_wider_samples_that_hold_int16_come_through_unchanged(tmp_path, subtype):
    samples = np.arange(-32768, 32768, 7, dtype=np.int32).astype(np.int16)
    path = write(tmp_path / "wide.wav", samples / 32768, subtype=subtype)
    np.testing.assert_array_equal(audio.decode(path, RATE), samples)


def test_float_beyond_full_scale_is_clipped_and_does_not_wrap(tmp_path):
    path = write(tmp_path / "loud.wav", np.array([2.0, 1.0, -1.0, -2.0]), subtype="FLOAT")
    np.testing.assert_array_equal(audio.decode(path, RATE), [32767, 32767, -32768, -32768])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_other_rates_keep_pitch_level_and_duration(tmp_path, rate):
    path = write(tmp_path / "tone.wav", tone(440, 1.5, rate), rate)
    decoded = audio.decode(path, RATE)
    assert len(decoded) == math.ceil(round(1.5 * rate) * RATE / rate)
    assert pitch(decoded) == pytest.approx(440, abs=1)
    middle = decoded[4000:-4000].astype(float)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(8000 / math.sqrt(2), rel=0.01)


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 0.2), tone(700, 0.2)
    path = write(tmp_path / "stereo.wav", np.stack([left, right], axis=1))
    expected = np.rint((left.astype(float) + right) / 2)
    np.testing.assert_array_equal(audio.decode(path, RATE), expected)


@pytest.mark.parametrize(
    ("container", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_lossy_formats_decode_close_to_the_original(tmp_path, container, subtype):
    path = write(tmp_path / "lossy", tone(440, 1), format=container, subtype=subtype)
    decoded = audio.decode(path, RATE)
    assert abs(len(decoded) / RATE - audio.duration(path)) <= 0.02
    assert pitch(decoded) == pytest.approx(440, abs=2)


def test_a_stream_decodes_as_its_file(tmp_path):
    path = write(tmp_path / "tone.flac", tone(440, 0.3, 8000), 8000)
    content = pathlib.Path(path).read_bytes()
    np.testing.assert_array_equal(audio.decode(io.BytesIO(content), RATE), audio.decode(path, RATE))
    assert audio.duration(io.BytesIO(content)) == audio.duration(path)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("container", "subtype", "damage", "message"),
    [
        ("WAV", "PCM_16", lambda content: b"", r"the file is empty \(0 bytes\)"),
        ("WAV", "PCM_16", lambda content: b"not audio at all" * 40, "not audio"),
        ("WAV", "PCM_16", half, "truncated"),
        ("WAV", "FLOAT", half, "truncated"),
        ("AIFF", "PCM_16", half, "truncated"),
        ("W64", "PCM_16", half, "truncated"),
        ("FLAC", "PCM_16", half, "truncated or damaged"),
        ("FLAC", "PCM_16", lambda content: content[:30], "not audio"),
        ("OGG", "VORBIS", lambda content: content[:-200], "truncated"),
        ("OGG", "OPUS", lambda content: content[:-200], "truncated"),
        ("MP3", None, half, "truncated"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, container, subtype, damage, message):
    good = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 3000, 5 * RATE).astype(np.int16)
    soundfile.write(good, noise, RATE, format=container, subtype=subtype)
    path = tmp_path / "utterance-7.audio"
    path.write_bytes(damage(good.getvalue()))
    with pytest.raises(audio.AudioError, match=message) as error:
        audio.decode(str(path), RATE)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_samples_is_an_error(tmp_path):
    path = write(tmp_path / "silent.wav", np.zeros(0, np.int16))
    for use in (audio.duration, lambda file: audio.decode(file, RATE)):
        with pytest.raises(audio.AudioError, match=r"silent\.wav: holds no samples"):
            use(path)


def test_a_wav_written_to_a_pipe_is_whole(tmp_path):
    # Its sizes are unknown when the header is written: all ones, and not a sign of truncation.
    path = tmp_path / "piped.wav"
    content = bytearray(pathlib.Path(write(path, tone(440, 0.1))).read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    np.testing.assert_array_equal(audio.decode(str(path), RATE), tone(440, 0.1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_an_error(tmp_path, value):
    samples = np.zeros(RATE)
    samples[8000:8003] = value
    path = write(tmp_path / "bad.wav", samples, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match=r"bad\.wav: 3 NaN or infinite .* at 0\.500 s"):
        audio.decode(path, RATE)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "missing.wav", tmp_path):
        with pytest.raises(audio.AudioError, match="no such file"):
            audio.decode(str(path), RATE)


@pytest.mark.parametrize("length", [1, 2, 3, 159, 16001])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_resampled_length_is_exact(length, rate):
    resampled = audio.resample(np.full(length, 100, np.int16), rate, RATE)
    assert len(resampled) == math.ceil(length * RATE / rate)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 2.0])
def test_speed_moves_tempo_and_pitch(factor):
    samples = tone(440, 1)
    faster = audio.change_speed(samples, factor)
    assert len(faster) == math.ceil(RATE / factor)
    assert pitch(faster) == pytest.approx(440 * factor, abs=1.5)
    if factor == 1:
        np.testing.assert_array_equal(faster, samples)


def test_resampling_clips_what_overshoots():
    square = np.where(np.arange(4000) // 40 % 2, 32767, -32768).astype(np.int16)
    resampled = audio.change_speed(square, 0.9).astype(int)
    # A wrapped overshoot would make a jump of the whole range within a half period.
    inside = resampled[100:-100]
    assert np.all(np.abs(inside[np.abs(inside) > 30000]) <= 32768)
    assert np.mean(np.sign(inside[1:]) != np.sign(inside[:-1])) < 1.2 / 44


def test_an_absurd_speed_is_an_error():
    with pytest.raises(ValueError, match="speed factor 0"):
        audio.change_speed(tone(440, 0.1), 0)


@pytest.mark.parametrize("snr_db", [-5, 0, 10, 30])
def test_noise_is_added_at_the_given_ratio(snr_db):
    speech = tone(440, 1, peak=2000)
    noise = np.random.default_rng(1).normal(0, 500, 5000).astype(np.int16)
    added = audio.add_noise(speech, noise, snr_db, offset=4321).astype(float) - speech
    ratio = np.mean(speech.astype(float) ** 2) / np.mean(added**2)
    assert 10 * np.log10(ratio) == pytest.approx(snr_db, abs=0.05)


def test_noise_wraps_around_from_its_offset():
    noise = np.random.default_rng(2).normal(0, 500, 100).astype(np.int16)
    noisy = audio.add_noise(tone(440, 1, peak=2000), noise, 0, offset=130)
    repeated = np.tile(noise, RATE)[30 : 30 + RATE]
    np.testing.assert_array_equal(noisy, audio.add_noise(tone(440, 1, peak=2000), repeated, 0))


def test_a_sum_too_loud_is_scaled_as_a_whole():
    speech = tone(440, 1, peak=32000)
    noise = tone(1000, 1, peak=32000)
    noisy = audio.add_noise(speech, noise, 0).astype(float)
    exact = speech.astype(float) + noise
    assert np.abs(noisy).max() == 32767
    np.testing.assert_allclose(noisy, exact * 32767 / np.abs(exact).max(), atol=1)


def test_silence_has_no_ratio_to_noise():
    speech, silence = tone(440, 0.1), np.zeros(1600, np.int16)
    np.testing.assert_array_equal(audio.add_noise(speech, silence, 10), speech)
    np.testing.assert_array_equal(audio.add_noise(silence, speech, 10), silence)
    with pytest.raises(ValueError, match="no samples"):
        audio.add_noise(speech, np.zeros(0, np.int16), 10)


def test_flac_is_kept_and_anything_else_becomes_flac_of_the_same_samples(tmp_path):
    # At another level than ours, so that encoding it again would show.
    flac = write(tmp_path / "a.flac", tone(440, 0.2, 8000), 8000, compression_level=0.0)
    content, samples, rate = audio.to_flac(flac)
    assert content == pathlib.Path(flac).read_bytes()
    assert (samples, rate) == (1600, 8000)
    stereo = np.stack([tone(300, 0.2), tone(700, 0.2)], axis=1) / 32768
    for name, kwargs in {"a.wav": {"subtype": "FLOAT"}, "a.ogg": {"subtype": "OPUS"}}.items():
        path = write(tmp_path / name, stereo, **kwargs)
        content, samples, rate = audio.to_flac(path)
        assert content[:4] == b"fLaC"
        for target in (RATE, 8000):
            expected = audio.decode(path, target)
            np.testing.assert_array_equal(audio.decode(io.BytesIO(content), target), expected)
        assert samples / rate == pytest.approx(audio.duration(path))
