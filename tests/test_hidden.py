"""Kept hidden states: those of each split's own audio, whole or not at all, and made once."""

import contextlib
import io
import json
import os
import shutil

import jax
import numpy as np
import pytest
import soundfile

import runs
from speech_jax import experiment, hidden, tasks
from speech_jax.data import audio
from speech_jax.data.parts import PartError
from speech_jax.data.parts import hidden as kept
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import FileSource, Segment, Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import loop
from speech_jax.training import sharding
from speech_jax.training.stopping import Interrupted

pytestmark = pytest.mark.optax


@pytest.fixture
def config(tones, tmp_path):
    """A classifier of a manifest whose splits have the same ids; a training row is long."""
    chapter = tones / "train" / "1" / "1"
    files = sorted(chapter.glob("*.flac"))[:9]
    long = np.concatenate([soundfile.read(file)[0] for file in files])
    soundfile.write(tmp_path / "long.wav", long[:48_000], 16_000)
    rows = [{"audio_filepath": str(file), "label": str(n % 2)} for n, file in enumerate(files)]
    rows[2] |= {"audio_filepath": str(tmp_path / "long.wav"), "offset": 0.25, "duration": 0.5}
    rows[3] |= {"audio_filepath": str(tmp_path / "long.wav"), "offset": 1.25, "duration": 0.5}
    rows[4] |= {"audio_filepath": str(tmp_path / "long.wav")}
    for split, some in (("train", rows[:5]), ("dev", rows[5:])):
        numbered = ({"id": str(number), **row} for number, row in enumerate(some))
        text = "".join(json.dumps(row) + "\n" for row in numbered)
        (tmp_path / f"{split}.jsonl").write_text(text)
    config = runs.tiny_config(tmp_path)
    config.data.source = "manifest"
    config.data.cache = str(tmp_path / "cache")
    config.data.eval_max_seconds = 2.5  # a training row is longer, and is left out
    config.data.cache_hidden = True
    config.features.normalize = "utterance"
    config.optimizer.frozen = (("encoder/.*", -1),)
    config.task = tasks.settings("classify")
    return config


def replace(config, folder, on_batch=lambda: None):
    """(the task as it was, and as it is), the corpora of training and dev on hidden states."""
    source = experiment.open_training(config)
    parts = experiment.make_parts(config, folder, source)
    plain = experiment.make_task(config, parts)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task, parts = hidden.replace_audio(config, plain, parts, mesh, source, on_batch)
    training = experiment.training_corpus(config, source, parts, task)
    return plain, task, training, experiment.evaluation_corpus(config, "dev", parts)


def test_each_split_has_the_states_of_its_own_audio(config, tmp_path, monkeypatch):
    plain, task, training, dev = replace(config, tmp_path)
    assert training.left_out == {"4": "too long: 3.00 s"}
    assert [len(training), len(dev)] == [4, 4]
    params, state = jax.jit(task.init)(jax.random.key(config.seed), {})
    task.check_encoder(params)
    other = jax.tree.map(lambda leaf: leaf + 1e-6, params)
    with pytest.raises(UserError, match=r"config\.init\.folder names has changed"):
        task.check_encoder(other)
    encode = jax.jit(plain.encode)
    for corpus in (training, dev):
        part = corpus.parts["hidden"]
        for index in map(int, corpus.index):
            samples = audio.decode(corpus.source.open(index), 16_000)
            row = np.zeros((1, 40_000), np.int16)
            row[0, : len(samples)] = samples
            batch = {"audio": row, "audio_length": np.array([len(samples)], np.int32)}
            states, frames = encode(params, state, batch)
            found = part.load(corpus.source, index, None, 1.0)["hidden"]
            assert part.sizes(corpus.source.utterances[index]) == {"frames": int(frames[0])}
            np.testing.assert_allclose(found, states[0, : frames[0]], atol=1e-4)
    # They are made once.
    with monkeypatch.context() as patched:
        patched.setattr(loop.Evaluation, "each", None)
        replace(config, tmp_path)
    # A start that is left leaves nothing, and the next one makes them.
    folder = tmp_path / "cache" / "hidden"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    os.utime(tmp_path / "long.wav", ns=(1, 1))

    def leave():
        raise Interrupted

    with pytest.raises(Interrupted):
        replace(config, tmp_path, leave)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    replace(config, tmp_path)
    assert len(list(folder.iterdir())) == 3  # those of training again, and of dev as they were


def test_what_changes_the_audio_changes_the_digest(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"abcd")

    class Prepared(FileSource):
        def open(self, index, stream="audio"):
            return io.BytesIO(self.files[index])

    def digest(file, own="model", source=FileSource, name="x"):
        made = source((Utterance(name, 1.0),), (file,), {})
        index, lengths = np.zeros(1, np.int32), {"samples": np.array([16_000])}
        return hidden._audio_digest(own, Corpus(made, {}, index, lengths, {}))

    whole = str(path)
    found = [
        digest(whole),
        digest(whole, own="another"),
        digest(whole, name="y"),
        digest(Segment(whole, 0.0, 1.0)),
        digest(Segment(whole, 0.5, 1.0)),
        digest(Segment(whole, 0.5, 0.9)),
        digest(b"abcd", source=Prepared),
        digest(b"abce", source=Prepared),
        digest(str(tmp_path / "gone.wav")),
    ]
    assert len(set(found)) == len(found)
    assert digest(whole) == found[0]
    path.write_bytes(b"abcde")
    assert digest(whole) != found[0]


def test_a_folder_is_there_when_it_is_whole(tmp_path):
    states = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    folder = tmp_path / "kept"
    with contextlib.suppress(KeyError), kept.Writer(folder) as writer:
        writer.add("a", states)
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with kept.Writer(folder) as writer:
        for name, some in (("b", states[:1]), ("none", states[:0]), ("a", states)):
            writer.add(name, some)
        assert not kept.is_there(folder)
        writer.finish({"c": "not audio: it is text"})
    assert kept.shape(folder) == (4, (2, 2))
    part = kept.Hidden({"": folder}, (2, 2), 50.0)
    source = FileSource(tuple(Utterance(name, 1.0) for name in "ab"), (), {})
    np.testing.assert_array_equal(part.load(source, 0, None, 1.0)["hidden"], states)
    assert part.sizes(Utterance("none", 1.0)) == {"frames": 0}
    for name, why in (("c", "not audio: it is text"), ("d", "not read")):
        with pytest.raises(PartError, match=why):
            part.sizes(Utterance(name, 1.0))
    with kept.Writer(folder) as late:  # another run was faster
        late.add("a", states[:1])
        late.finish({})
    assert kept.shape(folder) == (4, (2, 2))
    assert list(tmp_path.iterdir()) == [folder]
    with kept.Writer(tmp_path / "empty") as empty, pytest.raises(UserError, match="a: torn"):
        empty.finish({"a": "torn"})
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / "states.float32").write_bytes(b"1234")
    with pytest.raises(UserError, match="torn is damaged: remove it"):
        kept.shape(tmp_path / "torn")
    (tmp_path / "blocked").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        kept.Writer(tmp_path / "blocked" / "x").__enter__()
