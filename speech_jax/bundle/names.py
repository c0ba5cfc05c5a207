"""What a model's tensors are called, and how they lie, in Hugging Face's wav2vec2 and in ours.

Names of ours are paths in the tree of parameters, with model state under "state"; names of theirs
are those of a state dict. `encoder` is a name of models.ENCODERS, `head` one of HEADS.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Settings = Mapping[str, Any]  # of an encoder

# What settings were called in model folders from before there were bundles.
BEFORE = {"width": "features"}

# The transformers class of each head, where the layers are Transformer's.
HEADS = {
    "none": "Wav2Vec2Model",
    "ctc": "Wav2Vec2ForCTC",
    "pretraining": "Wav2Vec2ForPreTraining",
    "classification": "Wav2Vec2ForSequenceClassification",
}

# Their position_embeddings_type, and the `attention` of our wav2vec2_conformer that it is.
ATTENTION = {"relative": "relative", "rotary": "rotary_input"}


def architecture(head: str, encoder: str) -> str:
    """The transformers class of a model."""
    conformer = encoder == "wav2vec2_conformer"
    return HEADS[head].replace("Wav2Vec2", "Wav2Vec2Conformer") if conformer else HEADS[head]


def prefix(head: str, encoder: str) -> str:
    """What the names of the encoder's tensors begin with in a model of theirs."""
    return "" if head == "none" else f"{encoder}."


# Names that a tensor has in some folders and not in others, and the one that is used here.
_ALIASES = {
    "parametrizations.weight.original0": "weight_g",  # since torch 2.1
    "parametrizations.weight.original1": "weight_v",
    "mask_time_emb_vector": "masked_spec_embed",  # before transformers 4.3
}


def usual(name: str) -> str:
    """A tensor's name, whichever version of torch and transformers saved it."""
    for alias, used in _ALIASES.items():
        name = name.replace(alias, used)
    return name


def first_layer(path: str) -> str:
    """The path of a parameter of ours in layer 0, for one in any layer."""
    return re.sub(r"/layer_\d+/", "/layer_0/", path)


class Entry(NamedTuple):
    """One parameter of ours and the tensors of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    load: Callable[..., np.ndarray]  # their tensors to ours
    dump: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # the inverse


def entries(
    settings: Settings, head: str, groups: int | None = None, weighted: bool = False
) -> Iterator[Entry]:
    """All entries of a model: `settings` of its encoder, `groups` of its quantizer's codebooks."""
    start = prefix(head, settings["name"])
    for entry in _encoder(settings):
        theirs = tuple(start + name for name in entry.theirs)
        yield entry._replace(ours=f"encoder/{entry.ours}", theirs=theirs)
    for entry in _statistics(settings):
        theirs = tuple(start + name for name in entry.theirs)
        yield entry._replace(ours=f"state/batch_stats/encoder/{entry.ours}", theirs=theirs)
    if head == "ctc":
        yield from _dense("head", "lm_head")
    elif head == "classification":
        yield from _dense("projector", "projector")
        yield from _dense("classifier", "classifier")
        if weighted:
            yield _same("layer_weights", "layer_weights")
    elif head == "pretraining":
        yield Entry(
            "quantizer/codebook",
            ("quantizer.codevectors",),
            lambda x: x.reshape(groups, -1, x.shape[-1]),
            lambda x: (x.reshape(1, -1, x.shape[-1]),),
        )
        yield from _dense("quantizer/project", "quantizer.weight_proj")
        yield from _dense("project_hidden", "project_hid")
        yield from _dense("project_target", "project_q")


# ---- Without a parameter of ours ---------------------------------------------------------------


def is_unused(name: str, encoder: str) -> bool:
    """Whether a tensor of theirs changes no output.

    Their Conformer has a positional convolution that it never applies, and batch norm counts its
    updates.
    """
    if encoder != "wav2vec2_conformer":
        return False
    pattern = r"pos_conv_embed\.|embed_positions\.|num_batches_tracked$"
    return re.search(pattern, name) is not None


def split_weight_norm(tensors: dict[str, np.ndarray], start: str) -> None:
    """Splits the positional convolution of a model that was saved without its weight norm.

    Where both are there, the product goes.
    """
    name = f"{start}encoder.pos_conv_embed.conv.weight"
    weight = tensors.pop(name, None)
    if weight is None or weight.ndim != 3 or f"{name}_g" in tensors or f"{name}_v" in tensors:
        return
    with np.errstate(over="ignore"):
        norm = np.sqrt(np.square(weight, dtype=np.float32).sum((0, 1), keepdims=True))
    tensors |= {f"{name}_g": norm, f"{name}_v": np.where(norm > 0, weight, np.ones_like(weight))}


