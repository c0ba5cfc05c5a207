"""Hugging Face folders in and out: golden files always, transformers where it is installed."""

import dataclasses
import json
import pathlib
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

import hf_reference
import speech_jax
from speech_jax import bundle as bundles
from speech_jax import models, tasks
from speech_jax.bundle import huggingface as hf
from speech_jax.bundle import tensors
from speech_jax.bundle.format import Bundle
from speech_jax.bundle.names import HEADS, architecture
from speech_jax.config import default
from speech_jax.data import text
from speech_jax.data.parts.audio import Audio, Crop
from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.tasks.contrastive import Draws

GOLDEN = pathlib.Path(__file__).parent / "data"
live = pytest.mark.skipif(
    hf_reference.torch is None, reason="NO PYTORCH: install torch and transformers to compare live"
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Base-like CTC folder, to be damaged."""
    shutil.copytree(GOLDEN / "wav2vec2_base", tmp_path / "model")
    return tmp_path / "model"


# Encoders of theirs, as ours.
KINDS = {
    "wav2vec2": {
        "name": "wav2vec2", "pre_norm": True, "position_kernel": 4, "position_groups": 2,
    },
    "conformer": {"name": "wav2vec2_conformer", "kernel": 3, "attention": "relative"},
    "conformer-rotary": {"name": "wav2vec2_conformer", "kernel": 5, "attention": "rotary_input"},
}  # fmt: skip


def expected(name):
    arrays = np.load(GOLDEN / f"wav2vec2_{name}" / "expected.npz")
    tree = flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
    config = json.loads((GOLDEN / f"wav2vec2_{name}" / "config.json").read_text())
    return tree, config


def assert_trees_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))


# ---- The same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "large", "conformer", "conformer_rotary"])
def test_ctc_matches_transformers(name):
    stored, config = expected(name)
    model = hf.read(GOLDEN / f"wav2vec2_{name}")
    ours, gradients, frames = hf_reference.our_ctc(model, stored["batch"])
    worst = hf_reference.compare(stored["value"], ours, frames)
    assert worst.pop("loss") < 1e-4
    assert len(worst) == 4
    assert max(worst.values()) < 2e-4
    theirs = hf.convert(stored["gradient"], config, "ctc")
    assert max(hf_reference.compare_gradients(theirs, gradients).values()) < 1e-3


def test_pretraining_matches_transformers():
    stored, config = expected("pretraining")
    model = hf.read(GOLDEN / "wav2vec2_pretraining")
    ours, gradients, _ = hf_reference.our_pretraining(
        model, config, stored["batch"], Draws(**stored["draws"])
    )
    for name, value in stored["value"].items():
        assert ours[name] == pytest.approx(float(value), rel=1e-4), name
    theirs = hf.convert(stored["gradient"], config, "pretraining")
    assert max(hf_reference.compare_gradients(theirs, gradients).values()) < 1e-3


@live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["tiny", "tiny-layer-norm", "tiny-conformer", "tiny-conformer-rotary"]
)
def test_transformers_live(name, tmp_path):
    outputs, gradients = hf_reference.check(name, 8_000, tmp_path / "ctc")
    assert outputs.pop("loss") < 1e-4
    assert max(outputs.values()) < 2e-4
    assert max(gradients.values()) < 1e-3
    values, gradients = hf_reference.check_pretraining(name, 8_000, tmp_path / "pretraining")
    assert values.pop("variance", 0.0) < 1e-2
    assert max(values.values()) < 1e-4
    assert max(gradients.values()) < 1e-3


@live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_transformers_loads_what_we_write(kind, head, tmp_path):
    model = random_model(head, kind)
    hf.write(model, tmp_path / "ours")
    name = architecture(head, model.config.model.name)
    constructor = getattr(hf_reference.transformers, name)
    loaded, info = constructor.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.save_pretrained(tmp_path / "theirs")
    back = hf.read(tmp_path / "theirs")
    assert_trees_equal(back.params, model.params)
    assert_trees_equal(back.state, model.state)
    if head == "ctc":
        processor = hf_reference.transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "ours")
        assert processor.tokenizer.decode([3, 3, 0, 1, 2], group_tokens=True) == "b a"
        assert processor.tokenizer("a b").input_ids == [2, 1, 3]
        assert len(processor.tokenizer) == 4  # no token that the model never says
        assert processor.feature_extractor.sampling_rate == 8_000
        processor.save_pretrained(tmp_path / "theirs")
        again = hf.read(tmp_path / "theirs")
        assert again.parts == model.parts
        assert_trees_equal(again.params, model.params)


@live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("delimiter", ["|", " "])
def test_a_tokenizer_of_the_guides_survives(delimiter, tmp_path):
    """Saved by the installed transformers, through ours, and opened by it again."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ids = {c: i for i, c in enumerate([delimiter, *"abcdefghi", "[UNK]", "[PAD]"])}
    theirs.mkdir()
    (theirs / "vocab.json").write_text(json.dumps(ids))
    tokenizer = hf_reference.transformers.Wav2Vec2CTCTokenizer(
        theirs / "vocab.json",
        unk_token="[UNK]",
        pad_token="[PAD]",
        word_delimiter_token=delimiter,
    )
    extractor = hf_reference.transformers.Wav2Vec2FeatureExtractor(
        do_normalize=False, sampling_rate=8_000
    )
    hf_reference.make("tiny", "ctc", pad_token_id=11).save_pretrained(theirs)
    hf_reference.transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(theirs)
    model = hf.read(theirs)
    assert model.config.data.sample_rate == 8_000
    assert model.config.features.normalize == "none"
    known = tokenizer("bad cab").input_ids
    shifted = [i + 1 for i in known]  # the blank, their last id, is our first
    assert model.parts["labels"].tokenizer.encode("bad cab") == shifted
    bundles.save(model, ours)
    hf.write(bundles.open(ours), tmp_path / "back")
    again = hf_reference.transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "back")
    assert again.tokenizer("bad cab").input_ids == known
    assert again.tokenizer("z").input_ids == [ids["[UNK]"]]
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert again.tokenizer.decode([1, 1, 11, 1, 0, 2]) == "aa b"
    assert again.feature_extractor.to_dict() == extractor.to_dict()
    loaded = hf_reference.transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "back")
    assert loaded.config.pad_token_id == 11
    assert_trees_equal(hf.read(tmp_path / "back").params, model.params)


