"""LoRA and adapters: they begin as the base, leave it as it is, and can be kept without it."""

import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import test_encoders
from speech_jax import bundle, experiment, files, models, train
from speech_jax.bundle import base
from speech_jax.bundle import runs as run_folders
from speech_jax.data.batch import Bucket
from speech_jax.data.parts.audio import Audio
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.errors import UserError
from speech_jax.training import peft, sharding
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax
LORA = peft.LoRA(rank=2, targets=r"(attention|feed_forward(_\d)?|convolution|subsampling)/.*kernel")


# ---- The transform -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", test_encoders.CASES)
def test_every_encoder_begins_as_its_base_and_is_the_same_merged(name):
    case = test_encoders.make_case(name)
    params = {"encoder": case.params}
    grown = peft.extended(params, LORA, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, peft.merged(grown, LORA), params)
    # Other factors than those that it begins with.
    rng = np.random.default_rng(0)
    flat = flax.traverse_util.flatten_dict(grown, sep="/")
    factors = {name: leaf for name, leaf in flat.items() if name.endswith(("_lora/a", "_lora/b"))}
    assert factors
    flat |= {
        name: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        for name, leaf in factors.items()
    }
    grown = flax.traverse_util.unflatten_dict(flat, sep="/")
    merged = jax.tree.map(np.asarray, peft.merged(grown, LORA))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    # The change is of the rank, layer by layer.
    for name in factors:
        if name.endswith("/a"):
            kernel = name.removesuffix("_lora/a")
            now = flax.traverse_util.flatten_dict(merged, sep="/")[kernel]
            change = now - flat[kernel]
            layers = change if name.startswith("encoder/layers/") else change[None]
            a = flat[name] if name.startswith("encoder/layers/") else flat[name][None]
            for layer, rows in zip(layers, a, strict=True):
                matrix = layer.reshape(rows.shape[0], -1)
                assert np.linalg.matrix_rank(matrix, tol=1e-4) == min(2, *matrix.shape)
    apply = case.encoder.apply
    unmerged = jax.jit(
        lambda grown: apply(
            {"params": peft.merged(grown, LORA)["encoder"], **case.state},
            case.inputs,
            case.lengths,
            True,
        )
    )
    ours, theirs = (
        np.asarray(found[0], np.float32)
        for found in (unmerged(grown), case.apply(merged["encoder"], case.inputs, case.lengths))
    )
    assert np.abs(ours - theirs).max() < 1e-5
    unchanged = case.apply(case.params, case.inputs, case.lengths)[0]
    assert np.abs(theirs - np.asarray(unchanged, np.float32)).max() > 1e-2


def test_a_kernel_is_cut_between_what_comes_in_and_what_goes_out():
    shapes = {
        (16, 64): (16, 64),
        (16, 3, 2, 8): (16, 48),
        (2, 8, 16): (16, 16),
        (16, 2, 16): (16, 32),
        (3, 3, 8, 8): (72, 8),
        (10, 1, 512): (10, 512),
    }
    for shape, sides in shapes.items():
        params = {"layer": {"kernel": jnp.ones(shape)}}
        factors = peft.extended(params, peft.LoRA(1, targets=".*"), jax.random.key(0))
        factors = factors["layer"]["kernel_lora"]
        assert (factors["a"].shape[0], factors["b"].shape[1]) == sides
    with pytest.raises(UserError, match=r"lora.targets matches a parameter of the shape \[3\]"):
        peft.extended({"bias": jnp.ones(3)}, peft.LoRA(1, targets=".*"), jax.random.key(0))
    with pytest.raises(UserError, match="lora.targets='atention/.*' matches no parameter"):
        peft.extended(params, peft.LoRA(1, targets="atention/.*"), jax.random.key(0))


def test_a_new_adapter_changes_nothing():
    for name, variant in (("conformer", "tiny"), ("wav2vec2", "tiny")):
        settings = test_encoders.SMALL if name == "conformer" else test_encoders.WAVEFORM
        inputs = jnp.ones((1, 64, 40)) if name == "conformer" else jnp.ones((1, 6_400))
        lengths = jnp.array([inputs.shape[1]])
        found = []
        for adapter in (0, 3):
            encoder = models.make_encoder(
                **models.settings(name, variant, **settings | {"adapter": adapter})
            )
            run = jax.jit(lambda e=encoder: e.init_with_output(jax.random.key(0), inputs, lengths, True))
            (hidden, _), variables = run()
            found.append((hidden, variables["params"]))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        added = set(flatten(found[1][1])) - set(flatten(found[0][1]))
        assert len(added) == 8
        assert all(name.split("/")[1] == "adapter" for name in added)


def flatten(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


# ---- What it costs -----------------------------------------------------------------------------


def flops(tmp_path, frozen=(), **sections):
    """(arithmetic of the compiled step, of the loss alone, numbers in the optimizer's state)."""
    config = runs.tiny_config(tmp_path)
    config.features.normalize = "utterance"
    config.model.update({"num_layers": 3, "width": 32})
    config.optimizer.frozen = frozen
    for section, values in sections.items():
        config[section].update(values)
    parts = {"audio": Audio(), "labels": Transcript(CharacterTokenizer("abc "), "labels")}
    task = experiment.make_task(config, parts)
    fields = parts["audio"].fields | parts["labels"].fields
    bucket = Bucket(4, (("samples", 32_000), ("labels", 8)))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    setup = experiment.make_setup(config, task, fields, mesh, bucket)
    count = lambda lowered: lowered.compile().cost_analysis()["flops"]
    abstract, batch = setup.abstract, setup.batch(bucket)
    step = count(setup.step().lower(abstract, batch))
    moments = sum(leaf.size for leaf in jax.tree.leaves(abstract.opt_state))
    learned = sum(leaf.size for leaf in jax.tree.leaves(abstract.params) if leaf.size)
    if frozen or sections:
        return step, moments
    forward = jax.jit(lambda *x: task.loss(*x)[:2]).lower(
        abstract.params, abstract.model_state, batch, abstract.rng
    )
    return step, moments, count(forward), learned


def test_what_is_frozen_costs_nothing(tmp_path):
    """In the program that XLA compiled: no backward pass below the lowest layer that learns."""
    full, moments, forward, parameters = flops(tmp_path)
    below = r"encoder/(subsampling|layer_[01])/.*"
    head, head_moments = flops(tmp_path, (("encoder/.*", -1),))
    top, _ = flops(tmp_path, ((below, -1),))
    lora, lora_moments = flops(tmp_path, lora={"rank": 1, "targets": "layer_2/attention/.*kernel"})
    print(f"forward {forward:.3g} head {head:.3g} top {top:.3g} lora {lora:.3g} full {full:.3g}")
    assert moments > 2 * parameters
    assert head < 1.15 * forward
    assert head < top < head + 0.5 * (full - head)
    assert head < lora < top * 1.02
    assert head_moments < 0.02 * moments
    assert lora_moments < 0.05 * moments
