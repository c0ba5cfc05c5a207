"""Samples as classes and mixtures; the model of the next sample, whole and a sample at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepwise
from speech_jax import models
from speech_jax.models.waveform import SampleModel, generate
from speech_jax.ops import waveform

SMALL = {"width": 8, "num_layers": 4, "cycle": 2, "kernel": 3, "taps": 4, "hop": 16}


def test_mu_law_classes_are_what_they_stand_for():
    every = jnp.arange(256)
    x = waveform.expand(waveform.level(every))
    np.testing.assert_array_equal(waveform.classes(x), every)
    samples = jnp.linspace(-1.0, 1.0, 4001)
    near = waveform.expand(waveform.level(waveform.classes(samples)))
    # Half a class, which is wider where it is loud: 5.6 log-steps of 255 classes.
    room = (1 + 255 * jnp.abs(samples)) * (np.log(256) / 255) / 255
    assert (jnp.abs(near - samples) <= 1.03 * room).all()


def test_silence_has_the_slope_of_what_is_nearly_silent():
    for function in (waveform.compress, waveform.expand):
        slope = jax.vmap(jax.grad(function))(jnp.asarray([-1e-6, -0.0, 0.0, 1e-6]))
        np.testing.assert_allclose(slope, slope[0], rtol=1e-3)
        assert slope[0] > 0.01


def test_probabilities_of_a_mixture_sum_to_one():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 5)).astype(np.float32)
    logits[:, 1] *= 0.5  # means
    logits[0, 2] -= 8.0  # narrow ones, and wide ones, which go over the edges
    every = jnp.arange(-(2**15), 2**15, dtype=jnp.float32) / 2**15
    nats = jax.vmap(lambda one: waveform.logistics_nats(jnp.tile(one[None], (2**16, 1)), every))(
        jnp.asarray(logits.reshape(2, 15))
    )
    np.testing.assert_allclose(jnp.exp(-nats).sum(axis=1), 1.0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_drawn_is_what_is_probable(bits):
    """The mean nats of draws are those of the distribution itself."""
    rng = np.random.default_rng(1)
    uniform = jnp.asarray(rng.uniform(size=(20_000, 2)), jnp.float32)
    if bits == 8:
        outputs = jnp.asarray(2 * rng.standard_normal(256), jnp.float32)
        draw, nats = waveform.draw_class, waveform.class_nats
        every = waveform.expand(waveform.level(jnp.arange(256)))
    else:
        outputs = jnp.asarray([0.3, -0.2, -0.3, 0.4, -3.0, -4.0])
        draw, nats = waveform.draw_logistic, waveform.logistics_nats
        every = jnp.arange(-(2**15), 2**15, dtype=jnp.float32) / 2**15
    of = lambda x: nats(jnp.tile(outputs[None], (len(x), 1)), x)
    drawn = draw(jnp.tile(outputs[None], (20_000, 1)), uniform)
    entropy = (jnp.exp(-of(every)) * of(every)).sum()
    assert abs(of(drawn).mean() - entropy) < 0.05
    assert jnp.abs(drawn).max() <= 1.0


def make(hop=0, speakers=0, **settings):
    encoder = models.make_encoder(**models.settings("wavenet_waveform", "tiny", **SMALL | settings))
    outputs = 256 if encoder.bits == 8 else 9
    model = SampleModel(encoder, outputs, hop, speakers)
    rng = np.random.default_rng(0)
    audio = jnp.asarray(0.3 * rng.standard_normal((2, 50)), jnp.float32)
    given = {}
    if hop:
        mels = jnp.asarray(rng.standard_normal((2, 6, 10)), jnp.float32) - 6
        given |= {"mels": mels, "frames": jnp.array([6, 4])}
    if speakers:
        given["speaker"] = jnp.array([1, -1])
    params = jax.jit(functools.partial(model.init, deterministic=True))(
        jax.random.key(0), audio, **given
    )["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(p.dtype), params)
    return model, params, audio, given


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hop": 8, "speakers": 3},
        {"speakers": 3, "bits": 16, "kernel": 2},
        {"dtype": "bfloat16"},
    ],
    ids=["alone", "mel-speaker", "speaker-16", "bfloat16"],
)
def test_a_sample_at_a_time_is_the_parallel_pass(settings):
    model, params, audio, given = make(**settings)
    apply = functools.partial(model.apply, {"params": params})
    whole = jax.jit(lambda: apply(audio, True, **given))()
    piece = {"previous": audio}
    if given:
        names = ("mels", "frames", "speaker")
        table = apply(*(given.get(name) for name in names), method="conditions")
        assert np.abs(table).max() > 0.1
        at = [model.gates_at(table, jnp.asarray(t)) for t in range(audio.shape[1])]
        piece["gates"] = jnp.broadcast_to(jnp.stack(at, axis=1), (2, 50, 4, 16))
    atol = 0.15 if settings.get("dtype") else 1e-4
    stepwise.check(model, params, piece, whole, sizes=(1, 7), atol=atol)


def test_nothing_is_heard_before_it_sounds():
    model, params, audio, given = make(hop=8)
    slope = jax.jit(
        jax.jacobian(lambda x: model.apply({"params": params}, x, True, **given)[0, :, 0])
    )(audio)[:, 0]  # [T, T]: of each output, by each sample
    assert not np.any(np.triu(slope, 1))
    assert np.abs(np.diagonal(slope)).min() > 0
    field = SMALL["taps"] + 2 * 2 * (1 + 2)
    reach = np.arange(50)[:, None] - np.arange(50)[None] < field
    assert not np.any(np.where(reach, 0.0, slope))
    assert np.abs(slope[40, 40 - field + 1]) > 0


def test_generation_is_drawn_from_the_parallel_pass():
    """What is generated, pushed through the parallel pass, draws itself again."""
    model, params, _, given = make(hop=8)
    key, samples = jax.random.key(3), 48
    drawn = jax.jit(lambda: generate(model, params, key, samples, rows=2, **given))()
    previous = jnp.pad(drawn, ((0, 0), (1, 0)))[:, :-1]
    outputs = jax.jit(lambda: model.apply({"params": params}, previous, True, **given))()
    uniform = jnp.moveaxis(jax.random.uniform(key, (samples, 2, 2)), 0, 1)
    again = waveform.draw_class(outputs, uniform)
    assert (jnp.abs(again - drawn) < 1e-6).mean() > 0.98  # a tie of floats may fall either way
    assert len(np.unique(np.asarray(drawn))) > 20
