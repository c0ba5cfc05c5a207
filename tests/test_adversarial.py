"""Adversarial training: the ball, the perturbation, the step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speech_jax import models, sharding, tasks, train
from speech_jax.errors import UserError
from speech_jax.ops import augment
from speech_jax.tasks import adversarial
from speech_jax.tasks.adversarial import Adversary, Ball
from speech_jax.tasks.asr import ASR
from speech_jax.tasks.frontend import FrontEnd

ROWS, SAMPLES = 8, 4000
LENGTHS = np.asarray([4000, 3900, 3000, 4000, 2500, 4000, 3600, 0], np.int32)
KEY = jax.random.key(7)

# Small enough to compile in a second or two; an encoder that is not here is its tiny variant.
SMALL = {
    "conformer": {
        "features": 16, "num_layers": 1, "heads": 2, "kernel": 3, "subsampling_channels": 4,
        "conv_norm": "batch", "scan": False,
    },
    "wav2vec2": {
        "features": 16, "num_layers": 1, "heads": 2, "feed_forward": 16,
        "conv_channels": (8,) * 7, "position_kernel": 4, "position_groups": 2, "scan": False,
    },
}  # fmt: skip


@functools.cache
def make_task(name="conformer"):
    """A recognizer with dropout and SpecAugment on: masks that differ would show."""
    encoder = models.make_encoder(**models.settings(name, "tiny", **SMALL.get(name, {})))
    log_mel = {"sample_rate": 16_000, "window_ms": 25.0, "hop_ms": 10.0, "mels": 20}
    policy = augment.POLICIES["librispeech_double"] | {"frequency_width": 4, "time_width": 8}
    return ASR(encoder, FrontEnd(encoder.frontend, log_mel, spec_augment=policy), 7)


@functools.cache
def make_batch():
    """Noise of all loudness, up to clipping; the last row is filler."""
    rng = np.random.default_rng(0)
    loudness = np.asarray([300, 1000, 3000, 8000, 30_000, 500, 1500, 0])[:, None]
    audio = np.clip(loudness * rng.standard_normal((ROWS, SAMPLES)), -32768, 32767)
    audio[np.arange(SAMPLES)[None] >= LENGTHS[:, None]] = 0
    batch = {
        "audio": audio.astype(np.int16),
        "audio_length": LENGTHS,
        "labels": rng.integers(1, 7, (ROWS, 3)),
        "label_length": np.where(LENGTHS > 0, 2, 0),
        "weight": (LENGTHS > 0).astype(np.float32),
        "index": np.arange(ROWS),
    }
    return {
        k: jnp.asarray(v, v.dtype if v.dtype != np.int64 else np.int32) for k, v in batch.items()
    }


@functools.cache
def start(name="conformer"):
    """Parameters, moved away from their zeros, and the model state."""
    params, state = jax.jit(make_task(name).init)(jax.random.key(0), make_batch())
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, moved), state


@functools.cache
def compiled(name="conformer", **settings):
    """The gradient function of some settings, compiled once for all tests."""
    function = jax.jit(adversarial.gradients(make_task(name), Adversary(**settings)))
    return function.lower(*start(name), make_batch(), KEY, jnp.int32(0)).compile()


def call(name="conformer", *, step=0, batch=None, **settings):
    batch = batch or make_batch()
    return compiled(name, **settings)(*start(name), batch, KEY, jnp.int32(step))


@functools.cache
def slope():
    """The gradient of the training loss at the float waveform, by autodiff alone."""
    task, batch = make_task(), make_batch()
    loss = lambda audio: task.loss(*start(), batch | {"audio": audio}, KEY, 0)[0]
    return jax.jit(jax.value_and_grad(loss))(waveform())


def waveform():
    return make_batch()["audio"].astype(jnp.float32) / 32768


def valid():
    return np.arange(SAMPLES)[None] < LENGTHS[:, None]


def close(actual, expected, tolerance=2e-4):
    """Equal but for rounding, on the scale of the largest entry of the tree."""
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---- The ball ----------------------------------------------------------------------------------


@pytest.mark.parametrize("int16", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bound", [{"epsilon": 0.00123}, {"epsilon": 0.3}, {"snr_db": 12.3}])
def test_the_ball_holds_to_the_last_bit(bound, norm, int16):
    """In exact arithmetic, after the range of int16, from anywhere, in any direction."""
    adversary = Adversary(norm=norm, int16=int16, **bound)
    clean = np.asarray(waveform(), np.float64)
    power = np.square(clean).sum(1) / np.maximum(LENGTHS, 1)
    limit = np.sqrt(power) * 10 ** (-12.3 / 20) if "snr_db" in bound else bound["epsilon"]

    @jax.jit
    def perturbed(batch, rng):
        ball = adversary.ball(make_task(), batch, 0)
        one, other = jax.random.split(rng)
        somewhere = ball.random(one)
        far = ball.ascend(somewhere, jax.random.normal(other, somewhere.shape), 3.0)
        return [ball.perturb(ball.finish(delta))["audio"] for delta in (somewhere, far)]

    for audio in perturbed(make_batch(), jax.random.key(1)):
        audio = np.asarray(audio, np.float64)
        delta = audio - clean
        size = np.abs(delta).max(1) if norm == "linf" else rms(delta)
        assert (size <= limit).all()
        assert np.clip(audio, -1, 32767 / 32768).tolist() == audio.tolist()
        assert not delta[~valid()].any()
        if int16:
            assert (audio * 32768 == np.round(audio * 32768)).all()
    # The last of them is on the surface, but for clipping (the loud row) and whole steps.
    tolerance = 1 / 32768 if int16 else 1e-6
    quiet = [0, 1, 2]
    assert (size[quiet] >= np.broadcast_to(limit, ROWS)[quiet] * 0.999 - tolerance).all() or (
        bound.get("epsilon") == 0.3
    )


def rms(delta):
    return np.sqrt(np.square(delta).sum(1) / np.maximum(LENGTHS, 1))


def test_features_are_perturbed_in_their_valid_frames():
    task, batch = make_task(), make_batch()
    ball = Ball(task, batch, space="features", norm="linf", epsilon=0.1)
    delta = ball.random(jax.random.key(1))
    frames = np.asarray(task.frontend.lengths(LENGTHS))
    inside = np.arange(delta.shape[1])[None] < frames[:, None]
    assert not np.asarray(delta)[~inside].any()
    assert 0.09 < np.abs(delta).max() <= 0.1
    # A batch that brings its own features is a batch like any other.
    equal(task.frontend(ball.perturb(ball.zeros())), task.frontend(batch))


# ---- The perturbation --------------------------------------------------------------------------


def test_fgsm_is_the_mean_of_a_clean_gradient_and_one_at_epsilon_times_the_sign_of_autodiff():
    """Computed here step by step, with the same masks in both passes."""
    epsilon = 2.0**-11
    delta = np.where(valid(), epsilon * np.sign(slope()[1]), 0).astype(np.float32)
    audio = np.clip(waveform() + delta, -1, 32767 / 32768)
    plain = jax.jit(tasks.gradients(make_task()))
    clean, clean_loss = plain(*start(), make_batch(), KEY, 0)
    hard, hard_loss = plain(*start(), make_batch() | {"audio": audio}, KEY, 0)
    gradient, loss = call(method="fgsm", epsilon=epsilon, alpha=0.25)
    close(gradient, jax.tree.map(lambda c, a: 0.75 * c + 0.25 * a, clean, hard))
    np.testing.assert_allclose(loss.sum, 0.75 * clean_loss.sum + 0.25 * hard_loss.sum, rtol=1e-5)
    assert hard_loss.sum > 1.01 * clean_loss.sum
    assert loss.weight == clean_loss.weight
    # Other masks give something else.
    other, _ = call(method="fgsm", epsilon=epsilon, alpha=0.25, same_masks=False)
    with pytest.raises(AssertionError):
        close(other, gradient, 1e-2)


def test_an_ascent_is_epsilon_times_the_sign_of_the_gradient_and_nothing_on_padding():
    epsilon = 2.0**-12
    batch = make_batch() | {"audio": jnp.clip(make_batch()["audio"], -30_000, 30_000)}
    task = make_task()

    @jax.jit
    def found():
        ball = Adversary(method="fgsm", epsilon=epsilon).ball(task, batch, 0)
        loss = lambda batch: task.loss(*start(), batch, KEY, 0)[0]
        return (
            ball.maximize(loss, ball.zeros(), 1, 1.0),
            jax.grad(lambda x: loss(batch | {"audio": x}))(ball.inputs),
        )

    delta, gradient = found()
    np.testing.assert_array_equal(delta, np.where(valid(), epsilon * np.sign(gradient), 0))
    assert np.abs(delta)[valid()].mean() > 0.9 * epsilon


def test_the_loss_rises_by_epsilon_times_the_l1_norm_of_the_gradient():
    task, (before, gradient) = make_task(), slope()
    epsilon = 0.02 * float(before) / float(np.abs(gradient).sum())
    audio = waveform() + epsilon * jnp.sign(gradient)
    after = jax.jit(task.loss)(*start(), make_batch() | {"audio": audio}, KEY, 0)[0]
    assert after - before == pytest.approx(0.02 * float(before), rel=0.1)


def test_pgd_finds_a_higher_loss_than_fgsm_in_the_same_ball():
    losses = {
        method: float(call(method=method, epsilon=0.002, alpha=1.0, steps=5)[1].sum)
        for method in ("fgsm", "pgd")
    }
    assert losses["pgd"] > losses["fgsm"] > float(slope()[0])


# ---- The step ----------------------------------------------------------------------------------


def test_without_epsilon_the_step_is_the_clean_one():
    clean = call(method="none")
    for method in ("fgsm", "pgd", "vat"):
        equal(call(method=method, epsilon=0.0), clean)
    # So it is where epsilon has yet to rise, but for how the compiler fuses two passes.
    close(call(method="fgsm", epsilon=0.01, warmup=10), clean, 1e-6)
    close(call(method="fgsm", epsilon=0.01, warmup=10, step=20), call(method="fgsm", epsilon=0.01))


def test_only_every_so_many_steps_are_adversarial():
    settings = {"method": "fgsm", "epsilon": 2.0**-11, "alpha": 0.25}
    equal(call(**settings, every=3, step=4), call(method="none", step=4))
    close(call(**settings, every=3, step=6), call(**settings, step=6), 1e-5)


def test_batch_norm_learns_from_the_passes_that_it_is_told_to():
    settings = {"method": "fgsm", "epsilon": 0.02}
    clean = call(method="none")[1].aux["state"]
    hard = call(**settings, alpha=1.0, statistics="adversarial")[1].aux["state"]
    equal(jax.tree.map(jnp.shape, clean), jax.tree.map(jnp.shape, start()[1]))
    close(call(**settings, statistics="clean")[1].aux["state"], clean, 1e-5)
    close(call(**settings, alpha=1.0, statistics="clean")[1].aux["state"], clean, 1e-5)
    close(call(**settings, statistics="adversarial")[1].aux["state"], hard, 1e-5)
    # One after the other: 0.99 (0.99 s + 0.01 c) + 0.01 h, where clean = 0.99 s + 0.01 c.
    both = jax.tree.map(lambda s, c, h: 0.99 * c + h - 0.99 * s, start()[1], clean, hard)
    close(call(**settings, statistics="both")[1].aux["state"], both, 1e-5)
    with pytest.raises(AssertionError):
        close(hard, clean, 1e-5)


def test_vat_needs_no_labels():
    batch = make_batch()
    other = batch | {"labels": 7 - batch["labels"]}
    extra = []
    for labels in (batch, other):
        gradient, loss = call(method="vat", epsilon=0.002, steps=1, alpha=2.0, batch=labels)
        clean, clean_loss = call(method="none", batch=labels)
        extra.append((jax.tree.map(jnp.subtract, gradient, clean), loss.sum - clean_loss.sum))
    close(extra[0], extra[1], 1e-3)
    assert extra[0][1] > 0.01 * clean_loss.sum
    assert call(method="vat", epsilon=0.002, steps=1, alpha=2.0)[1].weight == clean_loss.weight


@pytest.mark.parametrize("name", [name for name in models.ENCODERS if name != "conformer"])
def test_every_encoder_is_hardened(name):
    """The waveform's perturbation raises the loss of any encoder; the gradient stays finite."""
    assert_hardened(name, method="pgd", epsilon=0.002, random_start=True, alpha=1.0, steps=3)


