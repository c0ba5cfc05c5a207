"""The task attend: what its searches find, what it goes with, and what it refuses.

The model has the encoder and the CTC of a run that has learned the tones, and a decoder of random
parameters: what CTC has learned shows in a search if it is asked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import speech_jax
from speech_jax import bundle, experiment, models, rules, tasks
from speech_jax.bundle import start
from speech_jax.deploy import acoustic, export
from speech_jax.errors import UserError
from speech_jax.ops.ctc import ctc_loss
from speech_jax.tasks import writing
from speech_jax.training import adversarial, peft, sharding
from speech_jax.training import step as steps

pytestmark = pytest.mark.optax
ROWS, SAMPLES = 4, 24_000


def config_of(finished, decoder=None, **task):
    config = finished.config.copy_and_resolve_references()
    with config.unlocked():
        config.task = tasks.settings("attend", layers=1, heads=2, **task)
    config.decoder.update({"name": "joint", "width": 4} | (decoder or {}))
    return config


def task_of(finished, trained, decoder=None, **task):
    return experiment.make_task(config_of(finished, decoder, **task), trained.parts)


@pytest.fixture(scope="module")
def trained(finished) -> bundle.Bundle:
    return bundle.open(finished.workdir.folder)


@pytest.fixture(scope="module")
def batch(trained, tones):
    rng = np.random.default_rng(0)
    lengths = np.asarray([24_000, 12_000, 20_000, 0], np.int32)
    time = np.arange(SAMPLES) / 16_000
    waves = [0.3 * np.sin(2 * np.pi * f * time) * (time % 0.425 < 0.3) for f in (300, 900, 2700, 0)]
    audio = np.stack(waves) + 0.01 * rng.standard_normal((ROWS, SAMPLES))
    labels = rng.integers(1, trained.parts["labels"].count, (ROWS, 5)).astype(np.int32)
    return {
        "audio": (audio * 32767).astype(np.int16),
        "audio_length": lengths,
        "labels": labels,
        "labels_length": np.asarray([5, 2, 3, 0], np.int32),
        "weight": np.asarray([1, 1, 1, 0], np.float32),
        "index": np.arange(ROWS, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def params(finished, trained, batch):
    shapes, _ = jax.eval_shape(task_of(finished, trained).init, jax.random.key(0), batch)
    rng = np.random.default_rng(3)
    noise = lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32)
    return trained.params | {"decoder": jax.tree.map(noise, shapes["decoder"])}


@pytest.fixture(scope="module")
def model(finished, trained, params):
    return bundle.Bundle(config_of(finished), trained.parts, params, trained.state)


@pytest.fixture(scope="module")
def by_both(finished, trained, params, batch):
    """Log probabilities of (labels, counts) by the decoder and by CTC."""
    task = task_of(finished, trained)

    @jax.jit
    def by_both(params, batch, labels, count):
        heard = {"params": params, **trained.state}
        inputs = task.frontend(batch)
        hidden, logits, frames = task.model.apply(heard, *inputs, True, method="hear")
        text = (params["decoder"], hidden, frames, labels, count)
        return writing.log_probability(task.writer, *text), -ctc_loss(logits, frames, labels, count)

    return lambda labels, count: jax.device_get(by_both(params, batch, labels, count))


@pytest.fixture(scope="module")
def predict(finished, trained, params, batch):
    @functools.cache
    def predict(**decoder):
        task = task_of(finished, trained, decoder)
        return jax.device_get(jax.jit(task.predict)(params, trained.state, batch))

    return predict


def texts(found):
    rows = zip(found["labels"], found["labels_length"], strict=True)
    return [labels[:count].tolist() for labels, count in rows]


def test_with_all_weight_on_ctc_it_says_what_ctc_says(predict):
    ours, theirs = predict(ctc_weight=1.0, width=8), predict(name="beam", width=8, skip=1.0)
    assert texts(ours) == texts(theirs)
    assert max(map(len, texts(ours))) > 2
    np.testing.assert_allclose(ours["score"][:3], theirs["score"][:3], rtol=1e-3, atol=1e-3)
    for name in ("starts", "ends", "sure"):
        np.testing.assert_allclose(ours[name][:3], theirs[name][:3], rtol=1e-4)
    rescored = predict(name="rescore", ctc_weight=1.0, width=8)
    assert texts(rescored) == texts(theirs)


def test_with_no_weight_on_ctc_it_says_what_the_decoder_says(predict):
    ours, theirs = predict(ctc_weight=0.0), predict(name="attention")
    assert texts(ours) == texts(theirs)
    assert texts(ours) != texts(predict(ctc_weight=1.0, width=8))
    np.testing.assert_allclose(ours["score"], theirs["score"], rtol=1e-5)


def test_a_score_is_that_of_the_text_by_both(by_both, predict):
    for name in ("joint", "rescore", "attention"):
        found = predict(name=name)
        by_decoder, by_ctc = by_both(found["labels"], found["labels_length"])
        weight = 0.0 if name == "attention" else 0.3
        wanted = (1 - weight) * by_decoder + (weight * by_ctc if weight else 0)
        ended = found["ended"][:3]
        assert ended.any()
        np.testing.assert_allclose(
            found["score"][:3][ended], wanted[:3][ended], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_the_loss_is_that_of_both_by_their_weights(
    finished, trained, params, batch, by_both, weight
):
    task = task_of(finished, trained, {"name": "attention"}, ctc_weight=weight, smoothing=0.0)
    total, symbols, aux = jax.jit(task.loss)(params, trained.state, batch)
    assert symbols == 5 + 2 + 3 + 3
    by_decoder, by_ctc = by_both(batch["labels"], batch["labels_length"])
    wanted = -((1 - weight) * by_decoder + weight * by_ctc)[:3].sum()
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert set(aux["sums"]) == ({"right", "infeasible"} if weight else {"right"})


def test_smoothing_is_shared_by_all_that_can_be_written(finished):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 4)), jnp.float32)
    logits = logits.at[:, :, 0].set(-1e30)
    labels, count = jnp.asarray([[2]], jnp.int32), jnp.asarray([1], jnp.int32)
    nats, right = writing.cross_entropy(logits, labels, count, 0.3)
    log_probs = np.asarray(jax.nn.log_softmax(logits))[0]
    targets = np.full((2, 4), 0.1)
    targets[:, 0] = 0
    targets[0, 2] += 0.7
    targets[1, 3] += 0.7
    np.testing.assert_allclose(nats[0], -(targets * np.where(targets, log_probs, 0)).sum(), 1e-5)
    assert right == (log_probs.argmax(-1) == [2, 3]).sum()


def test_what_goes_with_it(finished, trained, params, batch):
    """Sharding, LoRA on both decoders' attention, an adversary, and an encoder that was trained."""
    task = task_of(finished, trained)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.shard_params(params, mesh, task.rules)
    split = placed["decoder"]["layer_0"]["cross_attention"]["key_value"]["kernel"]
    assert tuple(split.spec) == ("fsdp", None, "tensor", None)

    # Shapes alone: the gradient has that of the parameters.
    shape = lambda tree: jax.tree.map(jnp.shape, tree)
    grown = peft.extended(params, peft.LoRA(rank=2), jax.random.key(0))
    layer = grown["decoder"]["layer_0"]
    assert {"query_lora", "kernel_lora"} & set(layer["cross_attention"]["query"])
    lora, fgsm = peft.Adapted(task, peft.LoRA(rank=2)), adversarial.Adversary(method="fgsm")
    for gradients, of in (
        (adversarial.gradients(task, fgsm), params),
        (steps.gradients(lora), grown),
    ):
        given = (of, trained.state, batch, jax.random.key(1), jnp.int32(3))
        assert shape(jax.eval_shape(gradients, *given)[0]) == shape(of)

    config = config_of(finished)
    config.init.folder = str(finished.workdir.folder)
    fresh = jax.tree.map(jnp.zeros_like, params)
    started, _, report = start.with_bundle(fresh, trained.state, config)
    jax.tree.map(np.testing.assert_array_equal, started["encoder"], trained.params["encoder"])
    assert {name.split("/")[1] for name in report.new} == {"head", "decoder"}
    assert "decoder (" in list(report.lines())[1]


