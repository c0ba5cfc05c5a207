"""Schedules at their corners; what learns, how fast and with how much decay."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from speech_jax import config as defaults
from speech_jax import experiment, models, rules
from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.training import groups, optim, sharding

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
    # A warm-up in steps takes the place of the first stage.
    assert rates("tri_stage", 100, warmup=20)[20] == pytest.approx(2.0)
    assert rates("tri_stage", 100, warmup=20)[19] < 1.95
    with pytest.raises(ValueError, match="add up to 1"):
        optim.make_schedule("tri_stage", peak=1.0, steps=10, fractions=(0.5, 0.5, 0.5))


def update(tx, steps=1, gradient=0.0, frozen=()):
    mask = groups.trainable(PARAMS, frozen)

    @jax.jit
    def step(params, state):
        learned, still = groups.split(params, mask)
        gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), learned)
        changes, state = tx.update(gradients, state, learned)
        return groups.join(optax.apply_updates(learned, changes), still), state

    params, state = PARAMS, tx.init(groups.split(PARAMS, mask)[0])
    for _ in range(steps):
        params, state = step(params, state)
    return params


def make(name="sgd", rate=0.1, **settings):
    return optim.make_optimizer(name, lambda _: rate, PARAMS, **settings)


# ---- Decay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_decay_spares_what_the_rule_names(name):
    """Decoupled or in the gradient; without a gradient, nothing but it moves a parameter."""
    moved = update(make(name, weight_decay=0.5, decay=[("bias", 0.0)]))
    assert np.all(moved["layer"]["kernel"] < 1)
    assert np.all(moved["head"]["kernel"] < 1)
    np.testing.assert_array_equal(moved["layer"]["bias"], 1)


def test_decay_is_multiplied():
    moved = update(make("adamw", weight_decay=0.5, decay=[("bias", 0.0), ("head/.*", 3.0)]))
    np.testing.assert_allclose(moved["layer"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(moved["head"]["kernel"], 1 - 0.1 * 1.5, rtol=1e-6)
    np.testing.assert_array_equal(moved["layer"]["bias"], 1)
    with pytest.raises(UserError, match=r"the factor -1.0 of 'head/\.\*' must be 0 or more"):
        make("adamw", weight_decay=0.5, decay=[("head/.*", -1.0)])


@pytest.mark.parametrize(
    ("name", "settings", "spared"),
    [
        ("conformer", {"conv_norm": "batch", "position": "relative"}, set()),
        ("wav2vec2", {}, {"scale_0", "shift_0", "magnitude"}),
        (
            "wav2vec2",
            {"conv_norm": "layer", "conv_bias": True},
            {"magnitude", *(f"bias_{index}" for index in range(7))},
        ),
    ],
)
def test_norms_and_biases_do_not_decay(name, settings, spared):
    """The rule of old spared (bias|scale)$ alone, and so it still is for a Conformer."""
    encoder = models.make_encoder(**models.settings(name, "tiny", **settings))
    inputs = jnp.zeros((1, 16_000) if encoder.listens == "waveform" else (1, 64, 80))
    params = jax.eval_shape(
        lambda: encoder.init(jax.random.key(0), inputs, jnp.full(1, inputs.shape[1]), True)
    )["params"]
    decay = defaults.default().optimizer.decay
    now = {name for name in rules.names(params) if not rules.first(decay, name, 1.0)}
    old = {name for name in rules.names(params) if name.endswith(("bias", "scale"))}
    assert {name.rpartition("/")[2] for name in now - old} == spared
    assert old <= now < set(rules.names(params))


# ---- Rates -------------------------------------------------------------------------------------


def test_rates_multiply_the_learning_rate():
    moved = update(make(rates=[("layer/bias", 0.5), ("layer/.*", 2.0)]), gradient=1.0)
    np.testing.assert_allclose(moved["layer"]["bias"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(moved["layer"]["kernel"], 0.8, rtol=1e-6)
    np.testing.assert_allclose(moved["head"]["kernel"], 0.9, rtol=1e-6)
    with pytest.raises(UserError, match=r"greater than 0 \(config.optimizer.frozen holds still\)"):
        make(rates=[("layer/bias", 0.0)])
    with pytest.raises(UserError, match=r"optimizer\.rates: no parameter matches 'bia'"):
        make(rates=[("bia", 0.5)])


def test_layer_decay_is_the_same_for_stacked_layers():
    each = {"norm": {"scale": jnp.ones(3)}, "kernel": jnp.ones((2, 3))}
    rest = {"subsampling": {"kernel": jnp.ones(4)}}
    unrolled = {f"layer_{index}": each for index in range(3)}
    stacked = {"layers": jax.tree.map(lambda x: jnp.stack([x] * 3), each)}
    found = []
    for kept in (unrolled, stacked):
        params = {"encoder": {**rest, **kept}, "head": {"kernel": jnp.ones(2)}}
        tx = optim.make_optimizer(
            "sgd", lambda _: 1.0, params, layer_decay=0.5, rates=[("norm/scale", 0.1)]
        )
        gradient = jax.tree.map(jnp.ones_like, params)
        changes, _ = tx.update(gradient, tx.init(params), params)
        np.testing.assert_allclose(changes["head"]["kernel"], -1.0)
        np.testing.assert_allclose(changes["encoder"]["subsampling"]["kernel"], -(0.5**4))
        found.append(changes["encoder"])
    for index, rate in enumerate([0.125, 0.25, 0.5]):
        layer = found[0][f"layer_{index}"]
        np.testing.assert_allclose(layer["kernel"], -rate)
        np.testing.assert_allclose(layer["norm"]["scale"], -0.1 * rate, rtol=1e-6)
        jax.tree.map(
            lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-6),
            found[1]["layers"],
            layer,
        )
    with pytest.raises(UserError, match="layer_decay needs an encoder with layers"):
        make(layer_decay=0.5)


# Encoder -> what it has behind its layers.
ABOVE = {
    "deepspeech": {"lookahead", "dense_after_0", "norm"},
    "wav2vec2": {"norm"},
    "wav2vec2_conformer": {"norm"},
    "wavenet": {"output", "norm"},
    "wavenet_waveform": {"output", "norm"},
}
MORE = {
    "deepspeech": {"bidirectional": False, "lookahead": 2, "dense_before": 1, "dense_after": 1},
    "wav2vec2": {"pre_norm": True},
}


@pytest.mark.parametrize("name", models.ENCODERS)
def test_layer_decay_knows_the_layers_of_every_encoder(name):
    inputs = jnp.zeros((1, 16_000) if models.listens(name) == "waveform" else (1, 64, 80))
    for scan in (False, True) if "scan" in models.defaults(name) else (None,):
        more = MORE.get(name, {}) | ({} if scan is None else {"scan": scan})
        encoder = models.make_encoder(**models.settings(name, "tiny", num_layers=3, **more))
        params = jax.eval_shape(
            lambda e=encoder: e.init(jax.random.key(0), inputs, jnp.full(1, inputs.shape[1]), True)
        )["params"]
        above = experiment.above(types.SimpleNamespace(encoder=encoder))
        params = {"encoder": params, "head": jnp.ones(2)}
        factors = groups.rate_factors(params, layer_decay=0.5, above=above)
        assert factors["head"] == 1
        layers = models.unstack_layers(factors["encoder"])
        for index, rate in enumerate([0.125, 0.25, 0.5]):
            found = jax.tree.leaves(layers.pop(f"layer_{index}"))
            np.testing.assert_allclose([np.max(one) for one in found], rate)
        behind = {layer: layers.pop(layer) for layer in ABOVE.get(name, ())}
        assert set(jax.tree.leaves(behind)) <= {1.0}
        assert layers
        assert set(jax.tree.leaves(layers)) == {0.5**4}


# ---- Freezing ----------------------------------------------------------------------------------


FROZEN = [("layer/bias", 2), ("head/.*", -1)]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_stand_still_until_their_time(name):
    for steps in (2, 3):
        moved = update(make(name, frozen=FROZEN), steps, gradient=1.0, frozen=FROZEN)
        assert np.all(moved["layer"]["kernel"] < 1)
        assert np.all(moved["layer"]["bias"] < 1) == (steps > 2)
        np.testing.assert_array_equal(moved["head"]["kernel"], 1)


def test_what_stands_still_has_no_part_in_the_clip():
    """E5: the gradient of what is frozen set the size of all updates."""
    for steps, clipped in ((1, 4), (3, 6)):
        tx = make(rate=1.0, clip_norm=0.5, frozen=FROZEN)
        before = update(tx, steps - 1, gradient=9.0, frozen=FROZEN)
        after = update(tx, steps, gradient=9.0, frozen=FROZEN)
        change = jax.tree.map(jnp.subtract, after, before)
        np.testing.assert_allclose(change["layer"]["kernel"], -0.5 / np.sqrt(clipped), rtol=1e-5)


def test_what_is_frozen_has_no_moments_and_what_thaws_begins_anew():
    tx = make("adamw", b1=0.9, b2=0.98, frozen=FROZEN)
    mask = groups.trainable(PARAMS, FROZEN)
    state = tx.init(groups.split(PARAMS, mask)[0])
    sizes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sorted(sizes) == [(2,), (2,), (2, 2), (2, 2)]
    # The first update of Adam is of the size of the rate, whenever it is made.
    for steps in (2, 3):
        before = update(tx, steps, gradient=1e-3, frozen=FROZEN)["layer"]["bias"]
    np.testing.assert_allclose(before, 0.9, rtol=1e-4)


def test_one_schedule_for_all_that_thaws():
    tx = optim.make_optimizer("sgd", lambda count: 0.1 * (count + 1), PARAMS, frozen=FROZEN)
    moved = update(tx, 3, gradient=1.0, frozen=FROZEN)
    np.testing.assert_allclose(moved["layer"]["kernel"], 1 - 0.6, rtol=1e-5)
    np.testing.assert_allclose(moved["layer"]["bias"], 1 - 0.3, rtol=1e-5)


def test_freezing_that_cannot_work_is_named():
    with pytest.raises(UserError, match=r"optimizer\.frozen: no parameter matches 'heads'"):
        make(frozen=[("heads", 1)])
    with pytest.raises(UserError, match=r"leaves nothing to train"):
        make(frozen=[(".*", -1)])
    with pytest.raises(UserError, match=r"-2 updates for 'head/\.\*' must be -1"):
        make(frozen=[("head/.*", -2)])


def test_no_gradient_is_taken_of_what_is_frozen():
    class Task:
        parts = "kept"

        def loss(self, params, state, batch, rng, step):
            assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
            total = sum(jnp.sum(leaf * batch) for leaf in jax.tree.leaves(params))
            return total, jnp.ones(()), {"state": state}

    def gradient(task):
        assert task.parts == "kept"
        return lambda params, *rest: (jax.grad(lambda p: task.loss(p, *rest)[0])(params), None)

    mask = groups.trainable(PARAMS, FROZEN)
    until = groups.thaw(PARAMS, FROZEN)
    assert groups.starts(until) == [0, 2]
    for done, thawed in ((0, 0.0), (1, 0.0), (2, 3.0)):
        function = groups.gradients(gradient, Task(), until, done)
        found, _ = function(PARAMS, {}, 3.0, None, done)
        assert found["head"]["kernel"] is None
        np.testing.assert_array_equal(found["layer"]["kernel"], 3.0)
        np.testing.assert_array_equal(found["layer"]["bias"], thawed)
    learned, still = groups.split(PARAMS, mask)
    assert len(jax.tree.leaves(learned)) == 2
    joined = groups.join(learned, still)
    jax.tree.map(np.testing.assert_array_equal, joined, PARAMS)


class Layer(nn.Module):
    """A batch norm, as a layer that is scanned."""

    @nn.compact
    def __call__(self, x, mask):
        return layers.MaskedBatchNorm(momentum=0.5, name="norm")(x, mask, False), None


class Normed(nn.Module):
    """Two layers, stacked, and a head: [B, T, D] to [B, T, D]."""

    @nn.compact
    def __call__(self, x):
        mask = jnp.ones(x.shape[:2], bool)
        x, _ = layers.scan_layers(Layer(name="layers"), 2, False, x, mask)
        return layers.MaskedBatchNorm(momentum=0.5, name="head")(x, mask, False)


def test_statistics_of_what_is_frozen_stand_still_and_are_normalized_by():
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (4, 6, 2))
    before = Normed().init(jax.random.key(1), x)
    params, state = before["params"], {"batch_stats": before["batch_stats"]}

    class Task:
        def logits(self, params, state, batch):
            return Normed().apply({"params": params, **state}, batch, mutable=list(state))

        def loss(self, params, state, batch, rng, step):
            output, state = self.logits(params, state, batch)
            return output.sum(), output, {"state": state}

    def gradient(task):
        def function(params, state, batch, rng, step):
            aux = task.loss(params, state, batch, rng, step)[2]
            return params, (aux, task.logits(params, state, batch)[1])

        return function

    until = groups.thaw(params, (("layers/.*", 2), ("head/bias", -1)))
    moved = {}
    for done in (0, 2):
        function = groups.gradients(gradient, Task(), until, done)
        aux, of_logits = function(params, state, x, None, 0)[1]
        jax.tree.map(np.testing.assert_array_equal, aux["state"], of_logits)
        assert jax.tree.structure(aux["state"]) == jax.tree.structure(state)
        different = lambda a, b: bool((a != b).any())
        moved[done] = jax.tree.map(different, aux["state"], state)["batch_stats"]
        if done == 0:  # the layers do as in evaluations: by a mean of 0 and a variance of 1
            mean = aux["state"]["batch_stats"]["head"]["mean"]
            np.testing.assert_allclose(mean, 0.5 * x.mean((0, 1)), rtol=1e-3)
    still, all_move = ({"mean": value, "variance": value} for value in (False, True))
    # A head of which something learns has statistics that move.
    assert moved[0] == {"layers": {"norm": still}, "head": all_move}
    assert moved[2] == {"layers": {"norm": all_move}, "head": all_move}


# ---- The state of old --------------------------------------------------------------------------


def test_the_state_of_the_default_optimizer_is_what_old_checkpoints_hold():
    config = defaults.default().optimizer
    old = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda _: 0.1,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask={"layer": {"kernel": True, "bias": False}, "head": {"kernel": True}},
        ),
    )
    new = optim.make_optimizer(schedule=lambda _: 0.1, params=PARAMS, **config)
    states = [tx.init(PARAMS) for tx in (old, new)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    gradient = jax.tree.map(lambda p: 3 * p, PARAMS)
    changes = [
        tx.update(gradient, state, PARAMS)[0] for tx, state in zip((old, new), states, strict=True)
    ]
    jax.tree.map(np.testing.assert_array_equal, *changes)


@pytest.mark.parametrize("frozen", [(), FROZEN])
def test_moments_lie_where_their_parameters_do(frozen):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    rule = ((r"layer/kernel", ("fsdp", None)), (r"head/kernel|bias", ()))
    learned = lambda tree: groups.split(tree, groups.trainable(PARAMS, frozen))[0]
    placed = learned(sharding.shard_params(PARAMS, mesh, rule))
    tx = make("adamw", frozen=frozen, clip_norm=1.0)
    where = sharding.shard_optimizer(tx, learned(PARAMS), placed, mesh)
    state = jax.jit(lambda: tx.init(learned(PARAMS)), out_shardings=where)()
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert [leaf.shape for leaf in split] == [(2, 2), (2, 2)]


# ---- Names -------------------------------------------------------------------------------------


RECIPES = {
    "default": lambda: defaults.default(),
    "quickstart": lambda: quickstart.get_config(),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_any_optimizer_may_be_chosen_by_its_name_alone(name, recipe):
    config = RECIPES[recipe]()
    config.optimizer.name = name
    tx = optim.make_optimizer(
        schedule=lambda _: 0.1,
        params=PARAMS,
        defaults=defaults.default().optimizer,
        **config.optimizer,
    )
    assert np.all(update(tx, gradient=1.0)["layer"]["kernel"] < 1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_any_schedule_may_be_chosen_by_its_name_alone(name, recipe):
    config = RECIPES[recipe]()
    config.schedule.name = name
    schedule = optim.make_schedule(
        steps=20_000, defaults=defaults.default().schedule, **config.schedule
    )
    assert 0 < schedule(10_000) <= config.schedule.peak


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_mistakes_about_an_optimizer_are_named(name):
    section = defaults.default().optimizer
    for key, near in (("b11", "b1"), ("nesterow", "nesterov"), ("weight_decy", "weight_decay")):
        with pytest.raises(
            UserError, match=rf"optimizer \({name}\): unknown key '{key}'"
        ) as raised:
            make(name, defaults=section, **{key: 0.5})
        takes = near in str(raised.value).partition("known:")[2]
        assert not takes or f"did you mean '{near}'" in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"is not set here but in config\.schedule"):
        make(name, learning_rate=0.1)


def test_an_explicit_setting_of_another_name_is_refused():
    section = defaults.default()
    with pytest.raises(UserError, match=r"optimizer \(sgd\): unknown key 'b1'.*known: "):
        make("sgd", defaults=section.optimizer, b1=0.5)
    make("sgd", defaults=section.optimizer, b1=section.optimizer.b1)
    with pytest.raises(UserError, match=r"schedule \(constant\): unknown key 'power'"):
        optim.make_schedule("constant", peak=1.0, steps=9, power=2.0, defaults=section.schedule)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_mistakes_about_a_schedule_are_named(name):
    with pytest.raises(UserError, match=r"'warm_up'.*did you mean 'warmup'"):
        optim.make_schedule(name, peak=1.0, steps=1, warm_up=1)
    with pytest.raises(UserError, match=rf"schedule \({name}\): 'peak' is missing"):
        optim.make_schedule(name, steps=1, warmup=1)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        make("adammw")
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        optim.make_schedule("cosin", peak=1.0, steps=1)
    with pytest.raises(UserError, match="'warmup' is missing"):
        optim.make_schedule("noam", peak=1.0, steps=1)


# ---- The table ---------------------------------------------------------------------------------


def test_the_table_says_what_learns():
    params = {
        "encoder": {
            "extractor": {"kernel_0": jnp.ones((2, 5)), "bias_0": jnp.ones(5)},
            "layers": {"kernel": jnp.ones((4, 3))},
        },
        "head": {"kernel": jnp.ones(7)},
    }
    rows = groups.table(
        params,
        decay=((groups.NO_DECAY, 0.0),),
        rates=(("head/.*", 10.0),),
        frozen=(("encoder/extractor/.*", -1), ("encoder/layers/.*", 100)),
        layer_decay=0.5,
    )
    assert rows == [
        ("encoder/extractor", 15, "no", "", ""),
        ("encoder/layers", 12, "after 100 updates", "0.0625 to 0.5", "1"),
        ("head", 7, "yes", "10", "1"),
    ]
    assert groups.shown(rows) == [
        "group              parameters  trainable          rate           decay",
        "encoder/extractor          15  no",
        "encoder/layers             12  after 100 updates  0.0625 to 0.5  1",
        "head                        7  yes                10             1",
        "19 of 34 parameters learn (55.9%)",
    ]