def test_features_are_hardened():
    assert_hardened("conformer", method="fgsm", space="features", epsilon=0.1, norm="l2")


def assert_hardened(name, **settings):
    clean = call(name, method="none")[1].sum
    gradient, loss = call(name, **settings)
    assert loss.sum > clean
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_accumulation_hardens_each_micro_batch():
    function = adversarial.gradients(make_task(), Adversary(method="fgsm", epsilon=0.001))
    params, state = start()
    whole, loss = jax.jit(tasks.accumulate(function, 2))(params, state, make_batch(), KEY, 0)
    part, total, one = jax.jit(function), [], None
    for index in range(2):
        rows = {name: value[index::2] for name, value in make_batch().items()}
        one, part_loss = part(params, state, rows, jax.random.fold_in(KEY, index), 0)
        state = part_loss.aux["state"]
        total.append((one, part_loss.sum))
    close((whole, loss.sum), jax.tree.map(jnp.add, *total), 1e-3)


def update_function(adversary, log_every=1):
    gradients = adversarial.gradients(make_task(), adversary)
    step = train.make_step(gradients, optax.sgd(0.1), log_every=log_every * adversary.updates)
    return adversarial.replay(step, make_task(), adversary)


def make_state():
    params, model_state = start()
    return train.TrainState(
        step=jnp.int32(0),
        rng=KEY,
        params=params,
        model_state=model_state,
        opt_state=optax.sgd(0.1).init(params),
        ema={},
        sums={name: jnp.zeros(()) for name in (*train.SUMS, "infeasible")},
    )


