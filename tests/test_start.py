"""Pretrain, then fine-tune: the encoder goes over as it is, and one that does not fit is named."""

import json
import pathlib
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from configs import spoken_digits
from speech_jax import bundle, experiment, models, tasks, train
from speech_jax.bundle import huggingface as hf
from speech_jax.bundle import start
from speech_jax.bundle.architectures import KNOWN
from speech_jax.config import default
from speech_jax.data.parts.audio import Audio
from speech_jax.errors import UserError
from speech_jax.training import checkpoint
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax
GOLDEN = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def pretrained(tones, tmp_path_factory) -> runs.Finished:
    """A run of pretraining that came to its end."""
    config, workdir = pretraining(tones), Workdir(tmp_path_factory.mktemp("pretrained"))
    return runs.Finished(config, workdir, train.run(config, workdir))


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


class Labels:
    """A part of five symbols."""

    count = 5


def init(config):
    statistics = None
    if config.features.normalize == "global":
        mels = config.features.mels
        statistics = {"mean": np.zeros(mels, np.float32), "std": np.ones(mels, np.float32)}
    audio = Audio(statistics=statistics)
    task = experiment.make_task(config, {"audio": audio, "labels": Labels()})
    batch = {"audio": jnp.zeros((1, 16_000), jnp.int16), "audio_length": jnp.array([16_000])}
    return jax.jit(task.init)(jax.random.key(1), batch)


def test_pretraining_resumes_bit_for_bit(pretrained, tmp_path):
    """From its second update on: crops, masks, codes and averages are those of the first run."""
    workdir = Workdir(shutil.copytree(pretrained.workdir.folder, tmp_path / "run"))
    shutil.rmtree(workdir.checkpoints / "4")
    workdir.results.unlink()
    results = train.run(pretrained.config, workdir)
    assert results["splits"] == pretrained.results["splits"]
    assert runs.metrics(workdir.folder) == runs.metrics(pretrained.workdir.folder)
    again, whole = (runs.saved_state(one, 4) for one in (workdir, pretrained.workdir))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_pretraining_runs_in_the_loop(pretrained):
    _, workdir, results = pretrained
    assert results["training"]["left_out"] == 0
    assert set(results["splits"]["dev"]) == {
        "error_rate", "accuracy", "loss_per_frame", "masked_frames", "utterances", "left_out",
    }  # fmt: skip
    assert results["splits"]["dev"]["masked_frames"] > 0
    logged = [line for line in runs.metrics(workdir.folder) if "grad_norm" in line]
    assert {"loss_per_frame", "accuracy", "prediction_perplexity"} <= logged[-1].keys()
    assert not (workdir.folder / "tokenizer.json").exists()


def test_a_run_starts_from_the_encoder_of_another(pretrained, tones, tmp_path):
    workdir = pretrained.workdir
    config = fine_tuning(tones, workdir.folder)
    fresh, new = init(config)
    started, state, report = start.with_bundle(fresh, new, config)
    jax.tree.map(np.testing.assert_array_equal, started["head"], fresh["head"])
    lines = "\n".join(report.lines())
    assert f"starts from {workdir.folder}: takes encoder (" in lines
    assert "new: head (85)" in lines
    theirs = bundle.open(workdir.folder)
    theirs = start.flat(theirs.params, theirs.state)
    assert set(report.left_out) == {name for name in theirs if "encoder" not in name} != set()
    moved = lambda old, new: max(
        jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), old, new))
    )
    assert moved(started["encoder"], fresh["encoder"]) > 1e-3
    # It is the averaged encoder.
    found = checkpoint.load_best(workdir.checkpoints, ("ema/encoder", "params/encoder"))
    found = flax.traverse_util.unflatten_dict(found, sep="/")
    ema, raw = (found[name]["encoder"] for name in ("ema", "params"))
    assert moved(started["encoder"], ema) == 0 < moved(ema, raw)
    assert moved(state, new) > 1e-3
    # The same weights, whichever way their layers are kept.
    config.model.scan = True
    scanned, stacked, _ = start.with_bundle(*init(config), config)
    for theirs, ours in ((scanned, started), (stacked["batch_stats"], state["batch_stats"])):
        unstacked = models.unstack_layers(theirs["encoder"])
        jax.tree.map(np.testing.assert_array_equal, unstacked, ours["encoder"])
    # And the loop takes them up.
    config.model.scan = False
    config.schedule.peak = 1e-12
    config.train.ema_decay = 0.9
    train.run(config, Workdir(tmp_path / "finetuned"))
    again = fine_tuning(tones, tmp_path / "finetuned")
    ended = start.with_bundle(fresh, new, again)[0]["encoder"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ended, started["encoder"]
    )