# ---- Round trips -------------------------------------------------------------------------------


def random_model(head, kind="wav2vec2"):
    """A bundle with random parameters and an alphabet of ' ', 'a', 'b'."""
    small = {
        "width": 8, "num_layers": 2, "heads": 2, "feed_forward": 12,
        "conv_channels": (4,) * 6 + (6,), "conv_kernels": (10, 3, 3, 3, 3, 2, 2),
    }  # fmt: skip
    settings = {**small, "conv_strides": (5, 2, 2, 2, 2, 2, 2), "conv_norm": "layer"}
    settings |= {"conv_bias": True, **KINDS[kind], "scan": False}
    rng = np.random.default_rng(0)
    encoder = models.make_encoder(**settings)
    shapes = jax.eval_shape(
        lambda: encoder.init(
            jax.random.key(0), np.zeros((1, 800), np.float32), np.array([800], np.int32), True
        )
    )
    random = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    params = {"encoder": random.pop("params")}
    state = {collection: {"encoder": tree} for collection, tree in random.items()}
    dense = lambda a, b: {"kernel": rng.random((a, b), np.float32), "bias": np.ones(b, np.float32)}
    parts = {"audio": Audio(sample_rate=8_000)}
    if head == "ctc":
        params["head"] = dense(8, 4)
        parts["labels"] = Transcript(tokenizer=text.CharacterTokenizer(" ab", "lower"))
    elif head == "classification":
        params |= {"projector": dense(8, 5), "classifier": dense(5, 3)}
        parts["target"] = Category(classes=("yes", "no", "maybe"), name="target", tag="label")
    elif head == "pretraining":
        codebook = rng.random((2, 5, 3), np.float32)
        params["quantizer"] = {"codebook": codebook, "project": dense(6, 10)}
        params |= {"project_hidden": dense(8, 7), "project_target": dense(6, 7)}
        parts["audio"] = Crop(sample_rate=8_000, longest=20.0)
    config = default()
    config.data.sample_rate = 8_000
    with config.unlocked():
        config.model = models.settings(variant="large", **settings)
        config.task = {"name": TASKS[head]}
    return Bundle(config=config, parts=parts, params=params, state=state)


