"""Schedules at their corners; rules for decay and freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.training import optim

pytestmark = pytest.mark.optax

PARAMS = {
    "layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones(2)},
}


def rates(name, steps, **kwargs):
    schedule = optim.make_schedule(name, peak=2.0, steps=steps, **kwargs)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_schedules_warm_up_reach_their_peak_and_decay():
    for name in ("constant", "cosine", "exponential", "noam", "polynomial"):
        values = rates(name, 100, warmup=10)
        assert 0 < values[0] <= 0.2 + 1e-6, name
        assert values[9] == pytest.approx(2.0), name
        assert max(values) == pytest.approx(2.0), name
        assert np.all(np.diff(values[:10]) > 0), name
        assert np.all(np.diff(values[10:]) <= 1e-6), name
    assert rates("constant", 50, warmup=10)[50] == 2.0
    assert rates("cosine", 100, warmup=10)[100] == pytest.approx(0.0, abs=1e-6)
    assert rates("cosine", 100, warmup=10, final=0.1)[100] == pytest.approx(0.2)
    assert rates("exponential", 100, warmup=10, hold=20)[29] == pytest.approx(2.0)
    assert rates("exponential", 100, warmup=10, hold=20)[100] == pytest.approx(0.02)
    assert rates("polynomial", 110, warmup=10)[60] == pytest.approx(1.0)
    assert rates("polynomial", 110, warmup=10, power=2.0)[60] == pytest.approx(0.5)
    assert rates("noam", 100, warmup=10)[39] == pytest.approx(2.0 * (10 / 40) ** 0.5)


def test_tri_stage_has_three_stages():
    values = rates("tri_stage", 100)
    assert values[0] == pytest.approx(0.02)
    assert values[10] == values[49] == pytest.approx(2.0)
    assert values[100] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="add up to 1"):
        optim.make_schedule("tri_stage", peak=1.0, steps=10, fractions=(0.5, 0.5, 0.5))


def update(tx, steps=1, gradient=0.0):
    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
        changes, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, changes), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lion"])
def test_decay_spares_what_the_rule_names(name):
    tx = optim.make_optimizer(name, lambda _: 0.1, PARAMS, weight_decay=0.5, no_decay="bias$")
    moved = update(tx)
    assert np.all(moved["layer"]["kernel"] < 1)
    assert np.all(moved["head"]["kernel"] < 1)
    np.testing.assert_array_equal(moved["layer"]["bias"], 1)


def test_frozen_parameters_stand_still_until_their_time():
    tx = optim.make_optimizer(
        "sgd", lambda _: 0.1, PARAMS, frozen=[("layer/bias", 2), ("^head", -1)]
    )
    for steps, bias in ((2, 1.0), (3, 0.9)):
        moved = update(tx, steps=steps, gradient=1.0)
        np.testing.assert_allclose(moved["layer"]["kernel"], 1 - 0.1 * steps, rtol=1e-6)
        np.testing.assert_allclose(moved["layer"]["bias"], bias, rtol=1e-6)
        np.testing.assert_array_equal(moved["head"]["kernel"], 1)


def test_clipping_bounds_the_global_norm():
    moved = update(optim.make_optimizer("sgd", lambda _: 1.0, PARAMS, clip_norm=0.5), gradient=9.0)
    change = jax.tree.map(jnp.subtract, PARAMS, moved)
    norm = np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(change)))
    assert norm == pytest.approx(0.5, rel=1e-5)


def test_mistakes_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        optim.make_optimizer("adammw", lambda _: 0.1, PARAMS)
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        optim.make_optimizer("adamw", lambda _: 0.1, PARAMS, weight_decy=0.1)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        optim.make_schedule("cosin", peak=1.0, steps=1)
    with pytest.raises(ValueError, match="did you mean 'warmup'"):
        optim.make_schedule("cosine", peak=1.0, steps=1, warm_up=1)
    with pytest.raises(ValueError, match="no parameter matches 'heads'"):
        optim.make_optimizer("sgd", lambda _: 0.1, PARAMS, frozen=[("heads", 1)])
