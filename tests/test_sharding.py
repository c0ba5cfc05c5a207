"""Meshes, the rules, and where parameters and activations lie."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from speech_jax import models, rules, tasks
from speech_jax.errors import UserError
from speech_jax.models.waveform import SampleModel
from speech_jax.tasks import recognize
from speech_jax.training import sharding

LARGE = 500_000  # elements: 2 MB


def recognizer(name, **changes):
    """The parameters, as shapes, and the rules of an encoder with a CTC head."""
    largest = {
        "conformer": "l", "wav2vec2": "base", "wav2vec2_conformer": "large", "deepspeech": "ds2",
        "wavenet": "large",
    }  # fmt: skip
    variant = changes.pop("variant", largest[name])
    encoder = models.make_encoder(**models.settings(name, variant, **changes))
    task = tasks.constructor("recognize")(encoder, None, {"labels": 1024})
    return parameters(task, *inputs(encoder), True)


def translator():
    """The same of a translator: an encoder, a decoder of text and CTC."""
    encoder = models.make_encoder(**models.settings("conformer", "s"))
    counts = {"labels": 128, "target": 8_000}
    task = tasks.constructor("translate")(encoder, None, counts, decoder=None)
    text = jnp.zeros((1, 4), jnp.int32), jnp.full(1, 4)
    return parameters(task, *inputs(encoder), *text, True)


def pretraining(objective, name, variant):
    """The same of a task of pretraining."""
    encoder = models.make_encoder(**models.settings(name, variant))
    task = tasks.constructor(objective)(encoder, None)
    arguments = (*inputs(encoder), *([None] if objective == "contrastive" else []), True)
    return parameters(task, *arguments)


def samples():
    """The same of the model of the next sample, conditioned on log-mel and a speaker."""
    encoder = models.make_encoder(**models.settings("wavenet_waveform", "large"))
    model = SampleModel(encoder, 256, hop=160, speakers=3)
    mels, frames, speaker = jnp.zeros((1, 4, 80)), jnp.full(1, 4), jnp.zeros(1, jnp.int32)
    given = (jnp.zeros((1, 640)), True, mels, frames, speaker)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *given)["params"])
    return shapes, (*encoder.rules, *model.rules)


def inputs(encoder):
    shape = (1, 16_000) if encoder.listens == "waveform" else (1, 100, 80)
    return jnp.zeros(shape), jnp.full(1, shape[1])


def parameters(task, *arguments):
    init = lambda: task.model.init(jax.random.key(0), *arguments)["params"]
    return jax.eval_shape(init), task.rules


TREES = {
    "conformer": lambda: recognizer("conformer"),
    "unrolled": lambda: recognizer("conformer", scan=False, num_layers=1),
    "relative": lambda: recognizer("conformer", position="relative", conv_norm="batch"),
    "wav2vec2": lambda: recognizer("wav2vec2"),
    "layer norm": lambda: recognizer("wav2vec2", conv_norm="layer", conv_bias=True),
    # Half of its layers: all depthwise kernels, 3 MB, are no matter in 2.4 GB.
    "wav2vec2 conformer": lambda: recognizer("wav2vec2_conformer", num_layers=12),
    "rotary input": lambda: recognizer(
        "wav2vec2_conformer", num_layers=12, attention="rotary_input"
    ),
    "deepspeech": lambda: recognizer("deepspeech"),
    "original deepspeech": lambda: recognizer("deepspeech", variant="original"),
    "deepspeech lookahead": lambda: recognizer("deepspeech", variant="ds2_lookahead"),
    "wavenet": lambda: recognizer("wavenet"),
    "samples": samples,
    "contrastive": lambda: pretraining("contrastive", "wav2vec2", "base"),
    "translate": translator,
    "best-rq": lambda: pretraining("best_rq", "conformer", "s"),
}
HAVE_LAIN = json.loads((pathlib.Path(__file__).parent / "golden" / "sharding.json").read_text())


@pytest.mark.parametrize("tree", TREES)
def test_nothing_large_is_whole_on_every_device_under_fsdp(tree):
    params, task_rules = TREES[tree]()
    mesh = sharding.make_mesh(data=1, fsdp=8)
    placed = sharding.shard_params(params, mesh, task_rules)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert any(leaf.size > LARGE for _, leaf in leaves)
    for (path, leaf), where in zip(leaves, jax.tree.leaves(placed), strict=True):
        if leaf.size > LARGE:
            part = math.prod(where.shard_shape(leaf.shape))
            assert part * 8 == leaf.size, rules.path_name(path)


@pytest.mark.parametrize("tree", HAVE_LAIN)
def test_parameters_lie_where_they_have_lain(tree):
    """The table is from when all rules stood in one list and the first that matched held."""
    params, task_rules = TREES[tree]()
    placed = sharding.shard_params(params, sharding.make_mesh(data=2, fsdp=2, tensor=2), task_rules)
    leaves = jax.tree_util.tree_leaves_with_path(placed)
    found = {rules.path_name(path): list(where.spec) for path, where in leaves}
    assert found == HAVE_LAIN[tree]


def test_every_rule_is_of_use():
    used, known = set(), set()
    settings = ({"adapter": 8}, *({"subsampling_kind": kind} for kind in ("separable", "time")))
    more = [functools.partial(recognizer, "conformer", **changes) for changes in settings]
    for tree in (*TREES.values(), *more):
        params, task_rules = tree()
        for pattern, _ in task_rules:
            known.add(pattern)
            used |= {pattern for name in rules.names(params) if rules.matches(pattern, name)}
    assert used == known


def test_heads_and_hidden_units_are_split_over_tensor():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params, task_rules = TREES["conformer"]()
    placed = sharding.shard_params(params, mesh, task_rules)
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
    placed = sharding.shard_params(head, mesh, recognize.RULES)
    assert placed["head"]["kernel"].spec == P("fsdp", None)


@pytest.mark.parametrize(
    ("tree", "task_rules", "message"),
    [
        ({"my_head": {"kernel": (4, 4)}}, recognize.RULES, "no sharding rule .* my_head/kernel"),
        ({"head": {"kernel": (4, 4), "mystery": (4,)}}, recognize.RULES, "head/mystery: add one"),
        ({"head": {"kernel": (4,)}}, recognize.RULES, "more dimensions than head/kernel"),
        (
            {"head": {"kernel": (4, 4)}},
            ((r"head/kernel", ()), (r"\w+/kernel", ())),
            r"'head/kernel' and '.*/kernel' both match parameter head/kernel",
        ),
        ({"head": {"kernel": (4, 4)}}, ((r"(kernel", ()),), "is not a regular expression"),
    ],
)
def test_exactly_one_rule_is_of_a_parameter(tree, task_rules, message):
    shape = lambda sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = jax.tree.map(shape, tree, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(UserError, match=message):
        sharding.shard_params(params, sharding.make_mesh(), task_rules)


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
