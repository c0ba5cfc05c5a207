"""LoRA and adapters: they begin as the base, leave it as it is, and can be kept without it."""

import contextlib
import dataclasses
import io
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import test_encoders
from configs import finetune_lora, librispeech
from speech_jax import bundle, experiment, tasks, train
from speech_jax import config as defaults
from speech_jax.bundle import base, format, start
from speech_jax.bundle import runs as run_folders
from speech_jax.data.batch import Bucket, shapes
from speech_jax.data.parts.audio import Audio
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.setup import make_setup
from speech_jax.training import costs, groups, peft, sharding
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax
LORA = peft.LoRA(rank=2, targets=rf"{peft.LoRA.targets}|(convolution|subsampling)/.*kernel")


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
    apply = jax.jit(
        lambda grown: case.encoder.apply(
            {"params": peft.merged(grown, LORA)["encoder"], **case.state},
            case.inputs,
            case.lengths,
            True,
        )[0].astype(jnp.float32)
    )
    # What was merged, with factors that change nothing, so that one program serves for all.
    still = {name: np.zeros_like(leaf) for name, leaf in factors.items()}
    beside = lambda tree: flax.traverse_util.unflatten_dict(
        flax.traverse_util.flatten_dict(tree, sep="/") | still, sep="/"
    )
    unmerged, whole, before = (apply(x) for x in (grown, beside(merged), beside(params)))
    assert np.abs(unmerged - whole).max() < 1e-5
    assert np.abs(whole - before).max() > 1e-2


def test_a_kernel_is_cut_between_what_comes_in_and_what_goes_out():
    shapes = {
        (16, 64): (16, 64),
        (16, 3, 2, 8): (16, 48),
        (2, 8, 16): (16, 16),
        (16, 2, 16): (16, 32),
        (3, 3, 32, 32): (288, 32),
        (10, 1, 512): (10, 512),
    }
    for shape, sides in shapes.items():
        params = {"layer": {"kernel": jnp.ones(shape)}}
        factors = peft.extended(params, peft.LoRA(1, targets=".*"), jax.random.key(0))
        factors = factors["layer"]["kernel_lora"]
        assert (factors["a"].shape[0], factors["b"].shape[1]) == sides
    with pytest.raises(UserError, match=r"lora.targets matches a parameter of the shape \[3\]"):
        peft.extended({"bias": jnp.ones(3)}, peft.LoRA(1, targets=".*"), jax.random.key(0))
    with pytest.raises(UserError, match=r"lora.targets='atention/.*' matches no parameter"):
        peft.extended(params, peft.LoRA(1, targets="atention/.*"), jax.random.key(0))


def test_a_new_adapter_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    adapter = layers.Adapter(3)
    same, variables = adapter.init_with_output(jax.random.key(1), x)
    np.testing.assert_array_equal(same, x)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    assert np.abs(adapter.apply(moved, x) - x).max() > 0.01