FREE = Adversary(method="free", epsilon=2.0**-11, steps=3)


def test_free_updates_at_a_perturbation_that_grows_with_the_last_gradient():
    """Shafahi et al. 2019, algorithm 1, written out."""
    task, batch = make_task(), make_batch()

    @jax.jit
    def passes(params, state, audio, rng):
        def loss(params, audio):
            total, weight, aux = task.loss(params, state, batch | {"audio": audio}, rng, 0)
            return total, (weight, aux["state"])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, audio)

    (params, state), delta, total = start(), 0.0, 0.0
    for index in range(FREE.steps):
        audio = jnp.clip(waveform() + delta, -1, 32767 / 32768)
        rng = jax.random.fold_in(KEY, index)
        (loss, (weight, state)), (gradient, rise) = passes(params, state, audio, rng)
        params = jax.tree.map(lambda p, g, w=weight: p - 0.1 * g / w, params, gradient)
        delta = np.clip(delta + FREE.epsilon * np.sign(rise), -FREE.epsilon, FREE.epsilon)
        delta = np.where(valid(), delta, 0).astype(np.float32)
        total += loss
    after, sums, finite = jax.jit(update_function(FREE))(make_state(), batch)
    close(after.params, params)
    close(after.model_state, state)
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-4)
    assert finite
    assert after.step == sums["steps"] == FREE.steps
    # What goes into a checkpoint is what a clean step leaves there.
    assert jax.tree.structure(after) == jax.tree.structure(make_state())
    assert all(value == 0 for value in after.sums.values())


