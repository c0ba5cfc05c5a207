"""wav2vec 2.0 (Baevski et al. 2020): a convolutional and Transformer encoder over waveforms.

Parameters map one to one onto those of the released checkpoints (deploy/hf.py).
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.models import layers
from speech_jax.ops import masking, partition

_normal = nn.initializers.normal(0.02)


class Wav2Vec2(nn.Module):
    """Waveform [B, T] to hidden [B, T', features], a frame every 20 ms of 16 kHz audio.

    Attributes:
      features: width of the Transformer (D).
      num_layers, heads, feed_forward: its depth, attention heads and feed-forward width.
      pre_norm: normalize before each residual branch (Large) or after the sum (Base).
      conv_channels, conv_kernels, conv_strides: the feature extractor, layer by layer.
      conv_norm: 'group' normalizes each channel of the first layer over time (Base), 'layer' the
        channels of every frame of every layer (Large).
      conv_bias: whether the extractor's convolutions have a bias.
      norm_padding: count padding in the group norm's statistics, as fairseq and transformers do.
        Only for parity with them: the output then depends on how far an utterance is padded.
      position_kernel, position_groups: the convolution that encodes position; none without taps.
      dropout: on every residual branch and on attention weights; input_dropout: on the projected
        features.
      layer_drop: probability that a layer is skipped in training (Fan et al. 2020).
      mask_time, mask_time_length: in training, spans of so many frames become a learned vector;
        starts are so many that they would cover this fraction of an utterance if none overlapped.
      mask_channel, mask_channel_length: the same over the D channels, which become 0.
      feature_gradient: multiplies the gradient that reaches the extractor; 0 freezes it.
      scan: compile one layer and loop over it, or unroll (faster to run on CPU).
      remat: recompute each layer's activations in the backward pass.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    features: int = 768
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
    input_dropout: float = 0.1
    layer_drop: float = 0.0
    mask_time: float = 0.0
    mask_time_length: int = 10
    mask_channel: float = 0.0
    mask_channel_length: int = 64
    feature_gradient: float = 1.0
    scan: bool = True
    remat: bool = False
    dtype: Any = "float32"

    frontend = "waveform"
    # Base and Large: table 7 of fairseq's release. Tiny is for two CPU cores.
    VARIANTS: ClassVar = {
        "tiny": {
            "features": 128, "num_layers": 4, "heads": 4, "feed_forward": 512,
            "conv_channels": (32, 64, 64, 96, 96, 128, 128), "position_kernel": 32,
            "position_groups": 8, "scan": False,
        },
        "base": {},
        "large": {
            "features": 1024, "num_layers": 24, "heads": 16, "feed_forward": 4096,
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
        self.projection = nn.Dense(self.features, dtype=self.dtype, kernel_init=_normal)
        uniform = nn.initializers.uniform(1.0)
        self.mask_embedding = self.param("mask_embedding", uniform, (self.features,))
        if self.position_kernel:
            self.position = PositionalConvolution(
                self.position_kernel, self.position_groups, dtype=self.dtype
            )
        self.norm = layers.LayerNorm(self.dtype)
        block, settings = self.layer_settings()
        if self.remat:
            block = nn.remat(block, prevent_cse=not self.scan)
        if self.scan:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, 0),
                length=self.num_layers,
            )(**settings)
        else:
            self.layer = [block(**settings) for _ in range(self.num_layers)]

    def layer_settings(self):
        """The module of a layer, called as module(x, mask, seed, skip), and its attributes."""
        names = ("heads", "pre_norm", "dropout", "dtype")
        return Block, {name: getattr(self, name) for name in names} | {"width": self.feed_forward}

    def output_lengths(self, lengths):
        """Hidden frames for `lengths` samples; the convolutions see no padding."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            lengths = _convolved(lengths, kernel, stride)
        return lengths

    def __call__(self, inputs, lengths, deterministic: bool, mask=None):
        """Hidden [B, T', D] (0 past the end) and its lengths; `mask` as in `contextualize`."""
        features, lengths = self.extract(inputs, lengths)
        return self.contextualize(self.normalize(features), lengths, deterministic, mask), lengths

    def extract(self, inputs, lengths):
        """The extractor's output [B, T', C], 0 past the end, and its lengths [B]."""
        if self.feature_gradient == 0.0:
            features = lax.stop_gradient(self.extractor(inputs, lengths))
        else:
            features = _scale_gradient(self.extractor(inputs, lengths), self.feature_gradient)
        lengths = self.output_lengths(lengths)
        valid = masking.length_mask(lengths, features.shape[1])[:, :, None]
        return jnp.where(valid, features, jnp.zeros((), features.dtype)), lengths

    def normalize(self, features):
        """Layer-normalized features [B, T', C]: what is projected, and what is quantized."""
        return self.feature_norm(features)

    def contextualize(self, features, lengths, deterministic: bool, mask=None):
        """The layers over normalized features [B, T', C].

        mask: bool [B, T'], frames to replace by the mask embedding; None draws `mask_time` spans
        in training and masks nothing otherwise.
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
            x, _ = self.layers(x, valid, *by_layer)
        else:
            for layer, seed, skip in zip(self.layer, seeds[:-1], skips, strict=True):
                x, _ = layer(x, valid, seed, skip)
        if self.pre_norm:
            x = self.norm(x)
        return jnp.where(valid[:, :, None], x, jnp.zeros((), x.dtype))

    def _mask(self, x, lengths, deterministic, mask):
        batch, frames, channels = x.shape
        if mask is None and self.mask_time and not deterministic:
            rng = self.make_rng("dropout")
            mask = random_spans(rng, lengths, frames, self.mask_time, self.mask_time_length)
        if mask is not None:
            embedding = self.mask_embedding.astype(x.dtype)[None, None]
            x = jnp.where(mask[:, :, None], embedding, x)
        if self.mask_channel and not deterministic:
            whole = jnp.full((batch,), channels, lengths.dtype)
            dropped = random_spans(
                self.make_rng("dropout"),
                whole,
                channels,
                self.mask_channel,
                self.mask_channel_length,
                minimum=0,
            )
            x = jnp.where(dropped[:, None, :], jnp.zeros((), x.dtype), x)
        return x


def random_spans(rng, lengths, size: int, fraction: float, span: int, minimum: int = 2):
    """Bool [B, size]: spans of `span` positions that lie inside their row's length and may overlap.

    A row of length L gets fraction * L / span spans, rounded at random up or down (the same way
    for all rows), at least `minimum`, at distinct starts drawn uniformly; none where L < span.
    """
    rounding_rng, start_rng = jax.random.split(rng)
    starts = jnp.maximum(lengths - (span - 1), 0)
    wanted = fraction * lengths.astype(jnp.float32) / span + jax.random.uniform(rounding_rng)
    count = jnp.minimum(jnp.maximum(wanted.astype(lengths.dtype), minimum), starts)
    order = jax.random.uniform(start_rng, (lengths.shape[0], size))
    order = jnp.where(masking.length_mask(starts, size), order, -1.0)
    rank = jnp.argsort(jnp.argsort(-order, axis=1), axis=1)
    begun = jnp.cumsum(rank < count[:, None], axis=1, dtype=jnp.int32)
    ended = jnp.pad(begun, ((0, 0), (span, 0)))[:, :size]
    return begun > ended


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
    def __call__(self, inputs, lengths):
        if self.norm not in ("group", "layer"):
            raise ValueError(f"conv_norm must be 'group' or 'layer', got {self.norm!r}")
        shortest = receptive_field(self.kernels, self.strides)
        if inputs.shape[1] < shortest:
            raise ValueError(f"audio has {inputs.shape[1]} samples, a frame needs {shortest}")
        x = inputs[:, :, None]
        geometry = zip(self.channels, self.kernels, self.strides, strict=True)
        for index, (channels, kernel, stride) in enumerate(geometry):
            shape = (kernel, x.shape[2], channels)
            weight = self.param(f"kernel_{index}", nn.initializers.he_normal(), shape)
            bias = jnp.zeros(channels)
            if self.use_bias:
                bias = self.param(f"bias_{index}", nn.initializers.zeros, (channels,))
            windows = _windows(x, kernel, stride)
            weight = weight.reshape(-1, channels)
            if self.norm == "group" and index == 0:
                scale = self.param("scale_0", nn.initializers.ones, (channels,))
                shift = self.param("shift_0", nn.initializers.zeros, (channels,))
                frames = _convolved(lengths, kernel, stride)
                if self.norm_padding:
                    frames = jnp.full_like(frames, windows.shape[1])
                weight, bias = _normalize_over_time(windows, frames, weight, scale, shift)
            else:
                weight, bias = weight[None], bias[None]
            x = jnp.matmul(windows.astype(self.dtype), weight.astype(self.dtype))
            x = x + bias.astype(self.dtype)[:, None]
            if self.norm == "layer":
                x = layers.LayerNorm(self.dtype, name=f"norm_{index}")(x)
            x = partition.split_rows(nn.gelu(x, approximate=False))
        return x


def receptive_field(kernels, strides) -> int:
    """How many samples one frame of the extractor sees."""
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        field = (field - 1) * stride + kernel
    return field


def _convolved(lengths, kernel, stride):
    maximum = max if isinstance(lengths, int) else jnp.maximum
    return maximum((lengths - kernel) // stride + 1, 0)


def _windows(x, kernel: int, stride: int):
    """[B, T, C] to the windows of a strided convolution [B, T', kernel * C].

    Slices and a reshape, so that the convolution is one matrix product: on CPU its gradients are
    about twice as fast as those of lax.conv.
    """
    batch, length, channels = x.shape
    frames = _convolved(length, kernel, stride)
    pieces = -(-kernel // stride)
    needed = (frames + pieces - 1) * stride
    x = jnp.pad(x[:, :needed], ((0, 0), (0, max(0, needed - length)), (0, 0)))
    x = x.reshape(batch, frames + pieces - 1, stride * channels)
    widths = [min(stride, kernel - piece * stride) * channels for piece in range(pieces)]
    parts = [x[:, piece : piece + frames, :width] for piece, width in enumerate(widths)]
    return jnp.concatenate(parts, axis=-1)


def _normalize_over_time(windows, frames, weight, scale, shift):
    """Folds the group norm of a convolution's output into the convolution.

    The mean and variance over time of `windows @ weight` follow from the mean and covariance of
    the windows [B, F, K], so the output [B, F, C], the largest array of the network, is written
    once, normalized. A bias of the convolution would cancel.

    Returns:
      weight [B, K, C] and bias [B, C] of each row.
    """
    valid = masking.length_mask(frames, windows.shape[1])[:, :, None]
    windows = windows.astype(jnp.float32)
    count = jnp.maximum(frames, 1).astype(jnp.float32)[:, None]
    mean = jnp.where(valid, windows, 0.0).sum(axis=1) / count
    centered = jnp.where(valid, windows - mean[:, None], 0.0)
    exactly = {"precision": lax.Precision.HIGHEST}
    covariance = jnp.einsum("btk,btl->bkl", centered, centered, **exactly) / count[:, :, None]
    half = jnp.einsum("bkl,lc->bkc", covariance, weight, **exactly)
    variance = jnp.maximum((half * weight[None]).sum(axis=1), 0.0)
    factor = scale[None] * lax.rsqrt(variance + 1e-5)
    bias = shift[None] - jnp.einsum("bk,kc->bc", mean, weight, **exactly) * factor
    return weight[None] * factor[:, None], bias


class PositionalConvolution(nn.Module):
    """GELU of a grouped convolution over time, 'same' padding, with a weight norm per tap."""

    kernel: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        shape = (self.kernel, features // self.groups, features)
        std = 2.0 / math.sqrt(self.kernel * features)
        direction = self.param("direction", nn.initializers.normal(std), shape)
        # As the weight norm starts out: the weight itself.
        norm = lambda weight: jnp.sqrt(jnp.square(weight).sum(axis=(1, 2)))
        magnitude = self.param("magnitude", lambda _: norm(direction))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        weight = direction * (magnitude / norm(direction))[:, None, None]
        x = grouped_convolution(x, weight.astype(self.dtype), self.groups)
        return nn.gelu(x + bias.astype(self.dtype)[None, None], approximate=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_convolution(x, weight, groups: int):
    """[B, T, D] convolved over time with weight [K, D / groups, D], 'same' padding.

    The gradient of the weight is a matrix product: XLA's own is some ten times slower on CPU.
    """
    kernel = weight.shape[0]
    return lax.conv_general_dilated(
        x,
        weight,
        window_strides=(1,),
        padding=[(kernel // 2, (kernel - 1) // 2)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def _grouped_convolution_forward(x, weight, groups):
    return grouped_convolution(x, weight, groups), (x, weight)


def _grouped_convolution_backward(groups, residuals, gradient):
    x, weight = residuals
    _, input_vjp = jax.vjp(lambda x: grouped_convolution.fun(x, weight, groups), x)
    return *input_vjp(gradient), _weight_gradient(x, gradient, weight.shape, groups)


grouped_convolution.defvjp(_grouped_convolution_forward, _grouped_convolution_backward)


def _weight_gradient(x, gradient, shape, groups):
    # Tap k = a + block * b of the gradient is sum over s of x[s + a] * gradient[s - block * b]:
    # one product of `block` shifted copies of x and kernel / block shifted copies of gradient.
    kernel, width, _ = shape
    batch, frames, _ = x.shape
    block = math.gcd(kernel, 16)
    rest = kernel - block
    x = jnp.pad(x, ((0, 0), (kernel // 2, (kernel - 1) // 2), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (rest, rest), (0, 0)))

    def shifted(array, offsets):
        array = array.reshape(batch, -1, groups, width).transpose(2, 0, 1, 3)
        copies = [array[:, :, offset : offset + frames + rest] for offset in offsets]
        copies = jnp.concatenate(copies, axis=-1)
        return copies.reshape(groups, batch * (frames + rest), len(offsets) * width)

    inputs = shifted(x, range(block))
    outputs = shifted(gradient, range(rest, -1, -block))
    product = jnp.einsum("gsi,gso->gio", inputs, outputs)
    product = product.reshape(groups, block, width, kernel // block, width)
    return product.transpose(3, 1, 2, 0, 4).reshape(shape)


class Block(nn.Module):
    """A Transformer layer: attention and feed-forward, normalized before or after.

    `seed` is that of layers.dropout; `skip`, a bool or None, leaves the layer out.
    """

    heads: int
    width: int
    pre_norm: bool
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, seed, skip):
        x = partition.split_rows(x)
        attention_norm = layers.LayerNorm(self.dtype, name="attention_norm")
        feed_forward_norm = layers.LayerNorm(self.dtype, name="feed_forward_norm")
        attention = Attention(self.heads, self.dropout, self.dtype, name="attention")
        feed_forward = FeedForward(self.width, self.dropout, self.dtype, name="feed_forward")
        if self.pre_norm:
            y = x + attention(attention_norm(x), mask, seed)
            y = y + feed_forward(feed_forward_norm(y), seed)
        else:
            y = attention_norm(x + attention(x, mask, seed))
            y = feed_forward_norm(y + feed_forward(y, seed))
        if skip is not None:
            y = jnp.where(skip, x, y)
        return partition.split_rows(y), None


class Attention(nn.Module):
    """Multi-head self-attention over valid positions (Vaswani et al. 2017)."""

    heads: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, seed):
        features = x.shape[-1]
        if features % self.heads:
            raise ValueError(f"{features} features cannot be split into {self.heads} heads")
        width = features // self.heads
        dense = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=_normal)
        projected = dense((3, self.heads, width), name="qkv")(x)
        query, key, value = (projected[:, :, i] for i in range(3))
        query = query * jnp.asarray(width**-0.5, self.dtype)
        scores = jnp.einsum("bthd,bshd->bhts", query, key).astype(jnp.float32)
        # Finite, so that a row without a single valid frame stays free of NaN.
        scores = jnp.where(mask[:, None, None, :], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = layers.dropout(weights, self.dropout, seed, site=0)
        context = jnp.einsum("bhts,bshd->bthd", weights, value)
        output = dense(features, axis=(-2, -1), name="project")(context)
        return layers.dropout(output, self.dropout, seed, site=1)


class FeedForward(nn.Module):
    """[B, T, D] to [B, T, D] through `width` hidden units and GELU."""

    width: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, seed):
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        hidden = nn.gelu(dense(self.width, name="expand")(x), approximate=False)
        x = dense(x.shape[-1], name="project")(hidden)
        return layers.dropout(x, self.dropout, seed, site=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_gradient(x, factor: float):
    return x


_scale_gradient.defvjp(
    lambda x, factor: (x, None), lambda factor, _, g: (g * jnp.asarray(factor, g.dtype),)
)
