"""The loop end to end: it learns, resumes exactly, skips what is not finite, adds up globally."""

import json
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import runs
from speech_jax import evaluate, experiment, train
from speech_jax.data.plan import Bucket
from speech_jax.training import checkpoint
from speech_jax.training import step as steps

pytestmark = pytest.mark.optax


def long_config(root):
    return runs.tiny_config(root, steps=120, eval_every=60, log_every=20, ema_decay=0.8)


@pytest.fixture(scope="module")
def finished(tones, tmp_path_factory):
    """A workdir that was trained until the tones are recognized, and its results."""
    workdir = tmp_path_factory.mktemp("finished")
    config = long_config(tones)
    config.data.test_splits = "train"
    return config, workdir, train.run(config, workdir)


def test_it_learns_and_says_so(finished):
    _, workdir, results = finished
    assert results == json.loads((workdir / "results.json").read_text())
    assert results["splits"]["dev"]["wer"] < 0.2
    assert results["splits"]["train"]["utterances"] == 48
    figures = results["training"]
    assert figures["steps"] == 120
    assert figures["audio_seconds_per_second"] > 0
    assert 0 < figures["mfu"] < 1
    assert results["config"]["train"]["steps"] == 120
    assert results["versions"]["jax"] == jax.__version__

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_per_label"] for line in lines if "loss_per_label" in line]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    after_start = [line["compiles"] for line in lines if "compiles" in line and line["step"] > 60]
    assert len(set(after_start)) == 1, "something was compiled after the first evaluation"
    assert all(0 <= line["padding_fraction"] < 1 for line in lines if "padding_fraction" in line)

    predictions = (workdir / "predictions" / "dev.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in predictions} == {f"1-1-{i:04d}" for i in range(6)}


def test_evaluation_adds_its_splits_and_agrees(finished):
    config, workdir, results = finished
    before = results["splits"]
    with config.unlocked():
        config.data.eval_splits = "dev"
        config.mesh.fsdp, config.mesh.data, config.data.batch_seconds = 1, -1, 6.0
    again = evaluate.run(config, workdir)
    assert again["splits"] == before
    assert again["training"] == results["training"]


def test_a_finished_run_is_only_scored_again(finished):
    config, workdir, results = finished
    config = long_config(config.data.root)
    assert train.run(config, workdir)["splits"]["dev"] == results["splits"]["dev"]


def test_another_configuration_is_refused(finished, tmp_path):
    config, workdir, _ = finished
    other = long_config(config.data.root)
    other.train.steps = 121
    with pytest.raises(experiment.WorkdirError, match=r"config.train.steps=120, not 121"):
        train.run(other, workdir)
    with pytest.raises(experiment.WorkdirError, match="train there first"):
        evaluate.run(config, tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(experiment.WorkdirError, match="cannot"):
        experiment.check_workdir(blocked / "work", config)


def test_a_start_that_failed_does_not_hold_the_workdir(tones, tmp_path):
    config = runs.tiny_config(tones)
    experiment.check_workdir(tmp_path, config)
    (tmp_path / "tokenizer.json").write_text("of other settings")
    config.text.normalizer = "upper"
    experiment.check_workdir(tmp_path, config)
    assert not list(tmp_path.iterdir())
    experiment.record_config(tmp_path, config)
    experiment.check_workdir(tmp_path, config)
    config.text.normalizer = "lower"
    with pytest.raises(experiment.WorkdirError, match=r"normalizer='upper', not 'lower'"):
        experiment.check_workdir(tmp_path, config)


# ---- One step ----------------------------------------------------------------------------------


class Linear:
    """A task whose loss is weight * (w . audio), with a 'nan' row where audio is 99."""

    def init(self, rng, batch):
        return {"kernel": jnp.ones(4)}, {}

    def loss(self, params, state, batch, rng=None, step=0):
        values = batch["audio"] @ params["kernel"]
        values = jnp.where(batch["audio"][:, 0] == 99, jnp.nan, values)
        aux = {"state": state, "sums": {"rows": batch["weight"].sum()}}
        return (values * batch["weight"]).sum(), batch["weight"].sum(), aux


def linear_batch(rows=6):
    rng = np.random.default_rng(0)
    return {
        "audio": jnp.asarray(rng.standard_normal((rows, 4)), jnp.float32),
        "audio_length": jnp.full(rows, 4),
        "weight": jnp.asarray(rng.uniform(0, 1, rows), jnp.float32),
    }


def linear_state(tx, sums):
    params = {"kernel": jnp.ones(4)}
    return steps.TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key(0),
        params=params,
        model_state={},
        opt_state=tx.init(params),
        ema=params,
        sums={name: jnp.zeros(()) for name in (*train.SUMS, *sums)},
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_in_parts_is_the_whole_batch(count):
    function = steps.accumulate(steps.gradients(Linear()), count)
    batch = linear_batch()
    gradient, loss = jax.jit(function)({"kernel": jnp.ones(4)}, {}, batch, jax.random.key(0), 0)
    expected = (batch["audio"] * batch["weight"][:, None]).sum(0)
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss.sum, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.weight, batch["weight"].sum(), rtol=1e-6)
    np.testing.assert_allclose(loss.aux["sums"]["rows"], loss.weight)


def test_parts_must_divide_the_rows():
    function = steps.accumulate(steps.gradients(Linear()), 4)
    with pytest.raises(ValueError, match="6 rows cannot be accumulated in 4 parts"):
        function({"kernel": jnp.ones(4)}, {}, linear_batch(), jax.random.key(0), 0)


def test_an_update_that_is_not_finite_changes_nothing_but_the_counts():
    tx = optax.adam(0.1)
    step = jax.jit(steps.make_step(steps.gradients(Linear()), tx, ema_decay=0.5, log_every=3))
    good, bad = linear_batch(), linear_batch()
    bad["audio"] = bad["audio"].at[0, 0].set(99)
    state, _, finite = step(linear_state(tx, ["rows"]), good)
    assert bool(finite)
    after, sums, finite = step(state, bad)
    assert not bool(finite)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert int(after.step) == 2
    assert (float(sums["skipped"]), float(sums["steps"])) == (1, 1)
    assert np.isfinite([float(x) for x in sums.values()]).all()
    final, sums, _ = step(after, good)
    assert float(sums["steps"]) == 2
    assert not any(float(x) for x in final.sums.values()), "sums start anew after a logged step"
    expected = state.ema["kernel"] / 2 + final.params["kernel"] / 2
    np.testing.assert_allclose(final.ema["kernel"], expected, rtol=1e-6)


def test_too_many_of_them_end_the_run(tones, tmp_path):
    config = runs.tiny_config(tones, max_skipped=2)
    config.schedule.peak = 1e30
    config.optimizer.clip_norm = None
    with pytest.raises(ValueError, match=r"max_skipped=2: lower the learning rate"):
        train.run(config, tmp_path)


# ---- Interruptions -----------------------------------------------------------------------------


def saved_state(workdir, config):
    """Every array of the newest checkpoint."""
    mesh = experiment.sharding.make_mesh(devices=jax.devices()[:1])
    tokenizer = experiment.make_tokenizer(config, workdir)
    task = experiment.make_task(config, tokenizer.vocabulary_size)
    schedule = train.optim.make_schedule(steps=config.train.steps, **config.schedule)
    probe = train.batch_shapes(Bucket(32_000, 24, 4), mesh)
    abstract, _, _ = train.abstract_state(config, task, schedule, mesh, probe)
    with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(abstract)
    raw = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        restored.state,
    )
    return restored.step, raw


