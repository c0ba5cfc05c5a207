"""Adversarial training: the ball, the perturbation, the step."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speech_jax import models
from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import masking
from speech_jax.tasks import best_rq, contrastive
from speech_jax.tasks.recognize import Recognize
from speech_jax.training import adversarial, sharding
from speech_jax.training import step as steps
from speech_jax.training.adversarial import Adversary, Ball

ROWS, SAMPLES = 8, 4000
LENGTHS = np.asarray([4000, 3900, 3000, 4000, 2500, 4000, 3600, 0], np.int32)
KEY = jax.random.key(7)
# Programs here run once or twice: what they do matters, not how fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# The smallest of each encoder; one that is not here is its tiny variant.
SMALL = {
    "conformer": {
        "width": 16, "num_layers": 1, "heads": 2, "kernel": 3, "subsampling_channels": 4,
        "conv_norm": "batch", "dropout": 0.0, "scan": False,
    },
    "wav2vec2": {
        "width": 16, "num_layers": 1, "heads": 2, "feed_forward": 16, "dropout": 0.0,
        "input_dropout": 0.0, "conv_channels": (8,) * 7, "position_kernel": 4,
        "position_groups": 2, "scan": False,
    },
    "wav2vec2_conformer": {
        "width": 16, "num_layers": 1, "heads": 2, "feed_forward": 16, "dropout": 0.0,
        "input_dropout": 0.0, "conv_channels": (8,) * 7, "scan": False,
    },
    "wavenet_waveform": {"width": 16, "num_layers": 2},
}  # fmt: skip


class Perceptron(nn.Module):
    """An encoder that compiles fast, with what matters here: batch norm and dropout."""

    listens = "log_mel"

    def output_lengths(self, lengths):
        return lengths

    @nn.compact
    def __call__(self, inputs, lengths, deterministic: bool):
        x = nn.Dense(16)(inputs)
        mask = masking.length_mask(lengths, x.shape[1])
        x = nn.tanh(layers.MaskedBatchNorm()(x, mask, deterministic))
        return nn.Dropout(0.2)(x, deterministic=deterministic), lengths


class HeldBestRQ(best_rq.BestRQ):
    """BEST-RQ with the targets of the clean batch.

    Else they are of the perturbed audio, where other codes may be nearest: no gradient knows of
    that, and the loss of a random model falls about as often as one in three times.
    """

    def _frames(self, batch, inputs, lengths):
        clean = make_batch()
        return super()._frames(clean, *self.frontend(clean))


@functools.cache
def make_task(name="perceptron"):
    """A recognizer; the perceptron's dropout and SpecAugment show masks that differ."""
    if name == "best_rq":
        return HeldBestRQ(Perceptron(), frontend("log_mel"), codes=11, mask_length=2)
    if name == "contrastive":
        return contrastive.Contrastive(
            models.make_encoder(**models.settings("wav2vec2", "tiny", **SMALL["wav2vec2"])),
            frontend("waveform"),
            codes=5, code_features=4, final_features=4, negatives=3, mask_length=2,
        )  # fmt: skip
    if name == "perceptron":
        return Recognize(Perceptron(), frontend("log_mel", SPEC_AUGMENT), {"labels": 7})
    encoder = models.make_encoder(**models.settings(name, "tiny", **SMALL.get(name, {})))
    return Recognize(encoder, frontend(encoder.listens), {"labels": 7})


def frontend(listens, spec_augment=None):
    log_mel = {"sample_rate": 16_000, "window_ms": 25.0, "hop_ms": 10.0, "mels": 20}
    return FrontEnd(listens, log_mel, spec_augment=spec_augment)


SPEC_AUGMENT = {
    "time_warp": 0, "frequency_masks": 2, "frequency_width": 6,
    "time_masks": 0, "time_width": 0, "time_fraction": 0.0,
}  # fmt: skip


