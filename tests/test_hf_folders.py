"""Folders as the hub has them: each is read right and written back, or refused in one sentence."""

import json
import pathlib
import shutil
import struct
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from speech_jax.bundle import huggingface as hf
from speech_jax.bundle import tensors
from speech_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "data"
WEIGHTS = "model.safetensors"
POSITION = "wav2vec2.encoder.pos_conv_embed.conv"
EXTRACTOR = {
    "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
    "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False,
    "sampling_rate": 16_000,
}  # fmt: skip
GUIDE = [*"abcdefghi|", "[UNK]", "[PAD]"]
GUIDE_TOKENS = {"unk_token": "[UNK]", "pad_token": "[PAD]", "word_delimiter_token": "|"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> pathlib.Path:
    """A CTC folder as transformers 4 writes it."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(GOLDEN / "wav2vec2_base", folder)
    found = {name: np.array(value) for name, value in tensors.read_tensors(folder).items()}
    (folder / "pytorch_model.bin").unlink()
    (folder / "expected.npz").unlink()
    safetensors.numpy.save_file(found, folder / WEIGHTS)
    dump(folder, "preprocessor_config.json", EXTRACTOR)
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> pathlib.Path:
    return shutil.copytree(plain, tmp_path / "model")


def dump(folder, name, content):
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def load(folder, name):
    return json.loads((folder / name).read_text("utf-8-sig"))


def edit(name="config.json", **changes):
    def apply(folder):
        old = load(folder, name) if (folder / name).exists() else {}
        dump(folder, name, old | changes)

    return apply


def put(name, content):
    return lambda folder: dump(folder, name, content)


def put_text(name, content):
    return lambda folder: (folder / name).write_text(content, "utf-8")


def change(function):
    """Changes the tensors: `function` gets a dict of them and may return another."""

    def apply(folder):
        found = safetensors.numpy.load_file(folder / WEIGHTS)
        found = function(found) or found
        found = {name: np.ascontiguousarray(value) for name, value in found.items()}
        safetensors.numpy.save_file(found, folder / WEIGHTS)

    return apply


def rename(old, new):
    return change(lambda t: {name.replace(old, new): value for name, value in t.items()})


def cast(dtype):
    return change(lambda t: {name: value.astype(dtype) for name, value in t.items()})


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


def vocabulary(symbols, blank=0, **tokens):
    ids = {symbol: index for index, symbol in enumerate(symbols) if symbol is not None}
    steps = [put("vocab.json", ids), edit(pad_token_id=blank)]
    return both(*steps, *([put("tokenizer_config.json", tokens)] if tokens else []))


def shard(folder):
    found = safetensors.numpy.load_file(folder / WEIGHTS)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(found)}
    for part in set(where.values()):
        of_part = {name: value for name, value in found.items() if where[name] == part}
        safetensors.numpy.save_file(of_part, folder / part)
    dump(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    (folder / WEIGHTS).unlink()


def fuse(found):
    magnitude, direction = found.pop(f"{POSITION}.weight_g"), found.pop(f"{POSITION}.weight_v")
    norm = np.sqrt(np.square(direction).sum((0, 1), keepdims=True))
    found[f"{POSITION}.weight"] = magnitude * direction / norm


def processor_of_5(**changes):
    def apply(folder):
        (folder / "preprocessor_config.json").unlink()
        inner = {"feature_extractor": EXTRACTOR | changes, "processor_class": "Wav2Vec2Processor"}
        dump(folder, "processor_config.json", inner)

    return apply


def added_tokens_of_5(folder):
    decoder = {
        str(i): {"content": s, "special": False} for s, i in load(folder, "vocab.json").items()
    }
    decoder |= {"12": {"content": "<x>", "special": True}}
    edit("tokenizer_config.json", added_tokens_decoder=decoder)(folder)


# ---- Read, and written back --------------------------------------------------------------------

# name: (what is done to the plain folder, a text and its ids or None)
PLAIN_IDS = {"bad cafe": [6, 5, 8, 4, 7, 5, 10, 9]}
GUIDE_IDS = {"bad Cab": [2, 1, 4, 10, 3, 1, 2]}
GOOD = {
    "as it is": (lambda folder: None, PLAIN_IDS),
    "weight norm of torch 2.1": (
        both(
            rename("weight_g", "parametrizations.weight.original0"),
            rename("weight_v", "parametrizations.weight.original1"),
        ),
        PLAIN_IDS,
    ),
    "mask embedding's old name": (rename("masked_spec_embed", "mask_time_emb_vector"), PLAIN_IDS),
    "no mask embedding": (change(lambda t: {n: v for n, v in t.items() if "masked" not in n}), {}),
    "without weight norm": (change(fuse), PLAIN_IDS),
    "half": (cast(np.float16), PLAIN_IDS),
    "bfloat16": (cast(ml_dtypes.bfloat16), PLAIN_IDS),
    "double": (cast(np.float64), PLAIN_IDS),
    "half by its config": (both(cast(np.float16), edit(torch_dtype="float16")), PLAIN_IDS),
    "sharded": (shard, PLAIN_IDS),
    "batches are counted": (change(lambda t: t | {"x.num_batches_tracked": np.array(3)}), {}),
    "no architecture": (edit(architectures=None), PLAIN_IDS),
    "architectures are none": (edit(architectures=[]), PLAIN_IDS),
    "few keys": (
        lambda f: dump(f, "config.json", {k: v for k, v in load(f, "config.json").items() if
            k not in ("layer_norm_eps", "conv_stride", "feat_extract_norm", "pad_token_id")}),
        PLAIN_IDS,
    ),
    "unknown keys": (edit(**{"a.b": {"c": [1, None, {"d": 1e300}]}, "max": 10**29}), PLAIN_IDS),
    "a byte order mark": (
        lambda f: put_text("config.json", "\ufeff" + (f / "config.json").read_text())(f),
        PLAIN_IDS,
    ),
    "no extractor": (lambda f: (f / "preprocessor_config.json").unlink(), PLAIN_IDS),
    "an extractor of little": (put("preprocessor_config.json", {"do_normalize": True}), {}),
    "processor of transformers 5": (processor_of_5(), PLAIN_IDS),
    "processor beside extractor": (
        put("processor_config.json", {"processor_class": "Wav2Vec2Processor"}),
        PLAIN_IDS,
    ),
    "with a language model": (
        edit("preprocessor_config.json", processor_class="Wav2Vec2ProcessorWithLM"),
        PLAIN_IDS,
    ),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), None),
    "the guides": (vocabulary(GUIDE, 11, **GUIDE_TOKENS), GUIDE_IDS),
    "the guides, without a config": (vocabulary(GUIDE, 11), GUIDE_IDS),
    "the guides, with case": (
        both(vocabulary(GUIDE, 11, do_lower_case=True, **GUIDE_TOKENS)),
        GUIDE_IDS,
    ),
    "delimiter is a space": (
        vocabulary([" " if s == "|" else s for s in GUIDE], 11, word_delimiter_token=" "),
        GUIDE_IDS,
    ),
    "no delimiter": (
        vocabulary([" " if s == "|" else s for s in GUIDE], 11, word_delimiter_token=None),
        GUIDE_IDS,
    ),
    "no delimiter, and ids without a symbol": (
        vocabulary([*"abcdefghi ", None, "[PAD]"], 11, word_delimiter_token=None),
        GUIDE_IDS,
    ),
    "a delimiter in brackets": (
        vocabulary([*"abcdefghi", "[SPACE]", "[UNK]", "[PAD]"], 11,
            word_delimiter_token="[SPACE]"),
        GUIDE_IDS,
    ),
    "an empty symbol": (vocabulary([*"abcdefghi|", "", "[PAD]"], 11), None),
    "a space and a delimiter": (
        vocabulary([*"abcdefgh |", "[UNK]", "[PAD]"], 11, **GUIDE_TOKENS),
        GUIDE_IDS,
    ),
    "tokens with properties": (
        vocabulary(GUIDE, 11, pad_token={"content": "[PAD]", "lstrip": False}, unk_token="[UNK]"),
        GUIDE_IDS,
    ),
    "special tokens in their map": (
        both(vocabulary(GUIDE, 11), put("special_tokens_map.json", {"pad_token": "[PAD]"})),
        GUIDE_IDS,
    ),
    "added tokens beyond the head": (put("added_tokens.json", {"<x>": 12, "<y>": 13}), PLAIN_IDS),
    "added tokens within the head": (
        both(vocabulary([*GUIDE[:10], None, None], 11), put("added_tokens.json", {
            "[UNK]": 10, "[PAD]": 11})),
        GUIDE_IDS,
    ),
    "added tokens of transformers 5": (
        both(vocabulary(GUIDE, 11, **GUIDE_TOKENS), added_tokens_of_5),
        GUIDE_IDS,
    ),
    "ids without a symbol": (vocabulary([*"abcdefghi|", None, "[PAD]"], 11), GUIDE_IDS),
    "another script": (vocabulary([*"абвгґдежз|", "[UNK]", "[PAD]"], 11), {"Баґ": [2, 1, 5]}),
    "no case": (vocabulary([*"あいうえおかきくけ|", "[UNK]", "[PAD]"], 11), {"あけ": [1, 9]}),
    "both cases": (vocabulary([*"abcdABCDe|", "[UNK]", "[PAD]"], 11), {"aB": [1, 6]}),
    "a private character": (
        vocabulary([*"abcdefgh\ue009|", "[UNK]", "[PAD]"], 11),
        {"b\ue009": [2, 9]},
    ),
    "symbols of two letters": (vocabulary([*"abcdefgh|", "ch", "[UNK]", "[PAD]"], 11), None),
    "a tokenizer of phonemes": (
        vocabulary(GUIDE, 11, tokenizer_class="Wav2Vec2PhonemeCTCTokenizer"),
        None,
    ),
}  # fmt: skip
LOSSLESS = {"half", "bfloat16", "half by its config", "without weight norm", "no mask embedding"}


@pytest.mark.parametrize("case", GOOD)
def test_is_read_and_written_back(case, plain, folder, tmp_path):
    apply, texts = GOOD[case]
    apply(folder)
    model = hf.read(folder)
    tokenizer = model.parts["labels"].tokenizer if "labels" in model.parts else None
    assert (tokenizer is None) == (texts is None)
    for text, ids in (texts or {}).items():
        blank = load(folder, "config.json").get("pad_token_id", 0)
        assert tokenizer.encode(text) == ids, (text, blank)
        assert tokenizer.decode(ids).lower() == text.lower() or case == "both cases"
    if case not in LOSSLESS and load(folder, "config.json").get("pad_token_id", 0) == 0:
        jax.tree.map(np.testing.assert_array_equal, model.params, hf.read(plain).params)
    hf.write(model, tmp_path / "back")
    again = hf.read(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.parts == model.parts
    came = {path.name: load(folder, path.name) for path in folder.glob("*.json")}
    came.pop("model.safetensors.index.json", None)
    for name, content in came.items():
        back = load(tmp_path / "back", name)
        moved = {"torch_dtype", "processor_class"} | (
            {"architectures"} if name[0] == "c" else set()
        )
        kept = {key: value for key, value in content.items() if key not in moved}
        assert {key: back[key] for key in kept} == kept, name
        assert "WithLM" not in str(back)
    assert back_dtype(tmp_path / "back") in (None, "float32")


def back_dtype(folder):
    return load(folder, "config.json").get("torch_dtype")


@pytest.mark.parametrize("version", [4, 5])
def test_the_extractor_is_heeded_and_kept(version, folder, tmp_path):
    changes = {"do_normalize": False, "sampling_rate": 8_000}
    if version == 4:
        edit("preprocessor_config.json", **changes)(folder)
    else:
        processor_of_5(**changes)(folder)
    model = hf.read(folder)
    assert model.config.features.normalize == "none"
    assert model.config.data.sample_rate == 8_000
    hf.write(model, tmp_path / "back")
    name = "preprocessor_config.json" if version == 4 else "processor_config.json"
    assert load(tmp_path / "back", name) == load(folder, name)
    assert (tmp_path / "back" / "preprocessor_config.json").exists() == (version == 4)


def test_a_new_vocabulary_replaces_the_one_that_came(folder, tmp_path):
    """As of a run that went on with another alphabet: no file says what is no longer so."""
    from speech_jax.bundle.format import Bundle
    from speech_jax.data import text
    from speech_jax.data.parts.transcript import Transcript

    edit("tokenizer_config.json", **GUIDE_TOKENS)(folder)
    both(vocabulary(GUIDE, 11, **GUIDE_TOKENS))(folder)
    model = hf.read(folder)
    labels = Transcript(tokenizer=text.CharacterTokenizer("xyz |uvwst,", "lower"))
    hf.write(Bundle(model.config, {"labels": labels}, model.params, model.state), tmp_path / "new")
    assert load(tmp_path / "new", "config.json")["pad_token_id"] == 0
    assert load(tmp_path / "new", "vocab.json")["<pad>"] == 0
    again = hf.read(tmp_path / "new")
    assert again.parts["labels"].tokenizer.encode("xyz |") == [1, 2, 3, 4, 5]
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


# ---- Refused -----------------------------------------------------------------------------------

DEEP = "[" * 100_000
HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
# name: (what is done to the plain folder, what the sentence says)
BAD = {
    "config is a list": (put("config.json", [1]), "config.json"),
    "config is deep": (put_text("config.json", DEEP), "config.json"),
    "a key is deep": (put_text("config.json", '{"a": ' + "[" * 400 + "]" * 400 + "}"), "nested"),
    "an integer of 5,000 digits": (put_text("config.json", '{"a": 1%s}' % ("0" * 5_000)), "config"),
    "half a character": (put_text("config.json", r'{"a": "\ud800"}'), "half of a character"),
    "config is no UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json",
    ),
    "layers without end": (edit(num_hidden_layers=10**6), "num_hidden_layers=1000000"),
    "a thousand layers": (edit(num_hidden_layers=1_000), r"layers\.2\.\S+ is missing"),
    "convolutions without end": (edit(conv_dim=[8] * 10**5), "conv_dim"),
    "convolutions of three lengths": (edit(conv_stride=[2] * 6), "differ in length"),
    "convolutions that see hours": (edit(conv_stride=[900] * 7), "samples"),
    "width of 1e999": (put_text("config.json", '{"hidden_size": 1e999}'), "hidden_size=inf"),
    "width of true": (edit(hidden_size=True), "hidden_size=True"),
    "a stride of 0": (edit(conv_stride=[0] * 7), "conv_stride"),
    "heads of 0": (edit(num_attention_heads=0), "num_attention_heads=0"),
    "odd groups": (edit(num_conv_pos_embedding_groups=3), "does not divide hidden_size=16"),
    "a vast width": (edit(hidden_size=65_536, intermediate_size=1 << 20), "has the shape"),
    "a vast head": (edit(vocab_size=65_536), "has the shape"),
    "vocab_size is text": (edit(vocab_size="12"), "vocab_size='12'"),
    "no blank": (edit(pad_token_id=None), "pad_token_id=None"),
    "a negative blank": (edit(pad_token_id=-1), "pad_token_id=-1"),
    "adapters of MMS": (edit(adapter_attn_dim=16), "adapter_attn_dim=16"),
    "an adapter": (edit(add_adapter=True), "add_adapter=True"),
    "quantized": (edit(quantization_config={"bits": 4}), "quantization_config"),
    "another epsilon": (edit(layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
    "extractor of mels": (edit("preprocessor_config.json", feature_size=80), "feature_size=80"),
    "a rate of 1 Hz": (edit("preprocessor_config.json", sampling_rate=1), "sampling_rate=1"),
    "a rate of null": (edit("preprocessor_config.json", sampling_rate=None), "sampling_rate=None"),
    "do_normalize is text": (edit("preprocessor_config.json", do_normalize="no"), "do_normalize"),
    "processor is a list": (put("processor_config.json", []), "processor_config.json"),
    "extractor inside is a list": (
        put("processor_config.json", {"feature_extractor": [1]}),
        "feature_extractor",
    ),
    "a rate of text inside": (processor_of_5(sampling_rate="8k"), "processor_config.json.*'8k'"),
    "vocabulary by language": (put("vocab.json", {"eng": {"a": 1}}), "vocab.json: 'eng' has"),
    "vocabulary of fractions": (put("vocab.json", {"a": 1.5}), "the id 1.5"),
    "vocabulary of negatives": (put("vocab.json", {"a": -1}), "the id -1"),
    "vocabulary beyond the head": (vocabulary([*GUIDE, "z"], 11), "'z' has the id 12"),
    "an id of two symbols": (put("vocab.json", {"<pad>": 0, "a": 1, "b": 1}), "id 1 is both"),
    "a symbol of two ids": (put("added_tokens.json", {"A": 1}), "id 1 is both"),
    "a symbol again": (
        both(put("vocab.json", {"<pad>": 0, "a": 1}), put("added_tokens.json", {"a": 2})),
        "'a' under two ids",
    ),
    "added tokens are odd": (
        put("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        "added_tokens_decoder",
    ),
    "the blank is another": (vocabulary(GUIDE, 10, **GUIDE_TOKENS), "pad_token_id, the CTC blank"),
    "a token is a number": (put("tokenizer_config.json", {"pad_token": 3}), "pad_token=3"),
    "a target language": (put("tokenizer_config.json", {"target_lang": "fra"}), "target_lang"),
    "integers": (cast(np.int32), "of type I32"),
    "an odd buffer": (change(lambda t: t | {"x.position_ids": np.arange(4)}), "position_ids"),
    "not a number": (change(lambda t: t | {"lm_head.bias": np.full(12, np.nan, "f")}), "holds NaN"),
    "beyond float32": (change(lambda t: t | {"lm_head.bias": np.full(12, 1e300)}), "lm_head.bias"),
    "one more tensor": (change(lambda t: t | {"adapter.weight": np.ones(4, "f")}), "has no place"),
    "no head": (change(lambda t: [t.pop("lm_head.bias")] and t), "lm_head.bias' is missing"),
    "two names of one": (
        change(lambda t: t | {"wav2vec2.mask_time_emb_vector": t["wav2vec2.masked_spec_embed"]}),
        "under two names",
    ),
    "weights are cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]),
        "cannot be read",
    ),
    "weights claim a terabyte": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", len(HEADER)) + HEADER + bytes(4)),
        "cannot be read",
    ),
    "weights are a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "cannot be read",
    ),
    "a shard is missing": (
        both(shard, lambda f: (f / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors is missing",
    ),
    "a shard is elsewhere": (
        both(shard, put("model.safetensors.index.json", {"weight_map": {"a": "../a"}})),
        "not a file of its folder",
    ),
    "a shard of zero bytes": (
        both(shard, put("model.safetensors.index.json", {"weight_map": {"a": "\0"}})),
        "not a file of its folder",
    ),
    "a map of nothing": (
        both(shard, put("model.safetensors.index.json", {"weight_map": {}})),
        "names no files",
    ),
    "a map of null": (
        both(shard, put("model.safetensors.index.json", {"weight_map": None})),
        "weight_map=None",
    ),
    "one tensor in two shards": (
        both(
            shard,
            lambda f: shutil.copy(
                f / "model-00001-of-00002.safetensors", f / "model-00002-of-00002.safetensors"
            ),
        ),
        "in two of its files",
    ),
}


def attempt(read, folder):
    """The model, or None where it is refused in one sentence; no other error is caught."""
    try:
        return read(folder)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


def refused(folder, message=""):
    with pytest.raises(UserError, match=message) as caught:
        hf.read(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_is_refused_in_one_sentence(case, folder):
    apply, message = BAD[case]
    apply(folder)
    tracemalloc.start()
    try:
        refused(folder, message)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(8))
def test_values_of_any_shape_are_right_or_refused(seed, folder, tmp_path):
    """Every key of every file by turns gets a value of another type, length or size."""
    rng = np.random.default_rng(seed)
    vocabulary(GUIDE, 11, **GUIDE_TOKENS)(folder)
    put("added_tokens.json", {"<x>": 12})(folder)
    put("special_tokens_map.json", {"pad_token": "[PAD]"})(folder)
    odd = [None, True, 0, -1, 3, 10**30, 1.5, float("nan"), "", "x", [], [[]], {}, {"a": [None]}]
    keys = [(p.name, key) for p in sorted(folder.glob("*.json")) for key in load(folder, p.name)]
    outcomes = set()
    for index in rng.permutation(len(keys))[:25]:
        name, key = keys[index]
        before = (folder / name).read_text("utf-8")
        edit(name, **{key: odd[rng.integers(len(odd))]})(folder)
        model = attempt(hf.read, folder)
        outcomes.add(model is None)
        if model is not None:
            hf.write(model, tmp_path / f"{index}")
        (folder / name).write_text(before, "utf-8")
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_are_right_or_refused(seed, folder):
    rng = np.random.default_rng(seed)
    if seed % 2:
        (folder / WEIGHTS).unlink()
        shutil.copy(GOLDEN / "wav2vec2_base" / "pytorch_model.bin", folder)
    paths = sorted(folder.iterdir())
    for _ in range(15):
        path = paths[rng.integers(len(paths))]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for position in rng.integers(min(len(whole), 3_000), size=rng.integers(1, 4)):
            damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged[: rng.integers(len(whole))] if rng.random() < 0.3 else damaged)
        attempt(hf.read, folder)
        path.write_bytes(whole)