def flatten(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


# ---- What it costs -----------------------------------------------------------------------------


def setup(tmp_path, frozen=(), **lora):
    config = runs.tiny_config(tmp_path)
    config.features.normalize = "utterance"
    config.model.update({"num_layers": 2, "width": 32})
    config.optimizer.frozen = frozen
    config.lora.update(lora)
    parts = {"audio": Audio(), "labels": Transcript(CharacterTokenizer("abc "), "labels")}
    task = experiment.make_task(config, parts)
    fields = parts["audio"].fields | parts["labels"].fields
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return make_setup(config, task, fields, mesh, BUCKET)


BUCKET = Bucket(4, (("samples", 32_000), ("labels", 8)))


def traced(made, done=None):
    return made.step(done).trace(made.abstract, made.batch(BUCKET))


def compiled_flops(program):
    return program.lower().compile().cost_analysis()["flops"]


def moments(made):
    return sum(leaf.size for leaf in jax.tree.leaves(made.abstract.opt_state))


def test_what_is_frozen_costs_nothing(tmp_path):
    """Neither memory of the optimizer nor, below the lowest layer that learns, a backward pass."""
    full = setup(tmp_path)
    head = setup(tmp_path, (("encoder/.*", -1),))
    top = setup(tmp_path, ((r"encoder/(subsampling|layer_0)/.*", -1),))
    lora = setup(tmp_path, rank=1, targets="layer_1/attention/.*kernel")
    forward = jax.jit(lambda *x: head.task.loss(*x)[:2]).trace(
        head.abstract.params, head.abstract.model_state, head.batch(BUCKET), head.abstract.rng
    )
    later = setup(tmp_path, (("encoder/.*", 4),))
    # In the program as XLA compiled it.
    assert compiled_flops(traced(head)) < 1.1 * compiled_flops(forward)
    # In the products of matrices that are left.
    cost = {
        name: costs.matmul_flops(program.jaxpr)
        for name, program in {
            "forward": forward, "head": traced(head), "top": traced(top), "lora": traced(lora),
            "full": traced(full), "still": traced(later, 0), "thawed": traced(later),
        }.items()
    }  # fmt: skip
    assert cost["forward"] < cost["head"] < 1.05 * cost["forward"]
    assert later.starts == [0, 4]
    assert (cost["still"], cost["thawed"]) == (cost["head"], cost["full"])
    assert cost["head"] < cost["lora"] < cost["top"] < 0.75 * cost["full"]
    assert moments(full) > 2 * full.parameters
    assert moments(head) < 0.02 * moments(full)
    assert moments(lora) < 0.05 * moments(full)


@pytest.mark.parametrize("take", ["model", "encoder"])
def test_a_decoder_stands_still_beneath_its_changes_where_it_was_trained(take, tmp_path):
    config = runs.tiny_config(tmp_path)
    config.features.normalize = "utterance"
    config.task = tasks.settings("attend", layers=1, heads=2)
    config.lora.rank = 1
    config.init.update({"folder": "base", "take": take})
    parts = {"audio": Audio(), "labels": Transcript(CharacterTokenizer("abc "), "labels")}
    task = experiment.make_task(config, parts)
    fields = parts["audio"].fields | parts["labels"].fields
    batch = {name: jnp.zeros(*one) for name, one in shapes(fields, BUCKET).items()}
    params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
    learns = flatten(groups.trainable(params, experiment.frozen(config)))
    beneath = [name for name in learns if f"{name}_lora/a" in learns]
    assert {name.split("/")[0] for name in beneath} == {"encoder", "decoder"}
    for name in beneath:
        assert learns[name] == (take == "encoder" and name.startswith("decoder/")), name
        assert learns[f"{name}_lora/a"]
    assert learns["decoder/output/kernel"]


# ---- A run -------------------------------------------------------------------------------------


def adapting(finished, tones):
    config = runs.tiny_config(tones, steps=4, eval_every=2, ema_decay=0.5)
    config.init.update({"folder": str(finished.workdir.folder), "take": "model"})
    config.lora.update({"rank": 1, "alpha": 2.0})
    config.optimizer.frozen = (("head/.*", -1),)
    return config


@pytest.fixture(scope="module")
def adapted(finished, tones, tmp_path_factory):
    """A run of LoRA that came to its end, and what it said."""
    config = adapting(finished, tones)
    workdir = Workdir(tmp_path_factory.mktemp("adapted") / "work")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        results = train.run(config, workdir)
    return runs.Finished(config, workdir, results), said.getvalue()


def test_the_log_begins_with_what_learns_and_what_it_starts_from(adapted, finished):
    said = adapted[1]
    assert "encoder/layers (added)" in said
    assert f"starts from {finished.workdir.folder}: takes encoder" in said
    rows = [line.split() for line in said.splitlines() if line.startswith(("encoder/", "head"))]
    assert [row[-1] for row in rows] == ["no", "1", "no", "no"]
    assert "416 of 7,409 parameters learn (5.61%)" in said


def test_a_run_of_lora_leaves_its_base_as_it_was(adapted, finished):
    workdir = adapted[0].workdir
    before = flatten(bundle.open(finished.workdir.folder).params)
    after = flatten(run_folders.open_workdir(workdir.folder).params)
    for name, value in before.items():
        np.testing.assert_array_equal(after.pop(name), value)
    assert after
    assert all(name.endswith(("_lora/a", "_lora/b")) for name in after)
    assert max(np.abs(value).max() for name, value in after.items() if name.endswith("b")) > 1e-3
    saved = runs.saved_state(workdir)
    averaged = {name.removeprefix("ema/") for name in saved if name.startswith("ema/")}
    assert averaged == after.keys()
    memory = sum(value.size for name, value in saved.items() if name.startswith("opt_state/"))
    assert memory < 2.1 * sum(value.size for value in after.values())


def test_a_run_of_lora_resumes_bit_for_bit(adapted, tmp_path):
    (config, workdir, results), _ = adapted
    again = Workdir(shutil.copytree(workdir.folder, tmp_path / "run"))
    shutil.rmtree(again.checkpoints / "4")
    again.results.unlink()
    assert train.run(config, again)["splits"] == results["splits"]
    jax.tree.map(
        np.testing.assert_array_equal, runs.saved_state(again, 4), runs.saved_state(workdir, 4)
    )
    assert runs.metrics(again.folder) == runs.metrics(workdir.folder)


def test_what_was_trained_is_kept_alone_and_merged_again(adapted, finished, tmp_path, capsys):
    workdir = adapted[0].workdir
    small, whole = tmp_path / "small", tmp_path / "whole"
    base.main(["split", str(workdir.folder), str(small)])
    base.main(["merge", str(small), str(whole)])
    kept = format.open_saved(small)
    assert all(name.endswith(("_lora/a", "_lora/b")) for name in flatten(kept.params))
    assert kept.base["folder"] == str(finished.workdir.folder)
    unmerged = run_folders.open_workdir(workdir.folder)
    opened = [bundle.open(folder) for folder in (workdir.folder, small, whole)]
    for model in opened[1:]:
        jax.tree.map(np.testing.assert_array_equal, model.params, opened[0].params)
    assert opened[0].config.lora.rank == 0
    assert unmerged.config.lora.rank == 1
    batch = {
        "audio": np.random.default_rng(0).integers(-3000, 3000, (2, 16_000), np.int16),
        "audio_length": np.array([16_000, 12_000], np.int32),
    }
    logits = [
        model.task().logits(model.params, model.state, batch)[0] for model in (unmerged, opened[2])
    ]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5
    # The base has to be what it was.
    changed = bundle.open(finished.workdir.folder)
    changed.params["head"]["bias"] = changed.params["head"]["bias"] + 1e-6
    bundle.save(changed, tmp_path / "changed")
    arguments = ["merge", str(small), str(tmp_path / "other"), "--base"]
    with pytest.raises(
        SystemExit, match=f"changed is not, .* {small} was trained on .* --base=DIR"
    ):
        base.main([*arguments, str(tmp_path / "changed")])
    with pytest.raises(SystemExit, match=r"no folder .*nowhere: .* --base=DIR"):
        base.main([*arguments, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):  # there is no base to be named
        base.main(["split", str(workdir.folder), *arguments[2:], str(tmp_path / "changed")])
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="trained all of its parameters"):
        base.split(finished.workdir.folder)


def test_what_thaws_stands_still_until_then(finished, tones, tmp_path):
    config = runs.tiny_config(tones, steps=3, eval_every=3)
    config.init.folder = str(finished.workdir.folder)
    config.optimizer.frozen = (("encoder/.*", 2),)
    config.checkpoint.update({"every": 1, "keep": 3})
    train.run(config, Workdir(tmp_path))
    before = start.flat(bundle.open(finished.workdir.folder).params, {})
    for step in (1, 2, 3):
        after = runs.saved_state(Workdir(tmp_path), step)
        same = [np.array_equal(after[name], before[name]) for name in before if "encoder" in name]
        assert all(same) if step < 3 else not any(same)


def test_the_adapters_of_a_base_are_taken(finished, tones, tmp_path):
    """And those that a base has not are new."""
    config = runs.tiny_config(tones)
    config.init.folder = str(finished.workdir.folder)
    config.model.adapter = 2
    source = experiment.open_training(config)
    task = experiment.make_task(config, experiment.make_parts(config, tmp_path, source))
    batch = {"audio": jnp.zeros((1, 16_000), jnp.int16), "audio_length": jnp.array([16_000])}
    params, state = jax.jit(task.init)(jax.random.key(1), batch)
    adapters = {name for name in flatten(params) if "/adapter/" in name}
    report = start.with_bundle(params, state, config)[2]
    assert {name.removeprefix("params/") for name in report.new} > adapters != set()
    base = bundle.open(finished.workdir.folder)
    theirs = base.config.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.model.adapter = 2
    learned = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)
    bundle.save(dataclasses.replace(base, config=theirs, params=learned), tmp_path / "base")
    config.init.folder = str(tmp_path / "base")
    started, _, report = start.with_bundle(params, state, config)
    for name in adapters:
        np.testing.assert_array_equal(flatten(started)[name], flatten(learned)[name])
    assert all("encoder" not in name for name in report.new)