@pytest.mark.parametrize("name", ["wav2vec2_base", "wav2vec2_conformer"])
@pytest.mark.parametrize("scan", [True, False])
def test_a_hugging_face_folder_is_taken_up(scan, name):
    model = hf.read(GOLDEN / name)
    config = default()
    with config.unlocked():
        config.model = model.config.model
        config.model.scan = scan
    config.init.folder = str(GOLDEN / name)
    params, state, _ = start.with_bundle(*init(config), config)
    assert state.keys() == model.state.keys()
    pairs = [(params, model.params)] + [(state[key], model.state[key]) for key in state]
    for ours, theirs in pairs:
        unstacked = models.unstack_layers(ours["encoder"])
        jax.tree.map(np.testing.assert_array_equal, unstacked, theirs["encoder"])
    config.model.heads = 1
    with pytest.raises(UserError, match=r"has model.heads=\d+, and this run config.model.heads=1"):
        start.with_bundle({}, {}, config)


@pytest.mark.parametrize("name", ["wav2vec2_base", "wav2vec2_conformer"])
def test_fine_tuned_and_exported(name, tones, tmp_path):
    """From their folder through our loop to their folder."""
    began = hf.read(GOLDEN / name)
    config = fine_tuning(tones, GOLDEN / name)
    config.features.normalize = "utterance"
    config.optimizer.frozen = (("encoder/extractor/.*", -1),)
    with config.unlocked():
        theirs = began.config.model
        known = {key: theirs[key] for key in KNOWN[theirs.name] if key != "name"}
        config.model = models.settings(theirs.name, "tiny", **known)
    train.run(config, Workdir(tmp_path / "run"))
    model = bundle.open(tmp_path / "run")
    hf.write(model, tmp_path / "theirs")
    again = bundle.open(tmp_path / "theirs")
    vocabulary = json.loads((tmp_path / "theirs" / "vocab.json").read_text())
    assert vocabulary == {"<pad>": 0, "|": 1, "A": 2, "B": 3, "C": 4}
    for text in ("AB C", "CAB"):
        ids = [one.parts["labels"].tokenizer.encode(text) for one in (model, again)]
        assert ids[0] == ids[1]
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, again.state, model.state)
    # What was frozen is what it started from, the rest is not.
    first, last = began.params["encoder"], model.params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, last["extractor"], first["extractor"])
    assert not np.array_equal(last["projection"]["kernel"], first["projection"]["kernel"])
    # Statistics moved by a tenth of the way to those of the one batch.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), model.state, began.state)
    assert all(0 < distance < 1 for distance in jax.tree.leaves(moved))


def test_what_transformers_does_not_know_is_not_exported(pretrained, tmp_path):
    with pytest.raises(UserError, match="task best_rq with a conformer"):
        hf.write(bundle.open(pretrained.workdir.folder), tmp_path / "theirs")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.width", 32, "has model.width=16"),
        ("model.kernel", 7, "has model.kernel=5"),
        ("features.hop_ms", 20.0, "has features.hop_ms=10.0"),
        ("model", models.settings("wavenet", "tiny"), "has model.name='conformer'"),
    ],
)
def test_another_model_is_refused(pretrained, tones, key, value, message):
    config = fine_tuning(tones, pretrained.workdir.folder)
    section, _, name = key.partition(".")
    config[section] = config[section].to_dict() | {name: value} if name else value
    with pytest.raises(UserError, match=message):
        start.with_bundle({}, {}, config)


def test_a_recipe_goes_on_with_the_encoder_of_a_folder(pretrained):
    config = spoken_digits.get_config(f"{pretrained.workdir.folder}+attend")
    for section in ("model", "features"):
        assert config[section].to_json() == pretrained.config[section].to_json()
    assert (config.init.take, config.task.name) == ("encoder", "attend")
    assert config.init.folder == str(pretrained.workdir.folder)


def test_what_differs_begins_anew_where_it_is_named(pretrained, tones):
    """A shape that differs is an error, unless it is named."""
    config = fine_tuning(tones, pretrained.workdir.folder)
    config.features.mels = 8
    fresh, state = init(config)
    with pytest.raises(UserError, match=r"has features.mels=16, and this run config.features.mels"):
        start.with_bundle(fresh, state, config)
    config.init.new = ("head/.*",)
    with pytest.raises(UserError, match=r"encoder/subsampling/project/kernel has the shape \(16"):
        start.with_bundle(fresh, state, config)
    config.init.new = ("encoder/subsampling/project/.*",)
    started, _, report = start.with_bundle(fresh, state, config)
    project = "params/encoder/subsampling/project"
    assert report.new.keys() == {
        f"{project}/kernel", f"{project}/bias", "params/head/kernel", "params/head/bias"
    }  # fmt: skip
    assert report.left_out.keys() >= {f"{project}/kernel", f"{project}/bias"}
    assert "features.mels=16" in report.differing[0]
    theirs = bundle.open(pretrained.workdir.folder).params["encoder"]["layer_0"]
    jax.tree.map(np.testing.assert_array_equal, started["encoder"]["layer_0"], theirs)
    config.init.new = ("encoder/subsampling/projekt/.*",)
    with pytest.raises(UserError, match=r"config.init.new: no parameter matches"):
        start.with_bundle(fresh, state, config)
    config.init.update({"new": (), "take": "model"})
    config.features.mels = 16
    with pytest.raises(UserError, match=r"has task.name='best_rq', and this run"):
        start.with_bundle(fresh, state, config)


def test_a_folder_without_a_model_is_named(tones, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        start.with_bundle({}, {}, fine_tuning(tones, tmp_path))