def wait_for(workdir, step, process):
    """Until metrics.jsonl holds `step`."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or f'{{"step": {step},' not in path.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_killed_and_restarted_is_bit_for_bit_uninterrupted(tones, tmp_path):
    config = runs.tiny_config(tones, steps=10)
    outcomes = {}
    for name, end in (("whole", None), ("killed", signal.SIGKILL), ("told", signal.SIGTERM)):
        folder = tmp_path / name
        folder.mkdir()
        command = runs.command(folder, tones, steps=10)
        if end:
            process = subprocess.Popen(
                command, cwd=runs.ROOT, env=runs.environment(), stderr=subprocess.PIPE, text=True
            )
            wait_for(folder / "work", 4, process)
            process.send_signal(end)
            code = process.wait()
            assert code == (-signal.SIGKILL if end == signal.SIGKILL else 0)
            process.stderr.close()
        runs.run(command)
        outcomes[name] = saved_state(folder / "work", config), runs.metrics(folder / "work")
    (step, whole), lines = outcomes.pop("whole")
    assert step == 10
    for name, ((other_step, state), other_lines) in outcomes.items():
        assert other_step == step
        jax.tree.map(np.testing.assert_array_equal, state, whole)
        assert other_lines == lines, name


def test_a_batch_that_does_not_fit_is_refused_before_training(tones, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "host_memory", lambda: 1_000)
    with pytest.raises(train.TrainingError, match=r"this machine has 0: lower config\.data\.batch"):
        train.run(runs.tiny_config(tones), tmp_path)
    assert not (tmp_path / "config.json").exists()
