"""The loop end to end: it learns, resumes exactly, and ends where going on is of no use."""

import functools
import importlib.metadata
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

import runs
from speech_jax import experiment, tasks, train
from speech_jax.data.batch import Bucket
from speech_jax.errors import UserError
from speech_jax.evaluators.errors import Errors
from speech_jax.training import costs
from speech_jax.training.checkpoint import Checkpoints
from speech_jax.workdir import Workdir, WorkdirError

pytestmark = pytest.mark.optax


def test_it_learns_and_says_so(finished):
    config, workdir, results = finished
    assert results == json.loads(workdir.results.read_text())
    assert results["splits"]["dev"]["wer"] < 0.2
    assert results["splits"]["train"]["utterances"] == 48
    figures = results["training"]
    assert figures["steps"] == 120
    assert figures["audio_seconds_per_second"] > 0
    assert 0 < figures["mfu"] < 1
    assert (figures["left_out"], figures["unreadable"], figures["skipped_updates"]) == (0, 0, 0)
    assert results["config"]["train"]["steps"] == config.train.steps == 120
    assert results["versions"]["jax"] == jax.__version__

    lines = [json.loads(line) for line in workdir.metrics.read_text().splitlines()]
    losses = [line["loss_per_label"] for line in lines if "loss_per_label" in line]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    after_start = [line["compiles"] for line in lines if "compiles" in line and line["step"] > 60]
    assert len(set(after_start)) == 1, "something was compiled after the first evaluation"
    shapes = json.loads(workdir.plan.read_text())["batches"]
    steps = json.loads((workdir.folder / "compiled.json").read_text())
    assert len(steps) == len(shapes), "a step was compiled twice, or never"
    assert [line["step"] for line in lines if "dev/wer" in line] == [60, 120]

    predictions = workdir.predictions("dev").read_text().splitlines()
    assert {json.loads(line)["id"] for line in predictions} == {f"1-1-{i:04d}" for i in range(6)}


def test_a_finished_run_is_only_evaluated_again(finished, tmp_path, monkeypatch):
    """Here by a checkout that is not installed, which says so in its results."""

    def version(name: str) -> str:
        if name == "speech_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    workdir = Workdir(shutil.copytree(finished.workdir.folder, tmp_path / "work"))
    workdir.results.unlink()
    results = train.run(runs.learning_config(finished.config.data.root), workdir)
    assert results["splits"] == finished.results["splits"]
    assert results["training"]["steps"] == 120
    assert results["versions"]["speech_jax"] == "not installed"
    assert results["versions"]["jax"] == jax.__version__


def test_another_configuration_is_refused(finished, tmp_path):
    config, workdir, _ = finished
    other = runs.learning_config(config.data.root)
    other.train.steps = 121
    with pytest.raises(WorkdirError, match=r"config.train.steps=120, not 121"):
        train.run(other, workdir)
    other = runs.learning_config(config.data.root)
    with other.unlocked():
        other.task = tasks.settings("best_rq")
    with pytest.raises(WorkdirError, match=r"config.task.name='recognize', not 'best_rq'"):
        train.run(other, workdir)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(WorkdirError, match="cannot"):
        train.run(config, Workdir(blocked / "work"))


def test_starts_that_failed_do_not_hold_the_workdir(tones, tmp_path, monkeypatch):
    """What one of them had learned of the data is made anew by the next."""
    workdir, config = Workdir(tmp_path), runs.tiny_config(tones)
    config.text.normalizer = "lower"
    config.data.eval_splits = "no such split"
    with pytest.raises(UserError, match="no such split"):
        train.run(config, workdir)
    labels = experiment.restore_parts(config, tmp_path)["labels"]
    assert set(labels.tokenizer.alphabet) == set("abc ")
    # Recordings that are too long to evaluate are refused before the training, and batches that do
    # not fit.
    config = runs.tiny_config(tones)
    config.data.eval_max_seconds = 1.0
    for dev, test in (("dev", ""), ("", "dev")):
        config.data.eval_splits, config.data.test_splits = dev, test
        with pytest.raises(
            UserError, match=r"utterance 1-1-\d+ of dev lasts 2 s, and config.data.ev"
        ):
            train.run(config, workdir)
    config = runs.tiny_config(tones)
    config.data.max_seconds = 1.0  # of training, so that evaluation has a shape of its own
    main = threading.current_thread()  # training steps are compiled in others

    def memory(of_training: bool) -> int:
        here = threading.current_thread() is main
        return 2**40 if here == of_training else 1_000

    for training, refused in (
        (True, r"a batch of .* this machine has 0: lower config\.data\.batch"),
        (False, r"evaluating utterance 1-1-\d+ of dev .* needs .* this machine has 0: cut"),
    ):
        monkeypatch.setattr(costs, "host_memory", functools.partial(memory, training))
        with pytest.raises(UserError, match=refused):
            train.run(config, workdir)
    labels = experiment.restore_parts(config, tmp_path)["labels"]
    assert set(labels.tokenizer.alphabet) == set("ABC ")
    assert not workdir.config.exists()


def test_a_compiler_that_runs_out_of_memory_is_one_line():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in\nspace hbm")

    with pytest.raises(UserError, match=r"^a batch does not fit in .* a device: less$"):
        costs.compile_within_memory(Lowered(), "a batch", "less")


def test_too_many_updates_that_are_not_finite_end_the_run(tones, tmp_path, monkeypatch):
    def broken(setup):
        state, said = first(setup)
        broken = jax.tree.map(lambda x: x * np.float32("nan"), state.params)
        return state.replace(params=broken), said

    first = train._first_state
    monkeypatch.setattr(train, "_first_state", broken)
    with pytest.raises(UserError, match=r"3 updates .*max_skipped=2: lower the learning rate"):
        train.run(runs.tiny_config(tones, max_skipped=2), Workdir(tmp_path))