TASKS = {
    "none": "encoder",
    "ctc": "recognize",
    "pretraining": "contrastive",
    "classification": "classify",
}


def assert_bundles_equal(ours, theirs):
    assert_trees_equal(ours.params, theirs.params)
    assert_trees_equal(ours.state, theirs.state)
    assert ours.parts == theirs.parts
    for section in ("model", "data", "features"):
        assert ours.config[section].to_json() == theirs.config[section].to_json()
    assert ours.config.task.name == theirs.config.task.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_round_trip_is_bit_equal(kind, head, tmp_path):
    model = random_model(head, kind)
    model.config.features.normalize = "none" if head == "ctc" else "utterance"
    hf.write(model, tmp_path / "theirs")
    back = hf.read(tmp_path / "theirs")
    assert_bundles_equal(back, model)
    bundles.save(back, tmp_path / "ours")
    again = bundles.open(tmp_path / "ours")
    parts = model.parts if TASKS[head] in tasks.TASKS else {}  # no such task yet: nor its parts
    assert_bundles_equal(again, dataclasses.replace(model, parts=parts))
    hf.write(again, tmp_path / "again")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_scanned_layers_are_exported_one_by_one(tmp_path):
    model = random_model("ctc", "conformer")
    with model.config.unlocked():
        model.config.model.scan = True
    stack = lambda tree: {**tree, "encoder": models.stack_layers(tree["encoder"])}
    state = {name: stack(tree) for name, tree in model.state.items()}
    hf.write(Bundle(model.config, model.parts, stack(model.params), state), tmp_path / "theirs")
    back = hf.read(tmp_path / "theirs")
    assert_trees_equal(back.params, model.params)
    assert_trees_equal(back.state, model.state)


def test_weight_norm_names_of_either_age_and_both_formats(folder):
    old = hf.read(folder)
    found = tensors.read_tensors(folder)
    new = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): np.ascontiguousarray(value)
        for name, value in found.items()
    }
    assert new.keys() != found.keys()
    safetensors.numpy.save_file(new, folder / "model.safetensors")
    assert_trees_equal(hf.read(folder).params, old.params)


def test_half_precision_is_widened(folder):
    weights = tensors.read_tensors(folder)
    exact = hf.read(folder).params["head"]["kernel"]
    half = {name: value.astype(np.float16) for name, value in weights.items()}
    safetensors.numpy.save_file(half, folder / "model.safetensors")
    found = hf.read(folder).params["head"]["kernel"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=1e-3)


def test_the_blank_becomes_id_0(folder, tmp_path):
    edit(folder, pad_token_id=3)
    plain = hf.read(GOLDEN / "wav2vec2_base")
    model = hf.read(folder)
    order = [3, 0, 1, 2, *range(4, 12)]
    assert model.parts["labels"].tokenizer.encode("bad") == [6, 5, 8]
    np.testing.assert_array_equal(
        model.params["head"]["kernel"], plain.params["head"]["kernel"][:, order]
    )
    # And where it was, for them.
    hf.write(model, tmp_path / "theirs")
    for name, key in (("config.json", "pad_token_id"), ("vocab.json", "<unk>")):
        assert json.loads((tmp_path / "theirs" / name).read_text())[key] == 3
    head = safetensors.numpy.load_file(tmp_path / "theirs" / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head, plain.params["head"]["kernel"].T)


