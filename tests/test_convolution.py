"""Convolutions in the form for CPU and in XLA's, forwards and back; their geometry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from speech_jax.ops import convolution, partition

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def both_forms(monkeypatch, function, *arrays):
    """What a function of the arrays and its gradients are on CPU, and in the form for a GPU."""
    found = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(partition, "platform", lambda platform=platform: platform)
        value, vjp = jax.vjp(jax.jit(lambda *arrays: function(*arrays)), *arrays)
        found.append([value, *vjp(jnp.cos(value))])
    return found


def assert_same_numbers_by_other_means(monkeypatch, function, *arrays):
    ours, theirs = both_forms(monkeypatch, function, *arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert any((a != b).any() for a, b in zip(ours, theirs, strict=True))


PLANE = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize(
    ("run", "where"),
    [
        (lambda x: convolution.strided(x, jnp.ones((3, 4, 2)), 2), {"cuda", "tpu"}),
        (lambda x: convolution.depthwise(x, jnp.ones((3, 4)), None), {"cuda", "tpu"}),
        (lambda x: convolution.dilated(x, jnp.ones((3, 4, 4)), 2), {"cuda", "tpu"}),
        (
            lambda x: convolution.over_plane(
                x[..., None], jnp.ones((3, 3, 1, 2)), (2, 2), ((1, 1), (1, 1)), **PLANE
            ),
            {"cpu", "tpu"},
        ),
    ],
)
def test_a_program_for_several_platforms_chooses_where_it_runs(run, where):
    with partition.several_platforms():
        traced = jax.jit(run).trace(normal(1, 20, 4))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    found = {platform: "stablehlo.convolution" in text for platform, text in texts.items()}
    assert {name for name, convolved in found.items() if convolved} == where


@pytest.mark.parametrize(("kernel", "stride"), [(10, 5), (3, 2), (2, 2), (5, 3), (1, 1)])
@pytest.mark.parametrize("length", [40, 43])
def test_strided(kernel, stride, length, monkeypatch):
    x, weight = normal(2, length, 3), normal(kernel, 3, 4)
    run = lambda x, weight: convolution.strided(x, weight, stride)
    ours, theirs = both_forms(monkeypatch, run, x, weight)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert ours[0].shape[1] == convolution.output_length(length, kernel, stride)


@pytest.mark.parametrize(("kernel", "groups"), [(32, 2), (16, 4), (7, 1), (24, 8)])
def test_grouped(kernel, groups, monkeypatch):
    x, weight = normal(2, 21, 16), normal(kernel, 16 // groups, 16)
    run = lambda x, weight: convolution.grouped(x, weight, groups)
    assert_same_numbers_by_other_means(monkeypatch, run, x, weight)


@pytest.mark.parametrize("kernel", [5, 6, 31])
def test_depthwise(kernel, monkeypatch):
    x, weight, bias = normal(2, 21, 6), normal(kernel, 6), normal(6)
    assert_same_numbers_by_other_means(monkeypatch, convolution.depthwise, x, weight, bias)


@pytest.mark.parametrize(("frames", "kernel", "past"), [(21, 5, 2), (70, 31, 15), (9, 40, 39)])
def test_depthwise_of_gpus(frames, kernel, past):
    """The form that bfloat16 has there: sums in float32, its weight's gradient as a product."""
    x, weight, bias = normal(2, frames, 6), normal(kernel, 6), normal(6)
    weights = normal(2, frames, 6)

    def gradients(run):
        total = lambda x, weight: (weights * run(x, weight)).sum()
        return run(x, weight), *jax.grad(total, (0, 1))(x, weight)

    form = lambda x, weight: convolution._shifted_and_banded(x, weight, past)
    ours = gradients(form)
    theirs = gradients(lambda x, weight: convolution.depthwise(x, weight, None, past))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)

    device = AbstractDevice(device_kind="any", num_cores=1, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        run = lambda *arrays: convolution.depthwise(*arrays, past)
        assert "conv_general_dilated" in str(jax.make_jaxpr(run)(x, weight, bias))
        halves = [one.astype(jnp.bfloat16) for one in (x, weight, bias)]
        text = str(jax.make_jaxpr(run)(*halves))
        assert "conv_general_dilated" not in text
        assert "custom_vjp" in text


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 4), (2, 8), (7, 1)])
def test_dilated(kernel, dilation, monkeypatch):
    x, weight = normal(2, 21, 6), normal(kernel, 6, 5)
    run = lambda x, weight: convolution.dilated(x, weight, dilation)
    assert_same_numbers_by_other_means(monkeypatch, run, x, weight)
    heard = jnp.abs(jax.jacobian(run)(x, weight)[0, 5, 0, 0]).sum(axis=1) > 0
    assert np.flatnonzero(heard).tolist() == [5 + tap * dilation for tap in range(kernel)]


