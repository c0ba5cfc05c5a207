"""wav2vec2: invariance at every layer, fast forms against plain ones, masks and freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax import models
from speech_jax.models import stack_layers

SMALL = {
    "width": 16, "num_layers": 2, "heads": 2, "feed_forward": 24,
    "conv_channels": (8, 8, 12), "conv_kernels": (10, 8, 8), "conv_strides": (5, 8, 8),
    "position_kernel": 8, "position_groups": 4,
    "scan": False,
}  # fmt: skip
LARGE = {"pre_norm": True, "conv_norm": "layer", "conv_bias": True}
QUIET = {"dropout": 0.0, "input_dropout": 0.0}
SAMPLES, LENGTHS = 4_000, [4_000, 2_900, 0]


def make(**settings):
    return models.make_encoder("wav2vec2", **SMALL | settings)


def waveform(seed=0, samples=SAMPLES):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((3, samples)), jnp.float32)


def init(encoder):
    """Random parameters of about the size that training starts from; none is exactly 0 or 1."""
    shapes = jax.eval_shape(
        lambda: encoder.init(jax.random.key(0), waveform(), jnp.array(LENGTHS), True)["params"]
    )
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        ones = path[-1].key.startswith(("scale", "magnitude"))
        return jnp.asarray(ones + 0.2 * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def hidden_states(encoder, params, inputs, lengths):
    """Every module's output [B, T, ...], by its path; attention weights are [B, H, T, T]."""
    run = lambda inputs, lengths: encoder.apply(
        {"params": params}, inputs, lengths, True, capture_intermediates=True
    )
    captured = jax.jit(run)(inputs, lengths)[1]["intermediates"]
    leaves = jax.tree_util.tree_leaves_with_path(captured)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim in (3, 5)}


def apply(encoder, params, inputs, lengths, deterministic=True, seed=0, mask=None):
    """The hidden states of a compiled encoder."""
    run = lambda params, inputs, lengths, key: encoder.apply(
        {"params": params}, inputs, lengths, deterministic, mask, rngs={"dropout": key}
    )[0]
    return jax.jit(run)(params, inputs, jnp.asarray(lengths), jax.random.key(seed))


@pytest.mark.parametrize("variant", [{}, LARGE], ids=["group", "layer"])
def test_no_layer_depends_on_padding_or_neighbours(variant):
    encoder = make(**variant)
    params = init(encoder)
    lengths = jnp.array(LENGTHS)
    clean = hidden_states(encoder, params, waveform(), lengths)
    garbage = jnp.arange(SAMPLES)[None] >= lengths[:, None]
    dirty = hidden_states(encoder, params, jnp.where(garbage, 100.0, waveform()), lengths)
    alone = hidden_states(encoder, params, waveform()[1:2, : LENGTHS[1]], lengths[1:2])
    assert len(clean) > 20
    frames = encoder.output_lengths(LENGTHS[1])
    for name, value in clean.items():
        # Layers of the extractor have more frames than the Transformer's.
        valid = frames if "layer_" in name else alone[name].shape[1]
        np.testing.assert_allclose(
            dirty[name][1, :valid], value[1, :valid], atol=1e-5, err_msg=name
        )
        np.testing.assert_allclose(
            alone[name][0, :valid], value[1, :valid], atol=1e-4, err_msg=name
        )
        assert np.isfinite(value).all(), name


def test_the_original_group_norm_depends_on_padding():
    original = make(norm_padding=True)
    params, lengths = init(original), [2_900] * 3
    silent = jnp.where(jnp.arange(SAMPLES)[None] < 2_900, waveform(), 0.0)
    frames = original.output_lengths(2_900)
    padded = apply(original, params, silent, lengths)[:, :frames]
    alone = apply(original, params, silent[:, :2_900], lengths)
    assert np.abs(padded - alone).max() > 1e-3
    ours = apply(make(), params, silent, lengths)[:, :frames]
    np.testing.assert_allclose(ours, alone, atol=1e-4)


def test_output_lengths_are_whole_windows():
    encoder = models.make_encoder(**models.settings("wav2vec2", "base"))
    assert [encoder.output_lengths(n) for n in (0, 399, 400, 719, 720, 16_000)] == [
        0,
        0,
        1,
        1,
        2,
        49,
    ]
    np.testing.assert_array_equal(encoder.output_lengths(jnp.array([399, 720])), [0, 2])
    with pytest.raises(ValueError, match="324 samples, a frame needs 325"):
        make().init(jax.random.key(0), jnp.zeros((1, 324)), jnp.array([324]), True)


def test_scan_and_remat_change_nothing():
    params = init(make())
    plain = apply(make(), params, waveform(), LENGTHS)
    scanned = apply(make(scan=True, remat=True), stack_layers(params), waveform(), LENGTHS)
    np.testing.assert_allclose(scanned, plain, atol=1e-5)