def test_the_tokenizer_has_the_ids_of_the_vocabulary(folder):
    tokenizer = hf.read(folder).parts["labels"].tokenizer
    ids = json.loads((folder / "vocab.json").read_text())
    assert tokenizer.vocabulary_size == len(ids)
    assert tokenizer.encode("bad cafe") == [ids[c] for c in "BAD|CAFE"]


def test_a_folder_of_theirs_transcribes(folder):
    """What a loaded folder hears is what the task of its bundle predicts."""
    model = speech_jax.load(folder)
    speech = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    heard = model.transcribe(speech)
    assert heard.seconds == 1.0
    opened = hf.read(folder)
    batch = {"audio": np.round(speech * 32_768).astype(np.int16)[None]}
    batch["audio_length"] = np.array([16_000], np.int32)
    task = opened.task()
    labels = jax.jit(task.predict)(opened.params, opened.state, batch)
    row = {name: np.asarray(rows)[0] for name, rows in labels.items()}
    assert heard.text == opened.parts["labels"].read(row)
    assert heard.text


def test_layers_stack_and_unstack():
    params = hf.read(GOLDEN / "wav2vec2_large").params["encoder"]
    stacked = models.stack_layers(params)
    assert stacked["layers"]["attention"]["qkv"]["kernel"].shape[0] == 2
    assert_trees_equal(models.unstack_layers(stacked), params)
    assert_trees_equal(models.unstack_layers(params), params)


def test_command_line(folder, tmp_path, capsys):
    assert hf.main(["import", str(folder), str(tmp_path / "ours")]) == 0
    assert "Wav2Vec2ForCTC" in capsys.readouterr().out
    assert hf.main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    assert_trees_equal(hf.read(tmp_path / "theirs").params, hf.read(folder).params)
    assert hf.main(["import", str(folder), str(tmp_path / "ours")]) == 1
    assert "not empty" in capsys.readouterr().err


# ---- Model folders from before there were bundles ----------------------------------------------


@pytest.fixture
def before(folder, tmp_path):
    """model.json and params.safetensors as they were; the blank of theirs is 3, of ours 0."""
    edit(folder, pad_token_id=3)
    model, path = hf.read(folder), tmp_path / "before"
    path.mkdir()
    flat = flax.traverse_util.flatten_dict(model.params, sep="/")
    safetensors.numpy.save_file(flat, path / "params.safetensors")
    keys = "name num_layers heads feed_forward conv_channels conv_kernels conv_strides conv_norm "
    keys += "conv_bias pre_norm position_kernel position_groups"
    ids = json.loads((folder / "vocab.json").read_text())
    described = {
        "encoder": {key: model.config.model[key] for key in keys.split()} | {"features": 16},
        "head": "ctc",
        "normalize": "none",
        "vocabulary": sorted(ids, key=lambda symbol: (ids[symbol] != 3, ids[symbol])),
        "labels": None,
        "source": json.loads((folder / "config.json").read_text()),
    }
    (path / "model.json").write_text(json.dumps(described))
    return path


def test_a_model_folder_from_before_opens(before, folder, tmp_path):
    model, theirs = hf.read_model_folder(before), hf.read(folder)
    assert_trees_equal(model.params, theirs.params)
    assert model.parts == theirs.parts
    assert model.config.model == theirs.config.model
    assert model.config.features.normalize == "none"
    hf.write(model, tmp_path / "back")
    for name, key in (("config.json", "pad_token_id"), ("vocab.json", "<unk>")):
        assert json.loads((tmp_path / "back" / name).read_text())[key] == 3


