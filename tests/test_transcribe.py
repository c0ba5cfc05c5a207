"""load(folder).transcribe(recording): any form of a recording gives its text, or one sentence."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile

import runs
import speech_jax
from speech_jax import bundle, tasks
from speech_jax.data import audio
from speech_jax.deploy import acoustic, inputs, pieces, transcribe

RATE = 16_000


@pytest.fixture(scope="module")
def model(finished) -> speech_jax.Model:
    return speech_jax.load(finished.workdir.folder)


@pytest.fixture(scope="module")
def said(finished) -> dict[str, str]:
    """What evaluation heard in each utterance of dev."""
    lines = finished.workdir.predictions("dev").read_text().splitlines()
    return {line["id"]: line["hypothesis"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def longest(tones, said):
    """(path, int16 [T], text) of the recording in which most is heard."""
    name = max(said, key=lambda name: len(said[name]))
    path = tones / "dev" / "1" / "1" / f"{name}.flac"
    return path, soundfile.read(path, dtype="int16")[0], said[name]


# ---- The same text -----------------------------------------------------------------------------


def test_files_say_what_evaluation_heard(model, said, tones):
    for name, text in said.items():
        found = model.transcribe(tones / "dev" / "1" / "1" / f"{name}.flac")
        assert (found.text, str(found)) == (text, text)
    assert len(set(said.values())) > 2, "all texts are alike, which shows nothing"


def stereo(samples):
    return np.stack([samples, samples], axis=1)


def floats(samples):
    return samples.astype(np.float32) / 32768


@pytest.mark.parametrize(
    ("form", "rate"),
    [
        (lambda x: x, None),
        (lambda x: x, RATE),
        (floats, None),
        (lambda x: x / 32768, np.int64(RATE)),
        (lambda x: x.astype(">i2"), None),
        (lambda x: np.repeat(x, 2)[::2], None),
        (lambda x: x[:, None], None),
        (stereo, None),
        (lambda x: stereo(floats(x)), RATE),
        (lambda x: np.asfortranarray(stereo(x)), None),
        (jax.numpy.asarray, None),
    ],
    ids=range(11),
)
def test_samples_in_any_form_say_the_same(form, rate, model, longest):
    _, samples, text = longest
    found = model.transcribe(form(samples), rate)
    assert found.text == text
    assert found.seconds == pytest.approx(len(samples) / RATE)


@pytest.mark.parametrize(
    ("name", "rate", "form", "subtype"),
    [
        ("a.wav", 16_000, lambda x: x, "PCM_16"),
        ("b.wav", 48_000, lambda x: stereo(floats(x)), "FLOAT"),
        ("c.flac", 44_100, lambda x: x, "PCM_16"),
        ("ü d.wav", 22_050, stereo, "PCM_16"),
    ],
)
def test_a_file_and_its_samples_say_the_same(name, rate, form, subtype, model, longest, tmp_path):
    given = form(audio.resample(longest[1], RATE, rate))
    soundfile.write(tmp_path / name, given, rate, subtype)
    found = model.transcribe(given, rate)
    assert found.text
    assert found == model.transcribe(tmp_path / name) == model.transcribe(str(tmp_path / name))
    assert found.seconds == pytest.approx(len(longest[1]) / RATE, abs=1e-3)


def test_a_saved_model_says_the_same(model, longest, tmp_path):
    path, samples, text = longest
    bundle.save(model.acoustic.bundle, tmp_path / "model")
    again = speech_jax.load(str(tmp_path / "model"))
    assert again.transcribe(path).text == again.transcribe(samples).text == text
    jax.tree.map(
        np.testing.assert_array_equal, again.acoustic.bundle.params, model.acoustic.bundle.params
    )
    assert all(
        isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(again.acoustic.bundle.params)
    )


def test_few_programs_serve_all_lengths(model):
    """And the shortest recordings have an empty text."""
    before = model.acoustic._logits._cache_size()
    for length in (1, 100, 8_000, 15_999):
        assert model.transcribe(np.ones(length, np.int16)).text == ""
    assert model.acoustic._logits._cache_size() <= before + 1
    lengths = {inputs.padded(length, RATE) for length in range(1, 60 * RATE, 997)}
    assert len(lengths) < 14
    for length in (1, 15_999, 16_000, 16_001, 22_627, 22_628, 960_000):
        padded = inputs.padded(length, RATE)
        assert max(length, RATE) <= padded <= 1.42 * max(length, RATE)


def test_texts_depend_on_nothing_else(model, said, tones):
    """Not on what is transcribed with it, nor on the order, nor on how many fill a batch."""
    names = sorted(said)
    shuffled = [*names[3:], *reversed(names), *names[:2], *names]
    files = [tones / "dev" / "1" / "1" / f"{name}.flac" for name in shuffled]
    told = []
    found = model.transcribe_all(files, lambda files, seconds: told.append((files, seconds)))
    for name, one in zip(shuffled, found, strict=True):
        assert one.text == said[name]
        assert [word.text for word in one.words] == said[name].split()
    assert told == sorted(told)
    assert told[-1][0] == len(files)


@pytest.mark.parametrize(("before", "after"), [(0, 0.01), (0, 0.7), (0, 7), (1.5, 0), (3, 100)])
def test_digital_silence_around_a_recording_changes_nothing(before, after, model, longest):
    """Nor its times: it would weigh in the mean and the variance of the features."""
    _, samples, text = longest
    zeros = [np.zeros(round(seconds * RATE), np.int16) for seconds in (before, after)]
    found = model.transcribe(np.concatenate([zeros[0], samples, zeros[1]]))
    plain = model.transcribe(samples)
    assert found.text == text
    assert found.seconds == pytest.approx(plain.seconds + before + after)
    for one, other in zip(found.words, plain.words, strict=True):
        assert one.start == pytest.approx(other.start + before, abs=1e-3)
        assert one[3] == pytest.approx(other[3], abs=1e-3)


def test_a_long_recording_says_what_its_pieces_say_and_when(model, said, tones, monkeypatch):
    """Also where it is read and heard in several goes."""
    rng, parts = np.random.default_rng(0), []
    for number in range(40):
        name = sorted(said)[number % len(said)]
        samples = soundfile.read(tones / "dev" / "1" / "1" / f"{name}.flac", dtype="int16")[0]
        parts += [samples, rng.normal(0, 30, round(rng.uniform(0.5, 3) * RATE)).astype(np.int16)]
    whole = np.concatenate(parts)
    longest = model.acoustic.longest_seconds
    cut = [
        (p.start / RATE, model.transcribe(p.samples))
        for p in pieces.cut(iter([whole]), RATE, longest)
    ]
    monkeypatch.setattr(model, "_batch_seconds", 3.0)
    found = model.transcribe(whole)
    assert found.seconds == pytest.approx(len(whole) / RATE)
    assert found.text == " ".join(one.text for _, one in cut if one.text)
    assert [segment.text for segment in found.segments] == [one.text for _, one in cut if one.text]
    times = [(start + word.start, start + word.end) for start, one in cut for word in one.words]
    np.testing.assert_allclose([word[1:3] for word in found.words], times, atol=1e-3)
    assert len(found.words) > 40
    assert sorted(times) == times


class Local:
    """The class of a frame is the loudness of half a second on each side of it."""

    sample_rate, frame_seconds, longest_seconds, decoder = 2000, 0.04, 12.0, {}

    class transcript:
        class tokenizer:
            spellings = ("", *(f" {letter}" for letter in "abcdefg"))

            @classmethod
            def decode(cls, ids):
                return "".join(cls.spellings[i] for i in ids).strip()

    def logits(self, samples, lengths):
        frames = lengths // 80
        logits = np.zeros((len(samples), samples.shape[1] // 80, 8), np.float32)
        for row, count in enumerate(frames):
            for frame in range(count):
                last = min(80 * frame + 1080, lengths[row])  # padding is not heard
                around = samples[row, max(0, 80 * frame - 1000) : last].astype(float)
                logits[row, frame, int(np.square(around).mean() ** 0.5) // 1000 % 8] = 9.0
        return logits, frames.astype(np.int32)


def test_chunks_say_what_the_whole_says():
    """Of a model that hears half a second to each side: where chunks meet, no frame differs."""
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.uniform(1000, 8000, 150), 740)  # no pause in 55 s
    samples = (loud * rng.choice([-1, 1], len(loud))).astype(np.int16)
    model, found = transcribe.Model(Local()), []
    for model._chunk_seconds in (5, 7.77, 10, 20, 300):
        found.append(model.transcribe(samples))
    assert len(found[0].words) > 100
    assert all(one.words == found[0].words for one in found)


# ---- One sentence ------------------------------------------------------------------------------


NAN, LOUD = np.zeros(RATE, np.float32), np.zeros(RATE, np.float64)
NAN[5], LOUD[7] = np.nan, 20_000.0


@pytest.mark.parametrize(
    ("recording", "rate", "message"),
    [
        (np.zeros(RATE, np.int32), None, "type int32 .* give floats"),
        (np.zeros(RATE, np.uint8), None, "type uint8"),
        (np.zeros(RATE, bool), None, "type bool"),
        (np.zeros(RATE, complex), None, "type complex128"),
        (np.asarray(["a", "b"]), None, "type <U1"),
        ([[0.0, 0.1], [0.0]], None, "not an array of samples"),
        (np.float32(0.5), None, r"shape \[\] are not audio"),
        (None, None, "NoneType is not a recording: give a file"),
        (b"RIFF", None, r"bytes is not a recording: .*io\.BytesIO"),
        (["a.wav", "b.flac"], None, "a list of files .* transcribe_all"),
        ([], None, "the recording is empty"),
        (np.zeros((2, RATE), np.int16), None, r"shape \[2, 16000\] .* \[T, channels\]"),
        (np.zeros((2, 2, 2), np.int16), None, r"shape \[2, 2, 2\]"),
        (np.zeros(0, np.int16), None, "the recording is empty"),
        (np.zeros((RATE, 0), np.float32), None, r"shape \[16000, 0\]"),
        (NAN, None, "not all finite"),
        (LOUD, None, "reach 20000, .* divide them by 32768"),
        (np.zeros(RATE, np.int16), 0, "sample_rate=0 must"),
        (np.zeros(RATE, np.int16), 16_000.0, r"sample_rate=16000\.0 must be a whole number"),
        (np.zeros(RATE, np.int16), 1, "sample_rate=1 must"),
        (np.zeros(RATE, np.int16), True, "sample_rate=True must"),
        ("no such file.wav", None, "no such file.wav"),
        ("", None, "."),
        (".", None, "."),
    ],
)
def test_a_recording_that_is_none_is_one_sentence(recording, rate, message, model):
    with pytest.raises(speech_jax.UserError, match=message) as raised:
        model.transcribe(recording, rate)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_audio_is_one_sentence(model, longest, tmp_path):
    path, _, _ = longest
    for name, content in (("a.wav", b""), ("b.flac", b"fLaC, but no"), ("c.txt", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(speech_jax.UserError, match=name) as raised:
            model.transcribe(tmp_path / name)
        assert "\n" not in str(raised.value)
    (tmp_path / "cut.flac").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(speech_jax.UserError, match=r"cut\.flac"):
        model.transcribe(tmp_path / "cut.flac")
    with pytest.raises(speech_jax.UserError, match="leave sample_rate out"):
        model.transcribe(path, 16_000)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path, longest, finished):
    (bare := tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(finished.workdir.folder / name, bare)
    for folder, message in (
        (tmp_path, "holds no model: a workdir has checkpoints/"),
        (tmp_path / "nowhere", r"does not exist: name a workdir, .* file \(\.sjx or \.onnx\)"),
        (tmp_path / "nowhere.sjx", "does not exist: name a workdir"),
        (longest[0], "is not a model: name a workdir"),
        (bare, "is a workdir without checkpoints: train there first"),
    ):
        with pytest.raises(speech_jax.UserError, match=message) as raised:
            speech_jax.load(folder)
        assert str(folder) in str(raised.value)


def test_a_model_of_another_task_is_one_sentence(model):
    config = model.acoustic.bundle.config.copy_and_resolve_references()
    with config.unlocked():
        config.task = tasks.settings("best_rq")
    parts = {"audio": model.acoustic.bundle.parts["audio"]}
    with pytest.raises(speech_jax.UserError, match="of the task 'best_rq' and gives no text"):
        acoustic.BundleAcoustic(bundle.Bundle(config, parts, {}, {}))
    with pytest.raises(speech_jax.UserError, match="gives no text"):
        speech_jax.load(runs.ROOT / "tests" / "data" / "wav2vec2_pretraining")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: said_version(folder, 99), "version 99, .* up to .*: install a newer one"),
        (lambda folder: said_version(folder, "1"), "version '1'"),
        (lambda folder: (folder / "bundle.json").write_text("{"), r"bundle\.json is damaged"),
        (lambda folder: (folder / "bundle.json").write_text("[]"), r"bundle\.json holds a JSON"),
        (lambda folder: (folder / "bundle.json").write_text('{"version": 1}'), "no configuration"),
        (lambda folder: (folder / "params.safetensors").unlink(), r"params\.safetensors"),
        (lambda folder: (folder / "params.safetensors").write_bytes(b"12345678"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no 'labels'"),
        (lambda folder: (folder / "features.json").unlink(), "has no 'audio'"),
        (lambda folder: said_alphabet(folder, " AB"), "'labels' has 4 symbols, .* trained for 5"),
        (lambda folder: said_alphabet(folder, " ABCD"), "'labels' has 6 symbols, .* for 5"),
    ],
)
def test_a_damaged_model_is_one_sentence(damage, message, model, tmp_path):
    bundle.save(model.acoustic.bundle, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(speech_jax.UserError, match=message) as raised:
        speech_jax.load(tmp_path / "model")
    assert "\n" not in str(raised.value)


def said_version(folder, version):
    described = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(described | {"version": version}))


def said_alphabet(folder, alphabet):
    """As tokenizers were kept before they were sealed: nothing says that it has changed."""
    fields = {"kind": "characters", "normalizer": "english", "alphabet": alphabet}
    (folder / "tokenizer.json").write_text(json.dumps(fields))


def test_a_model_is_saved_whole_or_not_at_all(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(speech_jax.UserError, match="is not empty: name a new folder"):
        bundle.save(model.acoustic.bundle, tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]
    (tmp_path / "blocked").write_text("")
    with pytest.raises(speech_jax.UserError, match="cannot write"):
        bundle.save(model.acoustic.bundle, tmp_path / "blocked" / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocked", "full"]


# ---- The package -------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, speech_jax; print(speech_jax.__version__, 'load' in dir(speech_jax),"
        " {'jax', 'numpy', 'flax', 'absl', 'ml_collections'} & set(sys.modules))"
    )
    done = runs.run([sys.executable, "-c", code])
    assert done.stdout.split() == [speech_jax.__version__, "True", "set()"]
    assert set(speech_jax.__all__) <= set(dir(speech_jax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        speech_jax.lode  # noqa: B018


def test_the_first_lines_of_the_package_run(finished, longest):
    code = f"import speech_jax; print(speech_jax.load({str(finished.workdir.folder)!r}).transcribe"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}({str(longest[0])!r}))"],
        cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{longest[2]}\n"