def test_recordings_are_written_down_by_any_search(model, trained, finished, tones, tmp_path):
    bundle.save(model, tmp_path / "model")
    recording = tones / "dev" / "1" / "1" / "1-1-0000.flac"
    by_ctc = speech_jax.load(finished.workdir.folder).transcribe(recording)
    assert by_ctc.text
    say = lambda **decoder: speech_jax.load(tmp_path / "model", decoder=decoder).transcribe(
        recording
    )
    ours = say(ctc_weight=1.0, width=8)
    assert ours.text == by_ctc.text
    assert [word.text for word in ours.words] == by_ctc.text.split()
    times = lambda said: [(word.start, word.end) for word in said.words]
    np.testing.assert_allclose(times(ours), times(by_ctc), atol=0.1)
    assert say(name="greedy").text == by_ctc.text
    assert len(say(name="rescore", nbest=2, width=4).alternatives) == 2
    with pytest.raises(UserError, match=r"with this one it can be greedy, beam, lexicon$"):
        speech_jax.load(finished.workdir.folder, decoder={"name": "joint"})


def test_an_exported_file_has_the_logits_of_ctc(model, trained, tones, tmp_path):
    heard = acoustic.BundleAcoustic(model)
    export.write_sjx(heard, tmp_path / "model.sjx", {})
    recording = tones / "dev" / "1" / "1" / "1-1-0000.flac"
    said = speech_jax.load(tmp_path / "model.sjx").transcribe(recording)
    assert said.text == trained_text(trained, recording)
    with pytest.raises(UserError, match="with this one it can be"):
        speech_jax.load(tmp_path / "model.sjx", decoder={"name": "joint"})