def test_published_sizes():
    """95.0 M and 317 M parameters: table 1 of the paper, without what pretraining adds.

    The Conformer has 618.6 M as released, 8.4 M of them in a convolution that it does not apply.
    """
    sizes = {
        ("wav2vec2", "base"): 94.4,
        ("wav2vec2", "large"): 315.4,
        ("wav2vec2_conformer", "large"): 610.2,
    }
    for size, millions in sizes.items():
        encoder = models.make_encoder(**models.settings(*size))
        shapes = jax.eval_shape(
            lambda e=encoder: e.init(
                jax.random.key(0), jnp.zeros((1, 4_000)), jnp.array([4_000]), True
            )
        )
        count = sum(x.size for x in jax.tree.leaves(shapes["params"])) / 1e6
        assert count == pytest.approx(millions, abs=0.1), size


# ---- Training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["relative", "rotary_input"])
def test_a_conformer_in_training_does_not_see_padding(attention):
    settings = {k: v for k, v in SMALL.items() if not k.startswith("position")} | QUIET
    encoder = models.make_encoder("wav2vec2_conformer", **settings, kernel=5, attention=attention)
    lengths = jnp.array(LENGTHS)
    variables = jax.jit(encoder.init, static_argnums=3)(
        jax.random.key(0), waveform(), lengths, True
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32), variables["params"]
    )
    run = jax.jit(
        lambda inputs: encoder.apply(
            {**variables, "params": params},
            inputs,
            lengths,
            False,
            rngs={"dropout": jax.random.key(1)},
            mutable="batch_stats",
        )
    )
    (hidden, _), statistics = run(waveform())
    garbage = jnp.arange(SAMPLES)[None] >= lengths[:, None]
    (again, _), same = run(jnp.where(garbage, 100.0, waveform()))
    np.testing.assert_allclose(again, hidden, atol=1e-5)
    for new, old, found in zip(
        *(jax.tree.leaves(tree["batch_stats"]) for tree in (statistics, variables, same)),
        strict=True,
    ):
        assert np.abs(new - old).max() > 1e-2
        np.testing.assert_allclose(found, new, atol=1e-6)


def test_masks_are_of_training_and_are_learned():
    encoder = make(mask_time=0.5, mask_channel=0.2, mask_channel_length=4, **QUIET)
    params = init(encoder)
    run = lambda *how: apply(encoder, params, waveform(), LENGTHS, *how)
    np.testing.assert_array_equal(run(True), apply(make(), params, waveform(), LENGTHS))
    assert np.abs(run(False) - run(True)).max() > 1e-2
    assert np.abs(run(False, 1) - run(False)).max() > 1e-2
    learned = jax.grad(lambda p: jnp.square(apply(encoder, p, waveform(), LENGTHS, False)).sum())(
        params
    )
    assert np.abs(learned["mask_embedding"]).max() > 0


def test_a_given_mask_hides_what_it_covers():
    encoder = make()
    params = init(encoder)
    mask = jnp.ones((3, encoder.output_lengths(SAMPLES)), bool)
    first, second = (apply(encoder, params, waveform(seed), LENGTHS, mask=mask) for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_layer_drop_skips_layers():
    params = init(make())
    changed = params | {"layer_0": jax.tree.map(lambda x: 2 * x, params["layer_0"])}
    for probability, matters in ((1.0, False), (0.0, True)):
        encoder = make(layer_drop=probability, **QUIET)
        before, after = (apply(encoder, p, waveform(), LENGTHS, False) for p in (params, changed))
        assert (np.abs(before - after).max() > 1e-3) == matters


def test_the_gradient_of_the_extractor_is_scaled():
    params = init(make())

    def gradient(factor):
        encoder = make(feature_gradient=factor)
        return jax.grad(lambda p: apply(encoder, p, waveform(), LENGTHS)[..., 0].sum())(params)

    full = gradient(1.0)
    for factor in (0.0, 0.1):
        scaled = gradient(factor)
        expected = full | {"extractor": jax.tree.map(lambda x, f=factor: x * f, full["extractor"])}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), scaled, expected
        )


def test_bfloat16_computes_in_it_and_stays_close():
    params = init(make())
    exact = apply(make(), params, waveform(), LENGTHS)
    coarse = apply(make(dtype="bfloat16"), params, waveform(), LENGTHS)
    assert coarse.dtype == jnp.bfloat16
    difference = np.abs(coarse.astype(jnp.float32) - exact).mean()
    assert difference < 0.05 * np.abs(exact).mean()


def test_wrong_settings_are_named():
    for settings, message in (
        ({"conv_norm": "batch"}, "conv_norm must be 'group' or 'layer', got 'batch'"),
        ({"heads": 3}, "a width of 16 cannot be split into 3 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings).init(jax.random.key(0), waveform(), jnp.array(LENGTHS), True)