@functools.cache
def make_batch():
    """Noise of all loudness, up to clipping; the last row is filler."""
    rng = np.random.default_rng(0)
    loudness = np.asarray([300, 1000, 3000, 8000, 30_000, 500, 1500, 0])[:, None]
    audio = np.clip(loudness * rng.standard_normal((ROWS, SAMPLES)), -32768, 32767)
    audio[np.arange(SAMPLES)[None] >= LENGTHS[:, None]] = 0
    return {
        "audio": audio.astype(np.int16),
        "audio_length": LENGTHS,
        "labels": rng.integers(1, 7, (ROWS, 3)).astype(np.int32),
        "labels_length": np.where(LENGTHS > 0, 2, 0).astype(np.int32),
        "weight": (LENGTHS > 0).astype(np.float32),
        "index": np.arange(ROWS, dtype=np.int32),
    }


@functools.cache
def start(name="perceptron"):
    """Random parameters and the model state."""
    shapes = jax.eval_shape(make_task(name).init, jax.random.key(0), make_batch())
    rng = np.random.default_rng(1)

    def drawn(shape):
        fan_in = math.prod(shape.shape[:-1]) or 1
        return (rng.standard_normal(shape.shape) / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(drawn, shapes[0]), jax.tree.map(lambda x: np.abs(drawn(x)), shapes[1])


@functools.cache
def compiled(name="perceptron", **settings):
    """The gradient function of some settings, compiled once for all tests."""
    function = jit(adversarial.gradients(make_task(name), Adversary(**settings)))
    return function.lower(*start(name), make_batch(), KEY, jnp.int32(0)).compile()


def call(name="perceptron", *, step=1, batch=None, **settings):
    batch = batch or make_batch()
    return compiled(name, **settings)(*start(name), batch, KEY, jnp.int32(step))


# Epsilon is 0 at step 0, and 2**-11 from step 1 on.
FGSM = {"method": "fgsm", "epsilon": 2.0**-11, "alpha": 0.25, "warmup": 1}


@functools.cache
def passes():
    """A clean pass, by autodiff alone: (params, state, audio, rng) -> loss and both gradients."""

    def loss(params, state, audio, rng):
        batch = make_batch() | {"audio": audio}
        total, weight, aux = make_task().loss(params, state, batch, rng, 1)
        return total, (weight, aux["state"])

    return jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))


def waveform():
    return make_batch()["audio"].astype(np.float32) / np.float32(32768)


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

    @jit
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
    task = make_task()

    @jit
    def drawn(batch):
        ball = Ball(task, batch, space="features", norm="linf", epsilon=0.1)
        same = task.frontend(ball.perturb(ball.zeros())), task.frontend(batch)
        return ball.random(jax.random.key(1)), *same

    delta, brought, computed = drawn(make_batch())
    frames = np.asarray(task.frontend.lengths(LENGTHS))
    inside = np.arange(delta.shape[1])[None] < frames[:, None]
    assert not np.asarray(delta)[~inside].any()
    assert 0.09 < np.abs(delta).max() <= np.float32(0.1)
    # A batch that brings its own features is a batch like any other.
    close(brought[0], computed[0], 1e-6)
    equal(brought[1], computed[1])


def test_a_random_start_is_of_the_utterance_and_of_nothing_else():
    """Wherever in a batch it is, and however it is padded."""
    order = np.asarray([3, 0, 7, 1, 2, 6, 5, 4])
    moved = {name: value[order] for name, value in make_batch().items()}
    moved["audio"] = np.pad(moved["audio"], ((0, 0), (0, 500)))
    for norm in ("linf", "l2"):

        @jit
        def drawn(batch, norm=norm):
            return Adversary(norm=norm).ball(make_task(), batch, 0).random(jax.random.key(1))

        here, there = drawn(make_batch()), drawn(moved)
        np.testing.assert_allclose(there[:, :SAMPLES], here[order], atol=2.0**-24)
        assert not np.asarray(there[:, SAMPLES:]).any()
        assert (here[0] != here[1]).any()


def test_only_the_inputs_of_a_batch_are_perturbed():
    batch = make_batch() | {"speaker": np.arange(ROWS)}
    for space, field in (("waveform", "audio"), ("features", "features")):
        ball = Ball(make_task(), batch, space=space, norm="linf", epsilon=0.1)
        found = ball.perturb(ball.random(jax.random.key(1)))
        assert found.keys() == batch.keys() | {field}
        assert all(found[name] is batch[name] for name in batch if name != field)


