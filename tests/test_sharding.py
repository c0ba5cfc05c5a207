"""Meshes, the rules, and where parameters and activations lie."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from speech_jax import models
from speech_jax.errors import UserError
from speech_jax.tasks import pretrain
from speech_jax.tasks.recognize import CTCModel
from speech_jax.training import optim, sharding

LARGE = 500_000  # elements: 2 MB


def shapes(name, **changes):
    """Every parameter of an encoder with a CTC head, as shapes."""
    variant = {"conformer": "l", "wav2vec2": "base", "wav2vec2_conformer": "large"}[name]
    encoder = models.make_encoder(**models.settings(name, variant, **changes))
    inputs = (1, 16_000) if encoder.frontend == "waveform" else (1, 100, 80)
    model = CTCModel(encoder, vocabulary_size=1024)
    lengths = jnp.full(1, inputs[1])
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(inputs), lengths, True)["params"]
    )


def contrastive():
    """Every parameter of wav2vec 2.0's pretraining."""
    encoder = models.make_encoder(**models.settings("wav2vec2", "base"))
    model = pretrain.ContrastiveModel(
        encoder, groups=2, codes=320, code_features=256, final_features=256
    )
    arguments = jnp.zeros((1, 16_000)), jnp.full(1, 16_000), None, True
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments)["params"])


def classifier():
    """Every parameter of BEST-RQ."""
    encoder = models.make_encoder(**models.settings("conformer", "s"))
    model = pretrain.ClassifierModel(encoder, codes=8192)
    arguments = jnp.zeros((1, 100, 80)), jnp.full(1, 100), True
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments)["params"])


TREES = {
    "conformer": lambda: shapes("conformer"),
    "unrolled": lambda: shapes("conformer", scan=False, num_layers=1),
    "relative": lambda: shapes("conformer", position="relative", conv_norm="batch"),
    "wav2vec2": lambda: shapes("wav2vec2"),
    "layer norm": lambda: shapes("wav2vec2", conv_norm="layer", conv_bias=True),
    # Half of its layers: all depthwise kernels, 3 MB, are no matter in 2.4 GB.
    "wav2vec2 conformer": lambda: shapes("wav2vec2_conformer", num_layers=12),
    "rotary input": lambda: shapes("wav2vec2_conformer", num_layers=12, attention="rotary_input"),
    "contrastive": contrastive,
    "best-rq": classifier,
}


@pytest.mark.parametrize("tree", TREES)
def test_nothing_large_is_whole_on_every_device_under_fsdp(tree):
    params = TREES[tree]()
    mesh = sharding.make_mesh(data=1, fsdp=8)
    placed = sharding.shard_params(params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert any(leaf.size > LARGE for _, leaf in leaves)
    for (path, leaf), where in zip(leaves, jax.tree.leaves(placed), strict=True):
        if leaf.size > LARGE:
            part = math.prod(where.shard_shape(leaf.shape))
            assert part * 8 == leaf.size, optim.path_name(path)


def test_every_rule_is_of_use():
    names = {
        optim.path_name(path)
        for tree in TREES.values()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree())
    }
    for name in list(names):
        first = next(pattern for pattern, _ in sharding.RULES if re.search(pattern, name))
        names.discard(name)
        names.add(first)
    assert names == {pattern for pattern, _ in sharding.RULES}


def test_heads_and_hidden_units_are_split_over_tensor():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.shard_params(shapes("conformer"), mesh)
    layers = placed["encoder"]["layers"]
    assert layers["attention"]["qkv"]["kernel"].spec == P(None, "fsdp", None, "tensor", None)
    assert layers["attention"]["project"]["kernel"].spec == P(None, "tensor", None, "fsdp")
    assert layers["feed_forward_1"]["expand"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert layers["feed_forward_1"]["project"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert layers["convolution"]["depthwise"]["kernel"].spec == P(None, None, "tensor")
    assert placed["head"]["kernel"].spec == P("fsdp", "tensor")


def test_what_an_axis_does_not_divide_is_not_split_over_it():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    head = {"head": {"kernel": jax.ShapeDtypeStruct((16, 29), jnp.float32)}}
    assert sharding.shard_params(head, mesh)["head"]["kernel"].spec == P("fsdp", None)


def test_a_parameter_without_a_rule_is_named():
    unknown = {"encoder": {"mystery": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(UserError, match=r"encoder/mystery \(4,\): add one"):
        sharding.shard_params(unknown, sharding.make_mesh())
    flat = {"head": {"kernel": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(UserError, match="more dimensions than head/kernel"):
        sharding.shard_params(flat, sharding.make_mesh())


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(sizes, shape):
    assert tuple(sharding.make_mesh(**sizes).shape.values()) == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": -1, "fsdp": -1}])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(**sizes)
