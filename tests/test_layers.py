"""Layers against plain references."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.models import layers
from speech_jax.ops import masking

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_depthwise_convolution_is_a_grouped_one():
    x, kernel, bias = normal(2, 11, 6), normal(5, 6), normal(6)
    ours = layers.DepthwiseConvolution(5).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    grouped = nn.Conv(6, (5,), feature_group_count=6, padding="SAME")
    theirs = grouped.apply({"params": {"kernel": kernel[:, None, :], "bias": bias}}, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(layers.swish, nn.swish), (layers.gelu, lambda x: nn.gelu(x, approximate=False))],
    ids=["swish", "gelu"],
)
def test_activations_keep_their_input_alone(ours, theirs):
    x, g = 3 * normal(5, 7), normal(5, 7)
    values, back = jax.vjp(ours, x)
    wanted, wanted_back = jax.vjp(theirs, x)
    np.testing.assert_allclose(values, wanted, atol=1e-6)
    np.testing.assert_allclose(back(g)[0], wanted_back(g)[0], atol=1e-6)
    kept = [leaf for leaf in jax.tree.leaves(back) if jnp.shape(leaf) == x.shape]
    assert len(kept) == 1
    half = x.astype(jnp.bfloat16)  # where 1 + erf would lose its digits
    exact = theirs(half.astype(jnp.float32))
    np.testing.assert_allclose(ours(half).astype(jnp.float32), exact, rtol=2e-2, atol=1e-3)


def test_rotary_scores_depend_on_distance_alone():
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8)
    frames = 12
    query, key = (jnp.broadcast_to(x, (1, frames, 1, 8)) for x in (query, key))
    scores = jnp.einsum("bthd,bshd->bhts", layers.rotate(query), layers.rotate(key))[0, 0]
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(scores[0, 0] - scores[0, 5]) > 1e-3


def test_relative_shift_indexes_by_distance():
    frames = 5
    by_distance = normal(2, 3, frames, 2 * frames - 1)
    shifted = layers._distance_to_key(by_distance)
    distances = list(range(frames - 1, -frames, -1))
    for t in range(frames):
        for s in range(frames):
            column = distances.index(t - s)
            np.testing.assert_array_equal(shifted[:, :, t, s], by_distance[:, :, t, column])


@pytest.mark.parametrize("position", ["rotary", "rotary_input", "relative"])
def test_attention_never_looks_past_the_mask(position):
    module = layers.SelfAttention(2, position)
    x = normal(2, 9, 8)
    mask = masking.length_mask(jnp.array([6, 9]), 9)
    params = jax.jit(module.init)(jax.random.key(0), x, mask, None)
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1 * normal(*p.shape), params)

    def first_row(x):
        return module.apply(params, x, mask, None)[0, :6].sum()

    gradient = jax.jit(jax.grad(first_row))(x)
    assert np.abs(gradient[0, :6]).min() > 0
    assert not np.any(gradient[0, 6:])
    assert not np.any(gradient[1])


def test_batch_norm_counts_valid_frames_only():
    x = 3 * normal(3, 7, 4) + 1
    mask = masking.length_mask(jnp.array([7, 2, 0]), 7)
    module = layers.MaskedBatchNorm(momentum=0.5)
    variables = module.init(jax.random.key(0), x, mask, False)
    out, changed = module.apply(variables, x, mask, False, mutable=["batch_stats"])
    valid = np.asarray(x)[np.asarray(mask)]
    expected = (np.asarray(x) - valid.mean(0)) / np.sqrt(valid.var(0) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.5 * valid.mean(0), atol=1e-5)
    garbage = jnp.where(mask[:, :, None], x, 1e6)
    again, _ = module.apply(variables, garbage, mask, False, mutable=["batch_stats"])
    np.testing.assert_allclose(again[0], out[0], atol=1e-5)


def test_dropout_keeps_the_mean_and_draws_independently():
    x = jnp.ones((4, 100, 50))
    seed = jnp.array([3, 7], jnp.uint32)
    drop = jax.jit(layers.dropout, static_argnums=(1, 3))
    first, second = drop(x, 0.25, seed, 0), drop(x, 0.25, seed, 1)
    np.testing.assert_array_equal(first, drop(x, 0.25, seed, 0))
    for out in (first, second, drop(x, 0.25, jnp.array([3, 8], jnp.uint32), 0)):
        assert abs(float((out == 0).mean()) - 0.25) < 0.01
        np.testing.assert_allclose(out[out != 0], 1 / 0.75)
    both = float(((first == 0) & (second == 0)).mean())
    assert abs(both - 0.25**2) < 0.01
    flat = np.asarray(first == 0).ravel()
    for lag in (1, 2, 50, 5_000):
        assert abs(np.mean(flat[lag:] & flat[:-lag]) - 0.25**2) < 0.012
    np.testing.assert_array_equal(drop(x, 0.0, seed, 0), x)
    np.testing.assert_array_equal(layers.dropout(x, 0.5, None), x)


def test_impossible_settings_are_named():
    x, mask = jnp.zeros((1, 4, 6)), jnp.ones((1, 4), bool)
    with pytest.raises(ValueError, match="4 heads"):
        layers.SelfAttention(4).init(jax.random.key(0), x, mask, None)
    with pytest.raises(ValueError, match="absolute"):
        layers.SelfAttention(3, "absolute").init(jax.random.key(0), x, mask, None)
    with pytest.raises(ValueError, match="group"):
        layers.ConvolutionModule(3, "group").init(jax.random.key(0), x, mask, None)


@pytest.mark.parametrize(("first", "step"), [(0, 1), (5_999, -1)])
def test_sinusoids_of_a_symbolic_length_are_the_same(first, step):
    (size,) = jax.export.symbolic_shape("t")
    like = jax.ShapeDtypeStruct((size,), jnp.float32)
    compute = jax.jit(lambda x: layers.sinusoids(first, x.shape[0], step, 16))
    program = jax.export.export(compute)(like)
    found = program.call(jnp.zeros(12_000))
    np.testing.assert_allclose(found, layers.sinusoids(first, 12_000, step, 16), atol=1e-6)