def trained_text(trained, recording):
    return speech_jax.Model(acoustic.BundleAcoustic(trained)).transcribe(recording).text


@pytest.mark.parametrize("encoder", models.ENCODERS)
def test_no_rule_of_an_encoder_is_of_the_decoder(encoder, finished, trained, params):
    """Each parameter has one rule of sharding, whatever the encoder is."""
    task = task_of(finished, trained)
    task = dataclasses.replace(task, encoder=models.make_encoder(encoder))
    for name in rules.names({part: params[part] for part in ("decoder", "head")}):
        rules.only(task.rules, name, "sharding")


def test_without_ctc_there_are_no_logits(finished, trained, params, batch):
    task = task_of(finished, trained, {"name": "attention"}, ctc_weight=0.0)
    assert "head" not in jax.eval_shape(task.init, jax.random.key(0), batch)[0]
    with pytest.raises(UserError, match=r"config\.task\.ctc_weight=0"):
        task.logits(params, trained.state, batch)
    with pytest.raises(UserError, match=r"set config\.decoder\.name='attention'"):
        task_of(finished, trained, {"name": "greedy"}, ctc_weight=0.0)
    without = {name: value for name, value in params.items() if name != "head"}
    found = jax.jit(task.predict)(without, trained.state, batch)
    count = found["labels_length"]
    assert (found["ends"][np.arange(ROWS), np.maximum(count - 1, 0)] <= found["frames"])[:3].all()
    sizes = {"samples": np.asarray([8000]), "labels": np.asarray([500])}
    assert "not alignable" in task.unusable(sizes)[0]


def test_texts_that_do_not_end_are_counted(finished, trained, params, batch):
    task = task_of(finished, trained, {"name": "attention"})
    endless = jax.tree.map(np.array, params)
    endless["decoder"]["output"]["bias"][-1] = -1e9
    found = jax.device_get(jax.jit(task.predict)(endless, trained.state, batch))
    np.testing.assert_array_equal(found["labels_length"], found["frames"])
    measure = task.evaluator(trained.parts)
    source = experiment.open_splits(finished.config, "dev")
    for row in range(2):
        one = {name: array[row] for name, array in found.items()}
        measure.add(source.utterances[row], {}, one)
    assert measure.results()["cut"] == 2
    assert "2 texts did not end" in measure.line()
