"""Pretrain, then fine-tune: the encoder goes over as it is, and one that does not fit is named."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from speech_jax import evaluate, experiment, models, tasks, train
from speech_jax.bundle import huggingface as hf
from speech_jax.bundle import start as pretrained
from speech_jax.config import default
from speech_jax.errors import UserError
from speech_jax.training import checkpoint

pytestmark = pytest.mark.optax
GOLDEN = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def finished(tones, tmp_path_factory):
    """(workdir, results) of a pretraining run of the command's own loop."""
    workdir = tmp_path_factory.mktemp("pretrained")
    return workdir, train.run(pretraining(tones), workdir)


def pretraining(tones):
    config = runs.tiny_config(tones, steps=4, eval_every=2, ema_decay=0.5)
    config.model.conv_norm = "batch"
    config.task = tasks.settings("best_rq", codes=20, mask_length=2)
    config.data.max_seconds = 1.0  # most are longer: they are cropped, not left out
    return config


def fine_tuning(tones, folder):
    config = runs.tiny_config(tones, steps=1)
    config.model.conv_norm = "batch"
    config.init.folder = str(folder)
    return config


def init(config):
    task = experiment.make_task(config, 5, {"mean": np.zeros(16), "std": np.ones(16)})
    batch = {"audio": jnp.zeros((1, 16_000), jnp.int16), "audio_length": jnp.array([16_000])}
    return jax.jit(task.init)(jax.random.key(1), batch)


def test_pretraining_resumes_bit_for_bit(finished, tones, tmp_path):
    """From its second update on: crops, masks, codes and averages are those of the first run."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "results.json").unlink()
    results = train.run(pretraining(tones), workdir)
    assert results["splits"] == finished[1]["splits"]
    assert runs.metrics(workdir) == runs.metrics(finished[0])
    again, whole = evaluate.open_run(workdir), evaluate.open_run(finished[0])
    for ours, theirs in ((again.params, whole.params), (again.state, whole.state)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_pretraining_runs_in_the_loop(finished):
    workdir, results = finished
    assert results["training"]["left_out"] == 0
    assert set(results["splits"]["dev"]) == {
        "error_rate",
        "accuracy",
        "loss_per_frame",
        "masked_frames",
        "utterances",
    }
    assert results["splits"]["dev"]["masked_frames"] > 0
    logged = [line for line in runs.metrics(workdir) if "grad_norm" in line]
    assert {"loss_per_frame", "accuracy", "prediction_perplexity"} <= logged[-1].keys()
    assert not (workdir / "tokenizer.json").exists()


def test_a_run_starts_from_the_encoder_of_another(finished, tones, tmp_path):
    workdir = finished[0]
    config = fine_tuning(tones, workdir)
    fresh, new = init(config)
    started, state = pretrained.with_encoder(fresh, new, config)
    jax.tree.map(np.testing.assert_array_equal, started["head"], fresh["head"])
    moved = lambda old, new: max(
        jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), old, new))
    )
    assert moved(started["encoder"], fresh["encoder"]) > 1e-3
    # It is the averaged encoder.
    place = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), started["encoder"]
    )
    ema, raw = (
        checkpoint.restore_params(str(workdir / "checkpoints"), {"encoder": place}, prefix=prefix)
        for prefix in ("ema", "params")
    )
    assert moved(started["encoder"], ema["encoder"]) == 0 < moved(ema["encoder"], raw["encoder"])
    assert moved(state, new) > 1e-3
    # The same weights, whichever way their layers are kept.
    config.model.scan = True
    scanned, stacked = pretrained.with_encoder(*init(config), config)
    for theirs, ours in ((scanned, started), (stacked["batch_stats"], state["batch_stats"])):
        unstacked = models.unstack_layers(theirs["encoder"])
        jax.tree.map(np.testing.assert_array_equal, unstacked, ours["encoder"])
    # And the loop takes them up.
    config.model.scan = False
    config.schedule.peak = 1e-12
    config.train.ema_decay = 0.9
    train.run(config, tmp_path / "finetuned")
    again = fine_tuning(tones, tmp_path / "finetuned")
    ended = pretrained.with_encoder(fresh, new, again)[0]["encoder"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ended, started["encoder"]
    )


@pytest.mark.parametrize("name", ["wav2vec2_base", "wav2vec2_conformer"])
@pytest.mark.parametrize("scan", [True, False])
def test_a_hugging_face_folder_is_taken_up(scan, name):
    model = hf.read(GOLDEN / name)
    config = default()
    with config.unlocked():
        config.model = {**model.encoder, "scan": scan}
    config.init.folder = str(GOLDEN / name)
    params, state = pretrained.with_encoder(*init(config), config)
    assert state.keys() == model.state.keys()
    pairs = [(params, model.params)] + [(state[key], model.state[key]) for key in state]
    for ours, theirs in pairs:
        unstacked = models.unstack_layers(ours["encoder"])
        jax.tree.map(np.testing.assert_array_equal, unstacked, theirs["encoder"])
    config.model.heads = 1
    with pytest.raises(UserError, match=r"has model.heads=\d+, and this run config.model.heads=1"):
        pretrained.with_encoder({}, {}, config)


@pytest.mark.parametrize("name", ["wav2vec2_base", "wav2vec2_conformer"])
def test_fine_tuned_and_exported(name, tones, tmp_path):
    """From their folder through our loop to their folder."""
    began = hf.read(GOLDEN / name)
    config = fine_tuning(tones, GOLDEN / name)
    config.features.normalize = "utterance"
    config.optimizer.frozen = (("encoder/extractor/.*", -1),)
    with config.unlocked():
        settings = dict(began.encoder)
        config.model = models.settings(settings.pop("name"), "tiny", **settings)
    train.run(config, tmp_path / "run")
    model = hf.load(tmp_path / "run")
    hf.write(model, tmp_path / "theirs")
    again = hf.read(tmp_path / "theirs")
    assert again.vocabulary == model.vocabulary == ["<pad>", "|", "A", "B", "C"]
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, again.state, model.state)
    # What was frozen is what it started from, the rest is not.
    start, end = began.params["encoder"], model.params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, end["extractor"], start["extractor"])
    assert not np.array_equal(end["projection"]["kernel"], start["projection"]["kernel"])
    # Statistics moved by a tenth of the way to those of the one batch.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), model.state, began.state)
    assert all(0 < distance < 1 for distance in jax.tree.leaves(moved))


def test_what_transformers_does_not_know_is_not_exported(finished):
    with pytest.raises(UserError, match="task best_rq with a conformer"):
        hf.load(finished[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.width", 32, "has model.width=16"),
        ("model.kernel", 7, "has model.kernel=5"),
        ("features.hop_ms", 20.0, "has features.hop_ms=10.0"),
        ("model.name", "wav2vec2", "has model.name='conformer'"),
    ],
)
def test_another_model_is_refused(finished, tones, key, value, message):
    config = fine_tuning(tones, finished[0])
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        pretrained.with_encoder({}, {}, config)


def test_a_folder_without_a_model_is_named(tones, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        pretrained.with_encoder({}, {}, fine_tuning(tones, tmp_path))
