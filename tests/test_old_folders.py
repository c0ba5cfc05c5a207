"""Folders that the code before bundles and parts has written: they open, evaluate and go on.

tests/data/old_workdir is a run of six updates on the tones of conftest.py, as runs.tiny_config has
it, without what it wrote after its checkpoint of update 4; its metrics are whole.
tests/data/old_model_folder is tests/data/wav2vec2_base as its import saved it.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import runs
import speech_jax
from speech_jax import bundle, train
from speech_jax.bundle import huggingface, start
from speech_jax.deploy import acoustic
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax
DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture
def old(tmp_path) -> Workdir:
    """A copy of the old workdir."""
    return Workdir(shutil.copytree(DATA / "old_workdir", tmp_path / "work"))


def test_a_workdir_opens():
    model = bundle.open(DATA / "old_workdir")
    assert (model.config.task.name, model.config.model.width) == ("recognize", 16)
    labels, audio = model.parts["labels"], model.parts["audio"]
    assert labels.tokenizer.decode(labels.tokenizer.encode("AB CA")) == "AB CA"
    recorded = json.loads((DATA / "old_workdir" / "features.json").read_text())
    np.testing.assert_allclose(audio.statistics["mean"], recorded["mean"], rtol=1e-6)
    assert model.params["head"]["kernel"].shape == (16, 5)
    assert (
        str(
            speech_jax.Model(acoustic.BundleAcoustic(model)).transcribe(
                np.zeros(16_000, np.float32)
            )
        )
        == ""
    )


def test_a_workdir_evaluates(old, tones):
    results = train.evaluate(runs.tiny_config(tones), old, lambda line: None)
    found = results["splits"]["dev"]
    assert (found["utterances"], found["left_out"], found["words"]) == (6, 0, 16)
    assert (found["wer"], found["deletions"]) == (1.0, 16)  # as it was said to be then


def test_a_workdir_goes_on_to_its_end(old, tones):
    """What it then says of its updates is what the code of before said of them."""
    before = by_step(old)
    results = train.run(runs.tiny_config(tones), old)
    after = by_step(old)
    assert after.keys() == before.keys() == {2, 3, 4, 6}
    for step, was in before.items():
        now = after[step]
        for name in ("loss_per_label", "grad_norm", "learning_rate", "dev/wer", "dev/cer"):
            assert (name in was) == (name in now)
            assert was.get(name, 0) == pytest.approx(now.get(name, 0), rel=1e-3)
    assert max(runs.steps(old)) == results["training"]["steps"] == 6
    assert results["splits"]["dev"]["utterances"] == 6
    assert bundle.open(old.folder).config.to_dict() == old.recorded().to_dict()


def by_step(workdir: Workdir) -> dict[int, dict]:
    """The metrics of each step, which was on several lines before."""
    found: dict[int, dict] = {}
    for line in map(json.loads, workdir.metrics.read_text().splitlines()):
        found.setdefault(line["step"], {}).update(line)
    return found


def test_a_run_starts_from_an_old_workdir(old, tones, tmp_path):
    config = runs.tiny_config(tones)
    config.init.folder = str(old.folder)
    setup = runs.setup(config, Workdir(tmp_path))
    state = setup.fresh_state()
    params, *_ = start.with_bundle(state.params, state.model_state, config)
    jax.tree.map(
        np.testing.assert_array_equal, params["encoder"], bundle.open(old.folder).params["encoder"]
    )


def test_a_model_folder_opens_and_transcribes():
    model = bundle.open(DATA / "old_model_folder")
    theirs = huggingface.read(DATA / "wav2vec2_base")
    jax.tree.map(np.testing.assert_array_equal, model.params, theirs.params)
    tokenizer = model.parts["labels"].tokenizer
    assert tokenizer.decode(tokenizer.encode("BAD CAB'E")) == "BAD CAB'E"
    assert tokenizer.encode("BAD") == theirs.parts["labels"].tokenizer.encode("BAD")
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    found = speech_jax.load(DATA / "old_model_folder").transcribe(noise)
    assert found.seconds == 1.5
    assert str(found) == str(speech_jax.load(DATA / "wav2vec2_base").transcribe(noise))