def test_a_damaged_model_folder_is_refused(before):
    path = before / "model.json"
    described = json.loads(path.read_text())
    odd = [None, True, 0, -1, "x", [], {}, ["a"], {"name": "wav2vec2"}, {"name": []}]
    changed = [described | {key: value} for key in described for value in odd]
    encoder = described["encoder"]
    for key in encoder:
        changed += [described | {"encoder": encoder | {key: value}} for value in (None, [1], "x")]
    changed.append({key: value for key, value in described.items() if key != "head"})
    read = 0
    for content in changed:
        path.write_text(json.dumps(content))
        why = str(before)
        try:
            hf.read_model_folder(before)
            read += 1
        except hf.ModelFolderError as error:
            why = str(error)
        assert str(before) in why
    assert 0 < read < 30  # a label of a CTC model does not matter, nor that there is no source
    path.unlink()
    with pytest.raises(hf.ModelFolderError, match=r"model\.json is missing"):
        hf.read_model_folder(before)


# ---- Bad input ---------------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no weights": (lambda f: (f / "pytorch_model.bin").unlink(), "neither model.safetensors"),
    "another model": (lambda f: edit(f, model_type="hubert"), "model_type='hubert'"),
    "another head": (
        lambda f: edit(f, architectures=["Wav2Vec2ForXVector"]),
        "architecture 'Wav2Vec2ForXVector'",
    ),
    "adapter": (lambda f: edit(f, add_adapter=True), "add_adapter=True"),
    "activation": (lambda f: edit(f, hidden_act="relu"), "hidden_act='relu'"),
    "wider": (lambda f: edit(f, intermediate_size=25), r"intermediate_dense.weight' has the shape"),
    "deeper": (lambda f: edit(f, num_hidden_layers=3), r"layers.2\.\S+ is missing"),
    "shallower": (lambda f: edit(f, num_hidden_layers=1), r"layers.1\.\S+ .* has no place"),
    "no such heads": (lambda f: edit(f, num_attention_heads=3), "num_attention_heads=3 does not"),
    "vocabulary": (lambda f: edit(f, pad_token_id=99), "pad_token_id=99"),
    "cut short": (
        lambda f: (f / "pytorch_model.bin").write_bytes(
            (f / "pytorch_model.bin").read_bytes()[:5000]
        ),
        "cut short",
    ),
    "broken safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40),
        "model.safetensors cannot be read",
    ),
}


BROKEN_CONFORMER = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "activation by default": ({"hidden_act": None}, "hidden_act='gelu'"),
    "no position": ({"position_embeddings_type": None}, "position_embeddings_type=None"),
    "rotary base": ({"rotary_embedding_base": 500}, "rotary_embedding_base=500"),
    "adapter": ({"add_adapter": True}, "add_adapter=True"),
    "another head": (
        {"architectures": ["Wav2Vec2ConformerForXVector"]},
        "only Wav2Vec2ConformerModel, Wav2Vec2ConformerForCTC, ",
    ),
    "Transformer's head": ({"architectures": ["Wav2Vec2ForCTC"]}, "'Wav2Vec2ForCTC' is not"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size is missing"),
    "kernel": ({"conv_depthwise_kernel_size": 7}, "depthwise_conv.weight' has the shape"),
    "rotary": (
        {"position_embeddings_type": "rotary"},
        r"linear_pos.weight' \(of \d+ such\) has no place in a Wav2Vec2ConformerForCTC",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFORMER)
def test_a_conformer_that_cannot_be_read_is_named(case, tmp_path):
    shutil.copytree(GOLDEN / "wav2vec2_conformer", tmp_path / "model")
    changes, message = BROKEN_CONFORMER[case]
    edit(tmp_path / "model", **changes)
    if case == "activation by default":
        path = tmp_path / "model" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_act"}))
    with pytest.raises(hf.ModelFolderError, match=message):
        hf.read(tmp_path / "model")


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named(case, folder, tmp_path, capsys):
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(hf.ModelFolderError, match=message):
        hf.read(folder)
    before = sorted(tmp_path.iterdir())
    assert hf.main(["import", str(folder), str(tmp_path / "ours")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_left_of_a_failed_export(tmp_path):
    model = random_model("ctc")
    del model.params["encoder"]["norm"]
    with pytest.raises(hf.ModelFolderError, match="lacks the parameter 'encoder/norm/"):
        hf.write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
