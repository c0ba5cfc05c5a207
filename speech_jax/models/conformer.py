"""Conformer (Gulati et al. 2020): convolution-augmented Transformer encoder over log-mel frames."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax import registry
from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.models.edges import Edge, Kept
from speech_jax.ops import convolution, masking, partition
from speech_jax.rules import Rules


class Conformer(nn.Module):
    """Log-mel [B, F, M] to hidden [B, F / 4 (or 8), width].

    Attributes:
      width: of the residual stream (D).
      num_layers, heads, kernel: depth, attention heads, taps of the depthwise convolution.
      expansion: feed-forward width over D.
      subsampling: 4 or 8, input frames per output frame.
      subsampling_kind: 'plane' (over time and frequency, as in the paper), 'separable' (depthwise
        over both, FastConformer, Rekesh et al. 2023) or 'time' (over time alone, the bands are
        channels: the cheapest on CPUs).
      subsampling_channels: channels of the strided convolutions; None is D.
      position: 'rotary' or 'relative' attention.
      conv_norm: 'layer' or 'batch' in the convolution module.
      dropout: on every residual branch and on attention weights; attention_dropout: on these alone,
        in its place. With 0.0, attention is one kernel on GPUs (ops/attention.py).
      layer_drop: probability that the last layer is skipped for an utterance in training; that of
        the others falls to 0 at the input (stochastic depth, Huang et al. 2016). What is not
        skipped is as in evaluation, for each layer ends in a norm.
      adapter: hidden units of the adapter behind each layer (layers.Adapter); 0: none.
      scan: compile one layer and loop over it (fast to compile), or unroll (faster to run on CPU).
      remat: recompute each layer's activations in the backward pass.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    width: int = 256
    num_layers: int = 16
    heads: int = 4
    kernel: int = 31
    expansion: int = 4
    subsampling: int = 4
    subsampling_kind: str = "plane"
    subsampling_channels: int | None = None
    position: str = "rotary"
    conv_norm: str = "layer"
    dropout: float = 0.1
    attention_dropout: float | None = None
    layer_drop: float = 0.0
    adapter: int = 0
    scan: bool = True
    remat: bool = False
    dtype: Any = "float32"

    listens: ClassVar = "log_mel"
    rules: ClassVar[Rules] = (
        *layers.RULES,
        (r"subsampling/convolution_\d/kernel", (None, None, None, "fsdp")),
        (r"subsampling/over_time_\d/kernel", (None, None, "fsdp")),
        (r"subsampling/depthwise_\d/kernel", ()),
        (r"subsampling/(pointwise_\d|project)/kernel", ("fsdp", None)),
        (r"subsampling/(convolution_\d|over_time_\d|pointwise_\d|project)/bias", ()),
    )
    # S, M, L: table 1 of the paper. Tiny is for two CPU cores.
    VARIANTS: ClassVar = {
        "tiny": {
            "width": 128, "num_layers": 4, "kernel": 15, "subsampling_channels": 32,
            "scan": False,
        },
        "s": {"width": 144, "num_layers": 16, "heads": 4},
        "m": {"width": 256, "num_layers": 16, "heads": 4},
        "l": {"width": 512, "num_layers": 17, "heads": 8},
    }  # fmt: skip

    def output_lengths(self, lengths: int | jax.Array) -> int | jax.Array:
        """Hidden frames for `lengths` log-mel frames: each stride-2 convolution rounds up."""
        return halved(lengths, halvings(self.subsampling))

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool, layers_too: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        x, lengths, _ = Subsampling(
            self.width,
            self.subsampling_channels or self.width,
            halvings(self.subsampling),
            self.subsampling_kind,
            dtype=self.dtype,
            name="subsampling",
        )(inputs, lengths)
        mask = masking.length_mask(lengths, x.shape[1])
        # One draw for all layers: drawing in every dropout would take most of the compile time.
        seeds, skips = [None] * (self.num_layers + 1), [None] * self.num_layers
        if not deterministic:
            seeds = jax.random.bits(self.make_rng("dropout"), (len(seeds), 2), jnp.uint32)
            if self.layer_drop:
                skips = self._skips(len(x))
        x = layers.dropout(x, self.dropout, seeds[-1])
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            one = block(**self.block_settings(), name="layers")
            own = [None if of[0] is None else of for of in (seeds[:-1], skips)]
            first = x
            x, each = layers.scan_layers(one, self.num_layers, layers_too, x, mask, *own)
            each = [first, *each] if layers_too else []
        else:
            each = [x]
            for layer in range(self.num_layers):
                one = block(**self.block_settings(), name=f"layer_{layer}")
                x, _ = one(x, mask, seeds[layer], skips[layer])
                each.append(x)
        if layers_too:
            x, mask = jnp.stack(each, axis=2), mask[:, :, None]  # [B, T', L + 1, D]
        return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype)), lengths

    def _skips(self, rows: int) -> jax.Array:
        """Which rows skip which layers, bool [num_layers, B, 1, 1]."""
        odds = self.layer_drop * np.arange(1, self.num_layers + 1) / self.num_layers
        odds = jnp.asarray(odds, jnp.float32).reshape(-1, 1, 1, 1)
        shape = (self.num_layers, rows, 1, 1)
        return jax.random.bernoulli(self.make_rng("dropout"), odds, shape)

    def block_settings(self) -> dict[str, Any]:
        """The attributes of a layer."""
        names = (
            "heads", "kernel", "position", "conv_norm", "dropout", "attention_dropout", "adapter",
            "dtype",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        return settings | {"feed_forward": self.expansion * self.width}


class Block(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm.

    `feed_forward` counts hidden units; `conv_bias` and `conv_momentum` are the convolution module's
    use_bias and momentum. Where `skip` is True, the layer is left out: a bool of all rows or
    [B, 1, 1], or None.
    """

    heads: int
    kernel: int
    feed_forward: int
    position: str
    conv_norm: str
    dropout: float
    attention_dropout: float | None
    dtype: Any
    conv_bias: bool = True
    conv_momentum: float = 0.99
    adapter: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        seed: jax.Array | None,
        skip: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        common = {"dropout": self.dropout, "dtype": self.dtype}
        half = jnp.asarray(0.5, self.dtype)
        x = residual = partition.split_rows(x)
        first = layers.FeedForward(self.feed_forward, name="feed_forward_1", site=0, **common)
        by_weight = layers.weight_dropout(self.dropout, self.attention_dropout)
        attention = layers.SelfAttention(
            self.heads, self.position, weight_dropout=by_weight, name="attention", site=2, **common
        )
        convolution = layers.ConvolutionModule(
            self.kernel,
            self.conv_norm,
            self.conv_momentum,
            self.conv_bias,
            name="convolution",
            site=4,
            **common,
        )
        second = layers.FeedForward(self.feed_forward, name="feed_forward_2", site=5, **common)
        x = x + half * first(x, seed)
        x = x + attention(x, mask, seed)
        x = x + convolution(x, mask, seed)
        x = x + half * second(x, seed)
        x = layers.LayerNorm(self.dtype, name="norm")(x)
        if self.adapter:
            x = layers.Adapter(self.adapter, self.dtype, name="adapter")(x)
        if skip is not None:
            x = jnp.where(skip, residual, x)
        return partition.split_rows(x), None


HALVING = Edge(past=1, future=1, stride=2)  # of each convolution of Subsampling


class Subsampling(nn.Module):
    """Convolutions of three taps and stride 2, then a projection to `width`; see Conformer.

    Frames past an utterance's length are zero before each convolution, as if it ended there. With
    what has been `kept` for each convolution it runs on pieces, and `valid` is of them (edges.py).
    It returns the hidden frames, what of them is valid, and what to keep.
    """

    width: int
    channels: int
    halvings: int
    kind: str = "plane"
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array, kept: Sequence[Kept] | None = None
    ) -> tuple[jax.Array, jax.Array, list[Kept]]:
        convolve = registry.lookup("subsampling_kind", _HALVE, self.kind)
        x = x.astype(self.dtype)
        if self.kind != "time":
            x = x[..., None]  # [B, F, M, 1]
        keep = []
        for index in range(self.halvings):
            x, valid, last = HALVING.surround(x, valid, kept and kept[index])
            x = partition.split_rows(nn.relu(convolve(x, self.channels, index, self.dtype)))
            keep.append(last)
        batch, frames = x.shape[:2]
        # Frames that SpecAugment hides are zero up to here. Without a bias they would stay so, and
        # the norm of each layer would multiply their gradient by 316, one over the root of its
        # epsilon: in 16 layers past the largest float.
        project = nn.Dense(
            self.width, dtype=self.dtype, bias_init=nn.initializers.normal(0.1), name="project"
        )
        return project(x.reshape(batch, frames, -1)), valid, keep


def _over_plane(x: jax.Array, channels: int, index: int, dtype: Any) -> jax.Array:
    """[B, F, M, C], one frame more at each end, to [B, F / 2, M / 2, channels]."""
    return nn.Conv(
        channels,
        (3, 3),
        strides=(2, 2),
        padding=((0, 0), (1, 1)),
        dtype=dtype,
        conv_general_dilated=convolution.over_plane,
        name=f"convolution_{index}",
    )(x)


def _separable(x: jax.Array, channels: int, index: int, dtype: Any) -> jax.Array:
    """The same; there is nothing to separate in one channel."""
    if not index:
        return _over_plane(x, channels, index, dtype)
    x = nn.Conv(
        channels,
        (3, 3),
        strides=(2, 2),
        padding=((0, 0), (1, 1)),
        feature_group_count=channels,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=convolution.depthwise_over_plane,
        name=f"depthwise_{index}",
    )(x)
    return nn.Dense(channels, dtype=dtype, name=f"pointwise_{index}")(x)


def _over_time(x: jax.Array, channels: int, index: int, dtype: Any) -> jax.Array:
    """[B, F, C], one frame more at each end, to [B, F / 2, channels]."""
    return nn.Conv(
        channels,
        (3,),
        strides=(2,),
        padding=((0, 0),),
        dtype=dtype,
        conv_general_dilated=convolution.over_time,
        name=f"over_time_{index}",
    )(x)


_HALVE = {"plane": _over_plane, "separable": _separable, "time": _over_time}


def halvings(subsampling: int) -> int:
    """How many convolutions of stride 2 make one frame of `subsampling`; UserError for others."""
    if subsampling not in (4, 8):
        raise UserError(f"subsampling must be 4 or 8, got {subsampling}")
    return subsampling.bit_length() - 1


def halved(lengths: int | jax.Array, times: int) -> int | jax.Array:
    """Frames after `times` convolutions of stride 2, each of which rounds up."""
    for _ in range(times):
        lengths = (lengths + 1) // 2
    return lengths