def unused(settings: Settings, head: str) -> dict[str, np.ndarray]:
    """Those tensors, as theirs asks for them with the settings of `unused_config`."""
    if settings["name"] != "wav2vec2_conformer":
        return {}
    start, features = prefix(head, settings["name"]) + "encoder", settings["width"]
    tensors = {
        "pos_conv_embed.conv.weight_g": np.ones((1, 1, 1), np.float32),
        "pos_conv_embed.conv.weight_v": np.ones((features, 1, 1), np.float32),
        "pos_conv_embed.conv.bias": np.zeros(features, np.float32),
    }
    if settings["attention"] == "rotary_input":
        width = features // settings["heads"]
        rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
        tensors["embed_positions.inv_freq"] = rates.astype(np.float32)
    for index in range(settings["num_layers"]):
        name = f"layers.{index}.conv_module.batch_norm.num_batches_tracked"
        tensors[name] = np.zeros((), np.int64)
    return {f"{start}.{name}": tensor for name, tensor in tensors.items()}


def unused_config(settings: Settings) -> dict[str, int]:
    """Settings of theirs that make the convolution that it never applies a small one."""
    return {"num_conv_pos_embeddings": 1, "num_conv_pos_embedding_groups": settings["width"]}


# ---- Encoders ----------------------------------------------------------------------------------


def _encoder(settings: Settings) -> Iterator[Entry]:
    for index in range(len(settings["conv_channels"])):
        theirs = f"feature_extractor.conv_layers.{index}"
        yield _transposed(f"extractor/kernel_{index}", f"{theirs}.conv.weight", (2, 1, 0))
        if settings["conv_bias"]:
            yield _same(f"extractor/bias_{index}", f"{theirs}.conv.bias")
        if settings["conv_norm"] == "layer":
            yield from _norm(f"extractor/norm_{index}", f"{theirs}.layer_norm")
        elif index == 0:
            yield _same("extractor/scale_0", f"{theirs}.layer_norm.weight")
            yield _same("extractor/shift_0", f"{theirs}.layer_norm.bias")
    yield from _norm("feature_norm", "feature_projection.layer_norm")
    yield from _dense("projection", "feature_projection.projection")
    yield _same("mask_embedding", "masked_spec_embed")
    yield from _norm("norm", "encoder.layer_norm")
    conformer = settings["name"] == "wav2vec2_conformer"
    if not conformer:
        yield from _positional_convolution("position", "encoder.pos_conv_embed.conv")
    for index in range(settings["num_layers"]):
        layer = _conformer_layer if conformer else _transformer_layer
        yield from layer(f"layer_{index}", f"encoder.layers.{index}", settings)


def _positional_convolution(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(
        f"{ours}/magnitude",
        (f"{theirs}.weight_g",),
        lambda x: x.reshape(-1),
        lambda x: (x.reshape(1, 1, -1),),
    )
    yield _transposed(f"{ours}/direction", f"{theirs}.weight_v", (2, 1, 0))
    yield _same(f"{ours}/bias", f"{theirs}.bias")


def _transformer_layer(ours: str, theirs: str, settings: Settings) -> Iterator[Entry]:
    attention, heads = f"{theirs}.attention", settings["heads"]
    projections = [f"{attention}.{name}_proj" for name in "qkv"]
    yield from _several_to_heads(f"{ours}/attention/qkv", projections, heads)
    yield from _from_heads(f"{ours}/attention/project", f"{attention}.out_proj", heads)
    yield from _norm(f"{ours}/attention_norm", f"{theirs}.layer_norm")
    yield from _dense(f"{ours}/feed_forward/expand", f"{theirs}.feed_forward.intermediate_dense")
    yield from _dense(f"{ours}/feed_forward/project", f"{theirs}.feed_forward.output_dense")
    yield from _norm(f"{ours}/feed_forward_norm", f"{theirs}.final_layer_norm")


def _conformer_layer(ours: str, theirs: str, settings: Settings) -> Iterator[Entry]:
    for number in (1, 2):
        branch = f"{ours}/feed_forward_{number}"
        yield from _norm(f"{branch}/norm", f"{theirs}.ffn{number}_layer_norm")
        yield from _dense(f"{branch}/expand", f"{theirs}.ffn{number}.intermediate_dense")
        yield from _dense(f"{branch}/project", f"{theirs}.ffn{number}.output_dense")
    yield from _norm(f"{ours}/attention/norm", f"{theirs}.self_attn_layer_norm")
    yield from _conformer_attention(f"{ours}/attention", f"{theirs}.self_attn", settings)
    branch, module = f"{ours}/convolution", f"{theirs}.conv_module"
    yield from _norm(f"{branch}/norm", f"{module}.layer_norm")
    yield Entry(
        f"{branch}/gate/kernel",
        (f"{module}.pointwise_conv1.weight",),  # [2 * D, D, 1]; ours [D, 2, D]
        lambda x: x[:, :, 0].T.reshape(x.shape[1], 2, -1),
        lambda x: (x.reshape(x.shape[0], -1).T[:, :, None],),
    )
    yield Entry(
        f"{branch}/depthwise/kernel",
        (f"{module}.depthwise_conv.weight",),
        lambda x: x[:, 0].T,
        lambda x: (x.T[:, None],),
    )
    yield _same(f"{branch}/middle_norm/scale", f"{module}.batch_norm.weight")
    yield _same(f"{branch}/middle_norm/bias", f"{module}.batch_norm.bias")
    yield Entry(
        f"{branch}/project/kernel",
        (f"{module}.pointwise_conv2.weight",),
        lambda x: x[:, :, 0].T,
        lambda x: (x.T[:, :, None],),
    )
    yield from _norm(f"{ours}/norm", f"{theirs}.final_layer_norm")


def _conformer_attention(ours: str, theirs: str, settings: Settings) -> Iterator[Entry]:
    heads, query, key, value = settings["heads"], *(f"{theirs}.linear_{name}" for name in "qkv")
    if settings["attention"] == "rotary_input":
        yield from _several_to_heads(f"{ours}/qk", [query, key], heads)
        yield _to_heads(f"{ours}/value/kernel", f"{value}.weight", heads)
        yield Entry(
            f"{ours}/value/bias",
            (f"{value}.bias",),
            lambda x: x.reshape(heads, -1),
            lambda x: (x.reshape(-1),),
        )
    else:
        yield from _several_to_heads(f"{ours}/qkv", [query, key, value], heads)
        # Their table of sinusoids has sines and cosines by turns, ours all sines first.
        yield _to_heads(f"{ours}/position/kernel", f"{theirs}.linear_pos.weight", heads, turns=2)
        yield _same(f"{ours}/content_bias", f"{theirs}.pos_bias_u")
        yield _same(f"{ours}/position_bias", f"{theirs}.pos_bias_v")
    yield from _from_heads(f"{ours}/project", f"{theirs}.linear_out", heads)


def _statistics(settings: Settings) -> Iterator[Entry]:
    if settings["name"] != "wav2vec2_conformer":
        return
    for index in range(settings["num_layers"]):
        ours = f"layer_{index}/convolution/middle_norm"
        theirs = f"encoder.layers.{index}.conv_module.batch_norm"
        yield _same(f"{ours}/mean", f"{theirs}.running_mean")
        yield _same(f"{ours}/variance", f"{theirs}.running_var")


# ---- Layouts -----------------------------------------------------------------------------------


def _same(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), lambda x: x, lambda x: (x,))