@pytest.mark.parametrize("method", ["fgsm", "free"])
def test_sharded_equals_single_device(method):
    adversary = Adversary(method=method, epsilon=2.0**-11, steps=2)
    update = jax.jit(update_function(adversary))
    alone, sums, _ = update(make_state(), make_batch())
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    batch = sharding.put_batch(jax.device_get(make_batch()), mesh)
    state = jax.device_put(make_state(), sharding.replicated(mesh))
    split, split_sums, _ = update(state, batch)
    close(split.params, alone.params, 1e-4)
    np.testing.assert_allclose(split_sums["loss"], sums["loss"], rtol=1e-4)


def test_the_second_pass_needs_no_memory_of_its_own():
    """The activations of the clean pass are gone when the adversarial one begins."""
    memory = lambda **settings: compiled(**settings).memory_analysis().temp_size_in_bytes
    clean = memory(method="none")
    inputs = 4 * ROWS * SAMPLES
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(start()))
    assert memory(method="fgsm", epsilon=2.0**-11, alpha=0.25) < clean + 4 * inputs + 2 * parameters


# ---- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "fgms"}, "fgms"),
        ({"space": "mel"}, "space"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"alpha": 1.5}, "alpha"),
        ({"steps": 0}, "steps"),
        ({"space": "features", "snr_db": 10.0}, "snr_db"),
        ({"method": "free", "every": 2}, "every"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        Adversary(**settings)


def test_a_space_that_the_encoder_does_not_hear_is_named():
    with pytest.raises(UserError, match="waveform"):
        Ball(make_task("wav2vec2"), make_batch(), space="features", norm="linf", epsilon=0.1)
    with pytest.raises(UserError, match="logits"):
        adversarial.gradients(math, Adversary(method="vat"))
