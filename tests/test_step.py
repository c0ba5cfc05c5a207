"""One step: micro-batches add up, what is not finite is skipped, the average warms up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speech_jax.data.batch import Field
from speech_jax.training import step as steps

pytestmark = pytest.mark.optax


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
        sums={name: jnp.zeros(()) for name in (*steps.SUMS, *sums)},
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
    decay = 3 / 12  # of the third update
    expected = decay * state.ema["kernel"] + (1 - decay) * final.params["kernel"]
    np.testing.assert_allclose(final.ema["kernel"], expected, rtol=1e-6)


def test_the_average_warms_up():
    """It follows the newest weights at first, and forgets the random ones it started from."""
    decays = np.asarray(steps.average_decay(0.9999, jnp.arange(200_000)))
    assert decays[0] == pytest.approx(0.1)
    assert (np.diff(decays) >= 0).all()
    assert decays[-1] == pytest.approx(0.9999)
    assert float(steps.average_decay(0.5, jnp.int32(100))) == 0.5
    # What is left of the first weights at the first evaluation of a long run.
    assert decays[:2_000].astype(np.float64).prod() < 1e-9

    tx = optax.sgd(0.0)
    step = jax.jit(steps.make_step(steps.gradients(Linear()), tx, ema_decay=0.9999))
    state = linear_state(tx, ["rows"])
    state = state.replace(ema={"kernel": 100 + state.params["kernel"]})
    for _ in range(4):
        state, *_ = step(state, linear_batch())
    share = float((state.ema["kernel"] - state.params["kernel"]).max() / 100)
    assert share == pytest.approx(1 / 10 * 2 / 11 * 3 / 12 * 4 / 13, rel=1e-3)


def test_what_is_measured_is_the_audio_or_else_what_has_lengths():
    audio, labels = Field("int16", ("samples",)), Field("int32", ("labels",))
    assert steps.measured({"labels": labels, "audio": audio}) == "audio"
    assert steps.measured({"speaker": Field("int32"), "labels": labels}) == "labels"