def _transposed(ours: str, theirs: str, order: tuple[int, ...]) -> Entry:
    inverse = tuple(np.argsort(order))
    return Entry(ours, (theirs,), lambda x: x.transpose(order), lambda x: (x.transpose(inverse),))


def _dense(ours: str, theirs: str) -> Iterator[Entry]:
    yield _transposed(f"{ours}/kernel", f"{theirs}.weight", (1, 0))
    yield _same(f"{ours}/bias", f"{theirs}.bias")


def _norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield _same(f"{ours}/layer/scale", f"{theirs}.weight")
    yield _same(f"{ours}/layer/bias", f"{theirs}.bias")


def _several_to_heads(ours: str, theirs: Sequence[str], heads: int) -> Iterator[Entry]:
    """Theirs n layers of [heads * width, D], ours one of [D, n, heads, width]."""
    count = len(theirs)
    yield Entry(
        f"{ours}/kernel",
        tuple(f"{name}.weight" for name in theirs),
        lambda *each: np.stack([x.T.reshape(x.shape[1], heads, -1) for x in each], axis=1),
        lambda x: tuple(x[:, i].reshape(x.shape[0], -1).T for i in range(count)),
    )
    yield Entry(
        f"{ours}/bias",
        tuple(f"{name}.bias" for name in theirs),
        lambda *each: np.stack([x.reshape(heads, -1) for x in each]),
        lambda x: tuple(x[i].reshape(-1) for i in range(count)),
    )


def _to_heads(ours: str, theirs: str, heads: int, turns: int = 1) -> Entry:
    """Theirs [heads * width, D], ours [D, heads, width].

    The D inputs that are `turns` groups in ours one after the other take turns in theirs.
    """

    def load(x: np.ndarray) -> np.ndarray:
        rows = x.T.reshape(-1, turns, len(x)).swapaxes(0, 1)
        return rows.reshape(x.shape[1], heads, -1)

    def dump(x: np.ndarray) -> tuple[np.ndarray]:
        rows = x.reshape(turns, -1, x[0].size).swapaxes(0, 1)
        return (rows.reshape(x.shape[0], -1).T,)

    return Entry(ours, (theirs,), load, dump)


def _from_heads(ours: str, theirs: str, heads: int) -> Iterator[Entry]:
    """Theirs [D, heads * width], ours [heads, width, D]."""
    yield Entry(
        f"{ours}/kernel",
        (f"{theirs}.weight",),
        lambda x: x.T.reshape(heads, -1, x.shape[0]),
        lambda x: (x.reshape(-1, x.shape[2]).T,),
    )
    yield _same(f"{ours}/bias", f"{theirs}.bias")