# ---- The perturbation --------------------------------------------------------------------------


def test_fgsm_is_the_mean_of_a_clean_gradient_and_one_at_epsilon_times_the_sign_of_autodiff():
    """Computed here step by step, with the same masks in both passes."""
    (loss, (weight, _)), (clean, slope) = passes()(*start(), waveform(), KEY)
    delta = np.where(valid(), FGSM["epsilon"] * np.sign(slope), 0).astype(np.float32)
    audio = np.clip(waveform() + delta, -1, 32767 / 32768)
    (hard_loss, _), (hard, _) = passes()(*start(), audio, KEY)
    assert hard_loss > 1.01 * loss
    gradient, mixed = call(**FGSM)
    close(gradient, jax.tree.map(lambda c, a: 0.75 * c + 0.25 * a, clean, hard))
    np.testing.assert_allclose(mixed.sum, 0.75 * loss + 0.25 * hard_loss, rtol=1e-5)
    assert mixed.weight == weight
    # With masks of its own, the adversarial pass is another.
    other, _ = call(**FGSM, same_masks=False)
    with pytest.raises(AssertionError):
        close(other, gradient, 1e-2)


def test_an_ascent_is_epsilon_times_the_sign_of_the_gradient_and_nothing_on_padding():
    batch = make_batch() | {"audio": jnp.clip(make_batch()["audio"], -30_000, 30_000)}

    @jit
    def found():
        ball = Adversary(epsilon=2.0**-12).ball(make_task(), batch, 0)
        loss = lambda batch: make_task().loss(*start(), batch, KEY, 0)[0]
        slope = jax.grad(lambda x: loss(batch | {"audio": x}))(ball.inputs)
        return ball.ascend(ball.zeros(), slope, 1.0), slope

    delta, slope = found()
    np.testing.assert_array_equal(delta, np.where(valid(), 2.0**-12 * np.sign(slope), 0))
    assert (np.abs(delta) == 2.0**-12)[valid()].mean() > 0.9


def test_the_loss_rises_by_epsilon_times_the_l1_norm_of_the_gradient():
    (before, _), (_, slope) = passes()(*start(), waveform(), KEY)
    epsilon = 0.01 * float(before) / float(np.abs(slope).sum())
    (after, _), _ = passes()(*start(), waveform() + epsilon * jnp.sign(slope), KEY)
    assert after - before == pytest.approx(0.01 * float(before), rel=0.1)


def test_pgd_finds_a_higher_loss_than_fgsm_in_the_same_ball():
    fgsm = call(method="fgsm", epsilon=0.002, alpha=1.0, statistics="adversarial")
    pgd = call(method="pgd", epsilon=0.002, alpha=1.0, steps=8)
    (clean, _), _ = passes()(*start(), waveform(), KEY)
    assert pgd[1].sum > 1.01 * fgsm[1].sum
    assert fgsm[1].sum > 1.1 * clean


# ---- The step ----------------------------------------------------------------------------------


def test_without_epsilon_the_step_is_the_clean_one():
    clean = call(method="none")
    for method in ("fgsm", "pgd", "vat"):
        settings = Adversary(method=method, epsilon=0.0)
        # No program is like it, so there is nothing to round differently.
        same = jax.make_jaxpr(adversarial.gradients(make_task(), settings))
        plain = jax.make_jaxpr(steps.gradients(make_task()))
        arguments = *start(), make_batch(), KEY, 1
        assert str(same(*arguments)) == str(plain(*arguments))
    # So it is where epsilon has yet to rise, but for how two passes are fused.
    close(call(**FGSM, step=0), call(method="none", step=0), 1e-6)
    close(clean[0], passes()(*start(), waveform(), KEY)[1][0], 1e-6)


def test_only_every_so_many_steps_are_adversarial():
    equal(call(**FGSM, every=3, step=4), call(method="none", step=4))
    close(call(**FGSM, every=3, step=6), call(**FGSM, step=6), 1e-5)