def test_the_recipe_learns_and_keeps_less_than_three_percent(tmp_path):
    """Of conformer_tiny with the letters of English."""
    config = librispeech.get_config("conformer_tiny")
    config.features.normalize = "utterance"
    labels = Transcript(CharacterTokenizer("abcdefghijklmnopqrstuvwxyz' "), "labels")
    parts = {"audio": Audio(), "labels": labels}

    def zeros(config):
        task = experiment.make_task(config, parts)
        batch = {"audio": jnp.zeros((1, 16_000), jnp.int16), "audio_length": jnp.array([16_000])}
        shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    params, state = zeros(config)
    bundle.save(bundle.Bundle(config, parts, params, state), tmp_path / "whole")
    tuning = finetune_lora.get_config(str(tmp_path / "whole"))
    params, state = zeros(tuning)
    learned, _ = groups.split(params, groups.trainable(params, experiment.frozen(tuning)))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(learned) < 0.03 * size(params)
    flat = {name: leaf for name, leaf in flatten(learned).items() if leaf is not None}
    small = flax.traverse_util.unflatten_dict(flat, sep="/")
    base = {"folder": str(tmp_path / "whole"), "digest": "x" * 64}
    bundle.save(bundle.Bundle(tuning, parts, small, state, base), tmp_path / "small")
    size = lambda name: sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    assert size("small") < 0.03 * size("whole")


def test_the_recipe_takes_all_of_a_model(finished):
    folder = str(finished.workdir.folder)
    config = finetune_lora.get_config(folder)
    defaults.check(config)
    theirs = finished.workdir.recorded()
    for section in ("model", "features", "text", "task"):
        assert config[section].to_dict() == theirs[section].to_dict()
    assert (config.init.folder, config.init.take) == (folder, "model")
    with pytest.raises(UserError, match="no model to start from"):
        finetune_lora.get_config()