# ---- Interruptions -----------------------------------------------------------------------------


def outcome(workdir: Workdir) -> dict:
    """All that a run leaves behind, apart from what the clock says."""
    return {
        "state": {name: value.tobytes() for name, value in runs.saved_state(workdir).items()},
        "checkpoints": {step: runs.record(workdir, step) for step in runs.steps(workdir)},
        "metrics": runs.metrics(workdir.folder),
        "splits": json.loads(workdir.results.read_text())["splits"],
        "predictions": workdir.predictions("dev").read_text(),
    }


@pytest.fixture(scope="module")
def whole(tones, tmp_path_factory) -> runs.Finished:
    """Six updates, evaluated after the third and the last one on 48 and 6 utterances."""
    config, workdir = runs.tiny_config(tones), Workdir(tmp_path_factory.mktemp("whole"))
    config.data.eval_splits = "train,dev"
    return runs.Finished(config, workdir, train.run(config, workdir))


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_interrupted_ends_bit_for_bit_as_if_it_had_not_been(
    killed, whole, tmp_path, monkeypatch
):
    """Killed after a checkpoint and one more update, or told to leave after it."""
    workdir = Workdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "training_batches", runs.interrupted(5, killed=killed))
        if killed:
            with pytest.raises(runs.Killed):
                train.run(whole.config, workdir)
        else:
            assert train.run(whole.config, workdir) is None
    assert max(runs.steps(workdir)) == (4 if killed else 6)
    assert not workdir.results.exists()
    train.run(whole.config, workdir)
    assert outcome(workdir) == outcome(whole.workdir)


def test_patience_survives_a_kill(whole, tmp_path, monkeypatch):
    """It is of two evaluations that are no better, one before the kill and one after it."""
    config, workdir = whole.config.copy_and_resolve_references(), Workdir(tmp_path)
    config.data.eval_splits = "dev"
    config.train.eval_every = 1
    config.checkpoint.update({"every": 1, "patience": 2, "min_delta": 10.0})
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "training_batches", runs.interrupted(2, killed=True))
        with pytest.raises(runs.Killed):
            train.run(config, workdir)
    assert runs.record(workdir, 2)["stopper"]["count"] == 1
    assert train.run(config, workdir)["training"]["steps"] == 3
    assert max(runs.steps(workdir)) == 3


# In the first evaluation, in that after the last update, and in that of the results.
@pytest.mark.parametrize("utterance", [1, 54 + 10, 2 * 54 + 10])
def test_what_leaves_during_an_evaluation_makes_it_first_when_it_is_back(
    utterance, whole, tmp_path, monkeypatch
):
    workdir, counted, saved = Workdir(tmp_path), [], []
    add, save = Errors.add, Checkpoints.save

    def told(self, *arguments):
        counted.append(arguments)
        if len(counted) == utterance:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, *arguments)

    def killed(self, step, *arguments, metrics, **others):
        saved.append(step)
        if metrics:  # it has been evaluated, and will be saved
            raise runs.Killed
        return save(self, step, *arguments, metrics=metrics, **others)

    with monkeypatch.context() as patched:
        patched.setattr(Errors, "add", told)
        assert train.run(whole.config, workdir) is None
    assert not workdir.results.exists()
    assert utterance <= len(counted) < utterance + 40, "it has not waited for the whole evaluation"
    step = max(runs.steps(workdir))
    assert step == (3 if utterance == 1 else 6)
    assert runs.record(workdir, step)["data"]["pending"] == (utterance < 2 * 54)

    if utterance == 1:
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", killed)
            with pytest.raises(runs.Killed):
                train.run(whole.config, workdir)
        assert saved == [3]
    train.run(whole.config, workdir)
    assert outcome(workdir) == outcome(whole.workdir)


# ---- Another mesh ------------------------------------------------------------------------------


def test_another_mesh_takes_the_recorded_batches(finished, tmp_path, monkeypatch):
    """Eight rows for eight devices; a model in eight parts would take four, of the same seconds."""
    config = runs.learning_config(finished.config.data.root)
    ids, started = {}, tmp_path / "started"
    monkeypatch.setattr(experiment, "training_batches", runs.interrupted(2))
    assert train.run(config, Workdir(started)) is None
    monkeypatch.undo()
    for name, (fsdp, tensor) in {"same": (8, 1), "other": (1, 8)}.items():
        config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
        seen = ids.setdefault(name, [])
        monkeypatch.setattr(experiment, "training_batches", runs.interrupted(2, seen))
        assert train.run(config, Workdir(shutil.copytree(started, tmp_path / name))) is None
        monkeypatch.undo()
    assert ids["other"] == ids["same"]
    assert [len(batch) for batch in ids["same"]] == [8, 8, 8]
    same, other = (runs.saved_state(Workdir(tmp_path / name), 6) for name in ("same", "other"))
    assert same.keys() == other.keys()
    for name, value in same.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_another_mesh_that_cannot_share_the_batches_is_refused(finished, tmp_path):
    workdir, config = Workdir(tmp_path), runs.learning_config(finished.config.data.root)
    workdir.prepare([])
    experiment.make_parts(config, workdir.folder, experiment.open_training(config))
    workdir.record(config)
    sizes = (("samples", 32_000), ("labels", 8))
    workdir.record_plan([Bucket(8, sizes), Bucket(4, sizes)], "", 48)
    with pytest.raises(UserError, match=r"batches of 4 rows, which 8 parts .* use a mesh"):
        train.run(config, workdir)