def test_batch_norm_learns_from_the_passes_that_it_is_told_to():
    settings = {"method": "fgsm", "epsilon": 0.002}
    state = lambda **settings: call(**settings)[1].aux["state"]
    clean = state(method="none")
    hard = state(**settings, alpha=1.0, statistics="adversarial")
    close(state(**FGSM), clean, 1e-6)
    # One after the other: 0.99 (0.99 s + 0.01 c) + 0.01 h, where clean = 0.99 s + 0.01 c.
    both = jax.tree.map(lambda s, c, h: 0.99 * c + h - 0.99 * s, start()[1], clean, hard)
    close(state(**settings, statistics="both"), both, 1e-6)
    with pytest.raises(AssertionError):
        close(hard, clean, 1e-5)


def test_vat_needs_no_labels():
    batch, extra = make_batch(), []
    for labels in (batch, batch | {"labels": 7 - batch["labels"]}):
        gradient, loss = call(method="vat", epsilon=0.002, steps=1, alpha=2.0, batch=labels)
        clean, clean_loss = call(method="none", batch=labels)
        extra.append((jax.tree.map(jnp.subtract, gradient, clean), loss.sum - clean_loss.sum))
        assert loss.weight == clean_loss.weight
    close(extra[0], extra[1], 1e-3)
    assert extra[0][1] > 0.01 * clean_loss.sum


def test_vat_hardens_pretraining():
    assert_hardened("best_rq", method="vat", epsilon=0.002, steps=1, alpha=2.0, warmup=1)


@pytest.mark.parametrize("name", [*models.ENCODERS, "best_rq", "contrastive"])
def test_every_encoder_and_task_is_hardened(name):
    """The loss without a perturbation (at step 0) is less than with one."""
    assert_hardened(name, method="fgsm", epsilon=0.002, warmup=1)


def test_features_are_hardened():
    assert_hardened("perceptron", method="fgsm", space="features", norm="l2", epsilon=0.1, warmup=1)


def assert_hardened(name, **settings):
    clean, hard = (call(name, step=step, **settings) for step in (0, 1))
    assert hard[1].sum > clean[1].sum * 1.001
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(hard[0]))


def test_accumulation_hardens_each_micro_batch():
    function = adversarial.gradients(make_task(), Adversary(**FGSM))
    params, state = start()
    whole, loss = jit(steps.accumulate(function, 2))(params, state, make_batch(), KEY, 1)
    part, total = jit(function), []
    for index in range(2):
        rows = {name: value[index::2] for name, value in make_batch().items()}
        one, part_loss = part(params, state, rows, jax.random.fold_in(KEY, index), 1)
        state = part_loss.aux["state"]
        total.append((one, part_loss.sum))
    close((whole, loss.sum), jax.tree.map(jnp.add, *total), 1e-4)


@functools.cache
def update(**settings):
    """A step of training, as Setup makes it."""
    gradients = adversarial.gradients(make_task(), Adversary(**settings))
    return jit(steps.make_step(gradients, optax.sgd(0.1), log_every=2))


def make_state():
    params, model_state = start()
    return steps.TrainState(
        step=jnp.int32(3),
        rng=KEY,
        params=params,
        model_state=model_state,
        opt_state=optax.sgd(0.1).init(params),
        ema={},
        sums={name: jnp.zeros(()) for name in (*steps.SUMS, "infeasible")},
    )


@pytest.mark.optax
def test_sharded_equals_single_device():
    settings = FGSM | {"random_start": True}
    alone, sums, _ = update(**settings)(make_state(), make_batch())
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    batch = sharding.put_batch(jax.device_get(make_batch()), mesh)
    state = jax.device_put(make_state(), sharding.replicated(mesh))
    split, split_sums, _ = update(**settings)(state, batch)
    close(split.params, alone.params, 1e-4)
    np.testing.assert_allclose(split_sums["loss"], sums["loss"], rtol=1e-4)


def test_the_second_pass_needs_no_memory_of_its_own():
    """The activations of the clean pass are gone when the adversarial one begins."""
    memory = lambda **settings: compiled(**settings).memory_analysis().temp_size_in_bytes
    assert memory(**FGSM) < 1.2 * memory(method="none")


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
        ({"every": 0}, "every"),
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
