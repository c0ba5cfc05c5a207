"""wav2vec 2.0 (Baevski et al. 2020): a convolutional and Transformer encoder over waveforms.

Parameters map one to one onto those of the released checkpoints (bundle/huggingface.py).

Shapes: B rows, T samples, T' frames, C the width of the feature extractor's output, D the width of
the Transformer, H heads of W = D / H.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.ops import attention, convolution, masking, partition
from speech_jax.rules import Rules

_normal = nn.initializers.normal(0.02)


class Wav2Vec2(nn.Module):
    """Waveform [B, T] to hidden [B, T', width], a frame every 20 ms of 16 kHz audio.

    Attributes:
      width: of the Transformer (D).
      num_layers, heads, feed_forward: its depth, attention heads and hidden units of a layer.
      pre_norm: normalize before each residual branch (Large) or after the sum (Base).
      conv_channels, conv_kernels, conv_strides: the feature extractor, layer by layer.
      conv_norm: 'group' normalizes each channel of the first layer over time (Base), 'layer' the
        channels of every frame of every layer (Large).
      conv_bias: whether the extractor's convolutions have a bias.
      norm_padding: count padding in the group norm's statistics, as fairseq and transformers do.
        Only for parity with them: the output then depends on how far an utterance is padded.
      position_kernel, position_groups: the convolution that encodes position; none without taps.
      dropout: on every residual branch and on attention weights; attention_dropout: on these alone,
        in its place (with 0.0, attention is one kernel on GPUs: ops/attention.py); input_dropout:
        on the projected features.
      layer_drop: probability that a layer is skipped in training (Fan et al. 2020).
      mask_time, mask_time_length: in training, spans of so many frames become a learned vector;
        starts are so many that they would cover this fraction of an utterance if none overlapped.
      mask_channel, mask_channel_length: the same over the D channels, which become 0.
      adapter: hidden units of the adapter behind each layer (layers.Adapter); 0: none.
      feature_gradient: multiplies the gradient that reaches the extractor; 0 freezes it.
      scan: compile one layer and loop over it, or unroll (faster to run on CPU).
      remat: recompute each layer's activations in the backward pass.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    width: int = 768
    num_layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    pre_norm: bool = False
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_norm: str = "group"
    conv_bias: bool = False
    norm_padding: bool = False
    position_kernel: int = 128
    position_groups: int = 16
    dropout: float = 0.1
    attention_dropout: float | None = None
    input_dropout: float = 0.1
    layer_drop: float = 0.0
    mask_time: float = 0.0
    mask_time_length: int = 10
    mask_channel: float = 0.0
    mask_channel_length: int = 64
    adapter: int = 0
    feature_gradient: float = 1.0
    scan: bool = True
    remat: bool = False
    dtype: Any = "float32"

    listens: ClassVar = "waveform"
    rules: ClassVar[Rules] = (
        *layers.RULES,
        (r"extractor/kernel_\d", (None, None, "fsdp")),
        (r"extractor/(bias|scale|shift)_\d", ()),
        (r"projection/kernel", ("fsdp", None)),
        (r"projection/bias", ()),
        (r"mask_embedding", ()),
        (r"position/direction", (None, None, "fsdp")),
        (r"position/(magnitude|bias)", ()),
    )
    # Base and Large: table 7 of fairseq's release. Tiny is for two CPU cores.
    VARIANTS: ClassVar = {
        "tiny": {
            "width": 128, "num_layers": 4, "heads": 4, "feed_forward": 512,
            "conv_channels": (32, 64, 64, 96, 96, 128, 128), "position_kernel": 32,
            "position_groups": 8, "scan": False,
        },
        "base": {},
        "large": {
            "width": 1024, "num_layers": 24, "heads": 16, "feed_forward": 4096,
            "pre_norm": True, "conv_norm": "layer", "conv_bias": True,
        },
    }  # fmt: skip

    def setup(self):
        self.extractor = FeatureExtractor(
            tuple(self.conv_channels),
            tuple(self.conv_kernels),
            tuple(self.conv_strides),
            norm=self.conv_norm,
            use_bias=self.conv_bias,
            norm_padding=self.norm_padding,
            dtype=self.dtype,
        )
        self.feature_norm = layers.LayerNorm(self.dtype)
        self.projection = nn.Dense(self.width, dtype=self.dtype, kernel_init=_normal)
        uniform = nn.initializers.uniform(1.0)
        self.mask_embedding = self.param("mask_embedding", uniform, (self.width,))
        if self.position_kernel:
            self.position = PositionalConvolution(
                self.position_kernel, self.position_groups, dtype=self.dtype
            )
        self.norm = layers.LayerNorm(self.dtype)
        block, settings = self.layer_settings()
        if self.remat:
            block = nn.remat(block, prevent_cse=not self.scan)
        if self.scan:
            self.layers = block(**settings)
        else:
            self.layer = [block(**settings) for _ in range(self.num_layers)]

    @property
    def above(self) -> str:
        """What is behind the layers."""
        return "norm/.*" if self.pre_norm else ""

    def layer_settings(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """The module of a layer, called as module(x, mask, seed, skip), and its attributes."""
        names = ("heads", "pre_norm", "dropout", "attention_dropout", "adapter", "dtype")
        settings = {name: getattr(self, name) for name in names}
        return Block, settings | {"hidden": self.feed_forward}

    def geometry(self) -> tuple[int, int]:
        """How many samples a frame sees, and how many there are from frame to frame."""
        field = convolution.receptive_field(self.conv_kernels, self.conv_strides)
        return field, math.prod(self.conv_strides)

    def output_lengths(self, lengths: int | jax.Array) -> int | jax.Array:
        """Hidden frames for `lengths` samples; the convolutions see no padding."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            lengths = convolution.output_length(lengths, kernel, stride)
        return lengths

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        deterministic: bool,
        mask: jax.Array | None = None,
        layers_too: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden (0 past the end) and its lengths; `mask`, `layers_too` as in `contextualize`."""
        features, lengths = self.extract(inputs, lengths)
        features = self.normalize(features)
        hidden = self.contextualize(features, lengths, deterministic, mask, layers_too)
        return hidden, lengths

    def extract(self, inputs: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The extractor's output [B, T', C], 0 past the end, and its lengths [B]."""
        if self.feature_gradient == 0.0:
            features = lax.stop_gradient(self.extractor(inputs, lengths))
        else:
            features = _scale_gradient(self.extractor(inputs, lengths), self.feature_gradient)
        lengths = self.output_lengths(lengths)
        valid = masking.length_mask(lengths, features.shape[1])[:, :, None]
        return jnp.where(valid, features, jnp.zeros((), features.dtype)), lengths

    def normalize(self, features: jax.Array) -> jax.Array:
        """Layer-normalized features [B, T', C]: the input of the projection and the quantizer."""
        return self.feature_norm(features)

    def contextualize(
        self,
        features: jax.Array,
        lengths: jax.Array,
        deterministic: bool,
        mask: jax.Array | None = None,
        layers_too: bool = False,
    ) -> jax.Array:
        """The layers over normalized features [B, T', C]: hidden [B, T', D].

        mask: bool [B, T'], frames to replace by the mask embedding; None draws `mask_time` spans
        in training and masks nothing otherwise. layers_too: see models/__init__.py.
        """
        # One draw for all layers: drawing in every dropout would take most of the compile time.
        seeds, skips = [None] * (self.num_layers + 1), [None] * self.num_layers
        if not deterministic:
            seeds = jax.random.bits(self.make_rng("dropout"), (len(seeds), 2), jnp.uint32)
            if self.layer_drop:
                rng = self.make_rng("dropout")
                skips = jax.random.bernoulli(rng, self.layer_drop, (len(skips),))
        x = layers.dropout(self.projection(features), self.input_dropout, seeds[-1], site=0)
        x = self._mask(x, lengths, deterministic, mask)
        valid = masking.length_mask(lengths, x.shape[1])
        x = jnp.where(valid[:, :, None], x, jnp.zeros((), x.dtype))
        if self.position_kernel:
            x = x + self.position(x)
        if not self.pre_norm:
            x = self.norm(x)
        x = layers.dropout(x, self.dropout, seeds[-1], site=1)
        if self.scan:
            by_layer = [None if each[0] is None else each for each in (seeds[:-1], skips)]
            first = x
            x, each = layers.scan_layers(
                self.layers, self.num_layers, layers_too, x, valid, *by_layer
            )
            each = [first, *each] if layers_too else []
        else:
            each = [x]
            for layer, seed, skip in zip(self.layer, seeds[:-1], skips, strict=True):
                x, _ = layer(x, valid, seed, skip)
                each.append(x)
        if self.pre_norm:
            x = self.norm(x)
        if layers_too:
            x, valid = jnp.stack([*each[:-1], x], axis=2), valid[:, :, None]
        return jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))

    def _mask(
        self, x: jax.Array, lengths: jax.Array, deterministic: bool, mask: jax.Array | None
    ) -> jax.Array:
        batch, frames, channels = x.shape
        if mask is None and self.mask_time and not deterministic:
            rng = self.make_rng("dropout")
            mask = masking.random_spans(rng, lengths, frames, self.mask_time, self.mask_time_length)
        if mask is not None:
            embedding = self.mask_embedding.astype(x.dtype)[None, None]
            x = jnp.where(mask[:, :, None], embedding, x)
        if self.mask_channel and not deterministic:
            whole = jnp.full((batch,), channels, lengths.dtype)
            dropped = masking.random_spans(
                self.make_rng("dropout"),
                whole,
                channels,
                self.mask_channel,
                self.mask_channel_length,
                minimum=0,
            )
            x = jnp.where(dropped[:, None, :], jnp.zeros((), x.dtype), x)
        return x


class FeatureExtractor(nn.Module):
    """Waveform [B, T] to features [B, T', C] by strided convolutions without padding, and GELU."""

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    norm: str
    use_bias: bool
    norm_padding: bool
    dtype: Any

    @nn.compact
    def __call__(self, inputs: jax.Array, lengths: jax.Array) -> jax.Array:
        if self.norm not in ("group", "layer"):
            raise UserError(f"conv_norm must be 'group' or 'layer', got {self.norm!r}")
        shortest = convolution.receptive_field(self.kernels, self.strides)
        if inputs.shape[1] < shortest:
            raise UserError(f"audio has {inputs.shape[1]} samples, a frame needs {shortest}")
        x = inputs[:, :, None]  # [B, T, 1]
        geometry = zip(self.channels, self.kernels, self.strides, strict=True)
        for index, (channels, kernel, stride) in enumerate(geometry):
            shape = (kernel, x.shape[2], channels)
            weight = self.param(f"kernel_{index}", nn.initializers.he_normal(), shape)
            bias = jnp.zeros(channels)
            if self.use_bias:
                bias = self.param(f"bias_{index}", nn.initializers.zeros, (channels,))
            if self.norm == "group" and index == 0:
                scale = self.param("scale_0", nn.initializers.ones, (channels,))
                shift = self.param("shift_0", nn.initializers.zeros, (channels,))
                frames = convolution.output_length(lengths, kernel, stride)
                if self.norm_padding:
                    whole = convolution.output_length(x.shape[1], kernel, stride)
                    frames = jnp.full_like(frames, whole)
                x = convolution.strided_and_normalized(
                    x, frames, weight, stride, scale, shift, self.dtype
                )
            else:
                x = convolution.strided(x.astype(self.dtype), weight.astype(self.dtype), stride)
                x = x + bias.astype(self.dtype)[None, None]
            if self.norm == "layer":
                x = layers.LayerNorm(self.dtype, name=f"norm_{index}")(x)
            x = partition.split_rows(layers.gelu(x))
        return x


class PositionalConvolution(nn.Module):
    """GELU of a grouped convolution over time, 'same' padding, with a weight norm per tap."""

    kernel: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        shape = (self.kernel, width // self.groups, width)
        std = 2.0 / math.sqrt(self.kernel * width)
        direction = self.param("direction", nn.initializers.normal(std), shape)
        # The weight starts out as the direction.
        norm = lambda weight: jnp.sqrt(jnp.square(weight).sum(axis=(1, 2)))
        magnitude = self.param("magnitude", lambda _: norm(direction))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        weight = direction * (magnitude / norm(direction))[:, None, None]
        x = convolution.grouped(x, weight.astype(self.dtype), self.groups)
        return layers.gelu(x + bias.astype(self.dtype)[None, None])


class Block(nn.Module):
    """A Transformer layer: attention and feed-forward, normalized before or after.

    `seed` is that of layers.dropout; `skip`, a bool or None, leaves the layer out.
    """

    heads: int
    hidden: int
    pre_norm: bool
    dropout: float
    attention_dropout: float | None
    adapter: int
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        seed: jax.Array | None,
        skip: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        x = partition.split_rows(x)
        attention_norm = layers.LayerNorm(self.dtype, name="attention_norm")
        feed_forward_norm = layers.LayerNorm(self.dtype, name="feed_forward_norm")
        by_weight = layers.weight_dropout(self.dropout, self.attention_dropout)
        attention = Attention(self.heads, self.dropout, by_weight, self.dtype, name="attention")
        feed_forward = FeedForward(self.hidden, self.dropout, self.dtype, name="feed_forward")
        if self.pre_norm:
            y = x + attention(attention_norm(x), mask, seed)
            y = y + feed_forward(feed_forward_norm(y), seed)
        else:
            y = attention_norm(x + attention(x, mask, seed))
            y = feed_forward_norm(y + feed_forward(y, seed))
        if self.adapter:
            y = layers.Adapter(self.adapter, self.dtype, name="adapter")(y)
        if skip is not None:
            y = jnp.where(skip, x, y)
        return partition.split_rows(y), None


class Attention(nn.Module):
    """Multi-head self-attention over valid positions (Vaswani et al. 2017)."""

    heads: int
    dropout: float
    weight_dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, seed: jax.Array | None) -> jax.Array:
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(f"a width of {width} cannot be split into {self.heads} heads")
        each = width // self.heads
        dense = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=_normal)
        projected = dense((3, self.heads, each), name="qkv")(x)  # [B, T', 3, H, W]
        query, key, value = (projected[:, :, i] for i in range(3))
        query = query * jnp.asarray(each**-0.5, self.dtype)
        drop = layers.dropping(self.weight_dropout, seed, site=0)
        context = attention.attend(query, key, value, mask, drop)  # [B, T', H, W]
        output = dense(width, axis=(-2, -1), name="project")(context)
        return layers.dropout(output, self.dropout, seed, site=1)


class FeedForward(nn.Module):
    """[B, T', D] to [B, T', D] through `hidden` units and GELU."""

    hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, seed: jax.Array | None) -> jax.Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        hidden = layers.gelu(dense(self.hidden, name="expand")(x))
        x = dense(x.shape[-1], name="project")(hidden)
        return layers.dropout(x, self.dropout, seed, site=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    return x


_scale_gradient.defvjp(
    lambda x, factor: (x, None), lambda factor, _, g: (g * jnp.asarray(factor, g.dtype),)
)
