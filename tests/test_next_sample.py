"""The task of the next sample: what is counted, what it learns, and what it can be started from."""

import jax
import numpy as np
import pytest
import soundfile

import runs
from speech_jax import models, tasks, train
from speech_jax.errors import UserError
from speech_jax.evaluators import report
from speech_jax.models.frontend import FrontEnd
from speech_jax.tasks.next_sample import NextSample, NextSampleOfSpeakers
from speech_jax.training import sharding
from speech_jax.workdir import Workdir

LOG_MEL = {"sample_rate": 16_000, "mels": 10, "window_ms": 25.0, "hop_ms": 10.0}
SMALL = {"width": 8, "num_layers": 3, "cycle": 3, "taps": 4}


def make(task=NextSample, counts=None, encoder="wavenet_waveform", normalize="none", **settings):
    own = {name: settings.pop(name) for name in ("bits", "dtype", "kernel") if name in settings}
    small = SMALL | own if encoder == "wavenet_waveform" else {}
    encoder = models.make_encoder(**models.settings(encoder, "tiny", **small))
    return task(encoder, FrontEnd(encoder.listens, LOG_MEL, normalize), counts or {}, **settings)


def make_batch():
    rng = np.random.default_rng(0)
    lengths = np.asarray([900, 700, 450, 800, 900, 600, 0, 900], np.int32)
    audio = rng.integers(-9_000, 9_000, (8, 900)).astype(np.int16)
    audio[np.arange(900)[None] >= lengths[:, None]] = 0
    return {
        "audio": audio, "audio_length": lengths, "index": np.arange(8, dtype=np.int32),
        "weight": np.asarray([1, 1, 1, 1, 1, 1, 0, 0], np.float32),
        "speaker": np.asarray([0, 1, 2, -1, 0, 1, -1, -1], np.int32),
    }  # fmt: skip


def start(task, batch):
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    draw = lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype)
    return jax.tree.map(draw, shapes)


CASES = {
    "plain": lambda: make(),
    "mel": lambda: make(mel=True),
    "speakers": lambda: make(NextSampleOfSpeakers, {"speaker": 3}, mel=True, bits=16, mixtures=2),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_sums_that_depend_on_themselves_alone(name):
    task, batch = CASES[name](), make_batch()
    params = start(task, batch)
    total, weight, aux = jax.jit(task.loss)(params, {}, batch)
    assert int(weight) == batch["audio_length"][:6].sum()
    rows = jax.jit(task.predict)(params, {}, batch)
    np.testing.assert_allclose(rows["nats"][:6].sum(), total, rtol=1e-5)
    np.testing.assert_array_equal(rows["samples"], batch["audio_length"])
    assert aux["sums"] == {}
    # A row alone, without its padding, and among others.
    one = {key: value[1:2] for key, value in batch.items()}
    one["audio"] = one["audio"][:, :700]
    alone = jax.jit(task.predict)(params, {}, one)["nats"]
    np.testing.assert_allclose(alone, rows["nats"][1:2], rtol=1e-5)
    figures = task.figures({"loss": 200.0 * np.log(2), "weight": 100.0})
    assert figures == {"loss": pytest.approx(2 * np.log(2)), "bits_per_sample": pytest.approx(2)}


def test_what_it_is_given_changes_what_it_says():
    task, batch = CASES["speakers"](), make_batch()
    params = start(task, batch)
    predict = jax.jit(task.predict)
    before = predict(params, {}, batch)["nats"]
    other = predict(params, {}, batch | {"speaker": np.full(8, 1, np.int32)})["nats"]
    moved = np.abs(other - before) > 1e-3
    np.testing.assert_array_equal(moved, [True, False, True, True, True, False, False, True])


def test_bfloat16_is_close():
    batch = make_batch()
    exact, coarse = make(mel=True), make(mel=True, dtype="bfloat16")
    params = start(exact, batch)
    wanted, found = (jax.jit(task.predict)(params, {}, batch)["nats"] for task in (exact, coarse))
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_sharded_equals_single_device():
    task, batch = CASES["mel"](), make_batch()
    params = start(task, batch)
    slope = jax.value_and_grad(lambda params, batch: task.loss(params, {}, batch)[0])
    alone = jax.jit(slope)(params, batch)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    placed = sharding.shard_params(params, mesh, task.rules)
    with jax.set_mesh(mesh):
        split = jax.jit(slope)(jax.device_put(params, placed), sharding.put_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2), alone, split)


def test_what_cannot_work_is_named():
    with pytest.raises(UserError, match="wavenet_waveform"):
        make(encoder="conformer")
    with pytest.raises(UserError, match="normalize='utterance' changes the samples"):
        make(normalize="utterance")
    with pytest.raises(UserError, match="mixtures=0 must be"):
        make(mixtures=0)
    with pytest.raises(UserError, match=r"bits=12 must be 8 .* or 16"):
        start(make(bits=12), make_batch())
    with pytest.raises(UserError, match="kernel=1 must be 2 or more"):
        start(make(kernel=1), make_batch())
    sizes = {"samples": np.asarray([0, 319, 320, 399, 400])}
    assert set(make().unusable(sizes)) == {0, 1}
    assert set(make(mel=True).unusable(sizes)) == {0, 1, 2, 3}


@pytest.mark.optax
def test_it_is_trained_heard_and_started_from(tones, tmp_path):
    config = runs.tiny_config(tones)
    config.task = tasks.settings("next_sample", mel=True)
    config.model = models.settings("wavenet_waveform", "tiny", **SMALL)
    config.features.normalize = "none"
    config.data.max_seconds = 0.2
    config.data.batch_seconds = 1.6
    config.schedule = {"name": "constant", "peak": 1e-2, "warmup": 1}
    config.train.update({"steps": 8, "eval_every": 4})
    workdir = Workdir(tmp_path / "samples")
    results = train.run(config, workdir)
    assert results["splits"]["dev"]["bits_per_sample"] < 8.0  # of 8 bits
    for step in (4, 8):
        made, rate = soundfile.read(workdir.generated(step))
        assert rate == 16_000
        assert 0.1 < len(made) / rate <= 2.0
        assert np.abs(made).max() > 0
    assert report._generated(workdir).count("<audio") == 2
    # A recognizer on its encoder.
    config.task = tasks.settings("recognize")
    config.init.folder = str(workdir.folder)
    config.train.update({"steps": 1, "eval_every": 1})
    config.data.max_seconds, config.data.batch_seconds = 8.0, 16.0
    train.run(config, Workdir(tmp_path / "labels"))