@pytest.mark.parametrize("scanned", [False, True])
def test_the_form_is_that_of_the_devices_that_a_program_is_for(scanned):
    """A mesh may be of another machine: preflight compiles here for a slice of a pod."""

    def run(x, weight):
        body = lambda x, _: (convolution.depthwise(x, weight, None), None)
        return lax.scan(body, x, length=3)[0] if scanned else body(x, None)[0]

    def primitives(platform):
        device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return str(jax.make_jaxpr(run)(normal(1, 9, 4), normal(3, 4)))

    assert "conv_general_dilated" in primitives("tpu")
    assert "conv_general_dilated" not in primitives("cpu")
    assert partition.platform() == "cpu"


def test_group_norm_folded_into_the_convolution_is_a_group_norm():
    x, weight = normal(2, 50, 10) + 3.0, normal(1, 10, 6)
    scale, shift, frames = normal(6), normal(6), jnp.array([50, 31])
    found = convolution.strided_and_normalized(x, frames, weight, 1, scale, shift, jnp.float32)
    for row, count in enumerate([50, 31]):
        plain = np.asarray(x[row, :count]) @ np.asarray(weight[0])
        plain = (plain - plain.mean(0)) / np.sqrt(plain.var(0) + 1e-5)
        plain = plain * np.asarray(scale) + np.asarray(shift)
        np.testing.assert_allclose(found[row, :count], plain, atol=1e-4)


def test_a_frame_sees_its_receptive_field():
    kernels, strides = (10, 3, 2), (5, 2, 2)
    field = convolution.receptive_field(kernels, strides)
    for samples, frames in ((field - 1, 0), (field, 1), (field + 20, 2)):
        for kernel, stride in zip(kernels, strides, strict=True):
            samples = convolution.output_length(samples, kernel, stride)
        assert samples == frames


@pytest.mark.parametrize(("frames", "bands", "channels"), [(11, 8, 1), (12, 7, 3)])
def test_a_plane_is_convolved_alike_in_both_forms(monkeypatch, frames, bands, channels):
    def function(x, weight):
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = ((1, 1), (1, 1))
        return convolution.over_plane(x, weight, (2, 2), padding, dimension_numbers=numbers)

    arrays = normal(2, frames, bands, channels), normal(3, 3, channels, 5)
    on_cpu, on_gpu = both_forms(monkeypatch, function, *arrays)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("frames", "bands"), [(11, 8), (12, 7)])
def test_the_channels_of_a_plane_are_convolved_on_their_own(monkeypatch, frames, bands):
    settings = {**PLANE, "feature_group_count": 5}

    def function(x, weight):
        return convolution.depthwise_over_plane(x, weight, (2, 2), ((1, 1), (1, 1)), **settings)

    arrays = normal(2, frames, bands, 5), normal(3, 3, 1, 5)
    assert_same_numbers_by_other_means(monkeypatch, function, *arrays)


def test_over_time_is_what_the_convolution_of_flax_is():
    x, weight = normal(2, 11, 4), normal(3, 4, 5)
    ours, theirs = (
        nn.Conv(5, (3,), strides=(2,), padding=((1, 1),), conv_general_dilated=form).apply(
            {"params": {"kernel": weight, "bias": jnp.zeros(5)}}, x
        )
        for form in (convolution.over_time, None)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
