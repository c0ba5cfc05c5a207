"""The parts that encoders share: attention, feed-forward, convolution, masked norms.

Parameters are float32; `dtype` is what the arithmetic runs in, and `seed` is for dropout (None
outside of training). Normalizations and softmax are float32. The last projection of every residual
branch starts at zero, so that a fresh network is the identity on its residual stream and trains
with a short warm-up (Fixup, Zhang et al. 2019).

Shapes: B rows, T frames, D the width of the residual stream, H heads of W = D / H.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.ops import attention, convolution, masking
from speech_jax.rules import Rules

Dtype = Any

# How the parameters of the modules below lie on a mesh, by the names that the encoders give them:
# (regular expression for the end of a path, mesh axes of the last dimensions). See rules.py and
# training/sharding.py.
TRANSFORMER_RULES: Rules = (
    (r"layer/(scale|bias)", ()),
    (r"attention/qkv?/kernel", ("fsdp", None, "tensor", None)),
    (r"attention/qkv?/bias", (None, "tensor", None)),
    (r"attention/project/kernel", ("tensor", None, "fsdp")),
    (r"feed_forward(_\d)?/expand/kernel", ("fsdp", "tensor")),
    (r"feed_forward(_\d)?/expand/bias", ("tensor",)),
    (r"feed_forward(_\d)?/project/kernel", ("tensor", "fsdp")),
    (r"(attention|feed_forward(_\d)?)/project/bias", ()),
)
RULES: Rules = (
    *TRANSFORMER_RULES,
    (r"attention/(position|value)/kernel", ("fsdp", "tensor", None)),
    (r"attention/(content_bias|position_bias|value/bias)", ("tensor", None)),
    (r"convolution/gate/kernel", ("fsdp", None, "tensor")),
    (r"convolution/gate/bias", (None, "tensor")),
    (r"convolution/depthwise/kernel", (None, "tensor")),
    (r"convolution/depthwise/bias", ("tensor",)),
    (r"convolution/middle_norm/(scale|bias)", ()),
    (r"convolution/project/kernel", ("tensor", "fsdp")),
    (r"convolution/project/bias", ()),
    (r"adapter/(down|up)/(kernel|bias)", ()),
)


def _gelu(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * (0.5 * (1 + jax.lax.erf(wide * np.float32(0.5**0.5))))).astype(x.dtype)


# For their gradients only the input is kept, not the values between, which a loop over layers would
# write and read again for each layer: an eighth of a step of wav2vec2 Base on CPU. GELU is exact;
# JAX's own has erfc, which takes longer.
swish = jax.checkpoint(nn.swish, prevent_cse=False)
gelu = jax.checkpoint(_gelu)


class FeedForward(nn.Module):
    """[B, T, D] to [B, T, D] through `hidden` units and swish."""

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    site: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, seed: jax.Array | None) -> jax.Array:
        width = x.shape[-1]
        x = LayerNorm(self.dtype, name="norm")(x)
        x = nn.Dense(self.hidden, dtype=self.dtype, name="expand")(x)  # [B, T, hidden]
        x = dropout(swish(x), self.dropout, seed, self.site)
        zeros = nn.initializers.zeros
        x = nn.Dense(width, dtype=self.dtype, kernel_init=zeros, name="project")(x)  # [B, T, D]
        return dropout(x, self.dropout, seed, self.site + 1)


class Adapter(nn.Module):
    """x [B, T, D] and a change of it through a few hidden units (Houlsby et al. 2019).

    It begins as the identity: beneath it, a pretrained layer is what it was. Fine-tuning then
    leaves the layers as they are and learns the adapters alone (experiment.frozen).
    """

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = swish(nn.Dense(self.hidden, dtype=self.dtype, name="down")(x))  # [B, T, hidden]
        zeros = nn.initializers.zeros
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=zeros, name="up")(y)


def dropout(x: jax.Array, rate: float, seed: jax.Array | None, site: int = 0) -> jax.Array:
    """Zeroes each number with probability `rate` and scales the others (Srivastava et al. 2014).

    `seed` is uint32 [2], or None outside of training; `site` tells apart the dropouts that share
    it. The mask is a hash of a number's place, so it is the same on any mesh. It takes a few
    integer operations a number and next to nothing to compile, which JAX's generator does not.
    """
    if seed is None or not rate:
        return x
    place = jnp.full(x.shape, seed[0])
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = _mix(place ^ _mix(seed[1] + jnp.uint32(site)))
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def dropping(rate: float, seed: jax.Array | None, site: int) -> Callable | None:
    """`dropout` as a function of its array alone; None where it would do nothing."""
    if seed is None or not rate:
        return None
    return functools.partial(dropout, rate=rate, seed=seed, site=site)


def weight_dropout(dropout: float, attention_dropout: float | None) -> float:
    """The rate at which weights of attention are dropped, by the settings of an encoder."""
    return dropout if attention_dropout is None else attention_dropout


def _mix(x: jax.Array) -> jax.Array:
    """A hash of uint32: an input bit flips half of the output bits (lowbias32, C. Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class LayerNorm(nn.Module):
    """Layer normalization with float32 statistics, returning `dtype`."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="layer")(
            x.astype(jnp.float32)
        ).astype(self.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over valid positions, aware of relative position.

    `position` is 'rotary' (RoPE, Su et al. 2021), 'rotary_input' (the input of the projections to
    queries and keys is rotated, instead of queries and keys: scores then depend on absolute
    position too; as in fairseq's Conformer) or 'relative' (Transformer-XL, Dai et al. 2019, as in
    the Conformer paper). The mask is bool [B, T], True where a key may be attended to.
    `weight_dropout` is of the attention's weights, `dropout` of its output.
    """

    heads: int
    position: str = "rotary"
    dropout: float = 0.0
    weight_dropout: float = 0.0
    dtype: Dtype = jnp.float32
    site: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, seed: jax.Array | None) -> jax.Array:
        width = x.shape[-1]
        if width % self.heads or (width // self.heads) % 2:
            raise UserError(
                f"a width of {width} cannot be split into {self.heads} heads of even width"
            )
        each = width // self.heads
        x = LayerNorm(self.dtype, name="norm")(x)
        dense = functools.partial(nn.DenseGeneral, dtype=self.dtype)
        # Queries, keys and values are [B, T, H, W].
        if self.position == "rotary_input":
            rotated = rotate(x.reshape(*x.shape[:2], self.heads, each)).reshape(x.shape)
            query, key = _apart(dense((2, self.heads, each), name="qk")(rotated))
            value = dense((self.heads, each), name="value")(x)
        else:
            query, key, value = _apart(dense((3, self.heads, each), name="qkv")(x))
        last = (value, mask, dropping(self.weight_dropout, seed, self.site), np.sqrt(each))
        if self.position == "rotary":
            context = attention.attend(rotate(query), rotate(key), *last)
        elif self.position == "rotary_input":
            context = attention.attend(query, key, *last)
        elif self.position == "relative":
            context = attention.weigh(self._relative_scores(query, key), *last)
        else:
            raise UserError(
                f"position must be 'rotary', 'rotary_input' or 'relative', got {self.position!r}"
            )
        zeros = nn.initializers.zeros
        output = dense(width, axis=(-2, -1), kernel_init=zeros, name="project")(context)
        return dropout(output, self.dropout, seed, self.site + 1)

    def _relative_scores(self, query: jax.Array, key: jax.Array) -> jax.Array:
        frames, heads, width = query.shape[1:]
        content_bias = self.param("content_bias", nn.initializers.zeros, (heads, width))
        position_bias = self.param("position_bias", nn.initializers.zeros, (heads, width))
        table = sinusoids(frames - 1, 2 * frames - 1, -1, heads * width)  # [2T - 1, D]
        table = jnp.asarray(table, self.dtype)
        position = nn.DenseGeneral(
            (heads, width), use_bias=False, dtype=self.dtype, name="position"
        )(table)
        query_content = query + content_bias.astype(self.dtype)[None, None]
        query_position = query + position_bias.astype(self.dtype)[None, None]
        by_distance = jnp.einsum("bthd,rhd->bhtr", query_position, position)  # [B, H, T, 2T - 1]
        content = jnp.einsum("bthd,bshd->bhts", query_content, key)
        return content + _distance_to_key(by_distance)


def _apart(x: jax.Array) -> list[jax.Array]:
    """The N arrays [B, T, ...] of one [B, T, N, ...].

    By a split, whose gradient is one array of theirs; that of N slices is a sum of N with zeros.
    """
    return [one.squeeze(2) for one in jnp.split(x, x.shape[2], axis=2)]


def _distance_to_key(scores: jax.Array) -> jax.Array:
    """[B, H, T, 2T-1] indexed by distance T-1..-(T-1) to [B, H, T, T] indexed by key."""
    batch, heads, frames, distances = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    skewed = padded.reshape(batch, heads, distances + 1, frames)[:, :, 1:]
    return skewed.reshape(batch, heads, frames, distances)[..., :frames]


def sinusoids(first: int | jax.Array, count: int, step: int, width: int) -> np.ndarray | jax.Array:
    """Sinusoidal embeddings float32 [count, width] of positions first, first + step, ...

    (Vaswani et al. 2017). Where `count` is a symbol of an export, or `first` is known in a program
    alone, they are computed there.
    """
    rates = np.exp(-np.log(10_000.0) * np.arange(0, width, 2) / width)
    if not jax.export.is_symbolic_dim(count) and isinstance(first, int):
        angles = (first + step * np.arange(count))[:, None] * rates[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    # Products of int32 wrap around as angles do, in units of 2**-32 of a turn: a float32 product
    # would be off by 1e-4 after a minute.
    unit = 2 * np.pi / 2**32
    whole = np.round(rates / unit)
    rest = (rates - whole * unit).astype(np.float32)
    positions = jnp.asarray(first, jnp.int32) + step * jnp.arange(count, dtype=jnp.int32)
    turned = positions[:, None] * whole.astype(np.int32)[None, :]
    angles = turned.astype(jnp.float32) * np.float32(unit)
    angles = angles + positions.astype(jnp.float32)[:, None] * rest[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotate(x: jax.Array, first: int | jax.Array = 0) -> jax.Array:
    """Rotary position embedding of [B, T, H, W], whose positions begin with `first`."""
    frames, width = x.shape[1], x.shape[3]
    table = sinusoids(first, frames, 1, width)[None, :, None]  # [1, T, 1, W]
    sin, cos = (
        jnp.asarray(half, x.dtype) for half in (table[..., : width // 2], table[..., width // 2 :])
    )
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class ConvolutionModule(nn.Module):
    """The Conformer's convolution: gate, depthwise over time, norm, swish (Gulati et al. 2020).

    `norm` is 'layer', or 'batch' with statistics over the valid frames of the global batch, which
    are remembered with `momentum`. `use_bias` says whether the convolutions have a bias.
    """

    kernel: int
    norm: str = "layer"
    momentum: float = 0.99
    use_bias: bool = True
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    site: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, seed: jax.Array | None) -> jax.Array:
        width = x.shape[-1]
        x = LayerNorm(self.dtype, name="norm")(x)
        bias = {"use_bias": self.use_bias, "dtype": self.dtype}
        gated = nn.DenseGeneral((2, width), name="gate", **bias)(x)  # [B, T, 2, D]
        x, gate = _apart(gated)
        x = x * nn.sigmoid(gate)
        x = jnp.where(mask[:, :, None], x, jnp.zeros((), self.dtype))
        x = DepthwiseConvolution(self.kernel, name="depthwise", **bias)(x)
        if self.norm == "batch":
            batch_norm = MaskedBatchNorm(self.dtype, self.momentum, name="middle_norm")
            x = batch_norm(x, mask, seed is None)
        elif self.norm == "layer":
            x = LayerNorm(self.dtype, name="middle_norm")(x)
        else:
            raise UserError(f"conv_norm must be 'layer' or 'batch', got {self.norm!r}")
        zeros = nn.initializers.zeros
        x = nn.Dense(width, kernel_init=zeros, name="project", **bias)(swish(x))
        return dropout(x, self.dropout, seed, self.site)


class DepthwiseConvolution(nn.Module):
    """Each of D channels of [B, T, D] convolved over time on its own, 'same' padding."""

    kernel: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        taps = nn.initializers.normal(self.kernel**-0.5)
        weight = self.param("kernel", taps, (self.kernel, width)).astype(self.dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)
        return convolution.depthwise(x, weight, bias)


class MaskedBatchNorm(nn.Module):
    """Batch normalization over the valid frames of the global batch (Ioffe & Szegedy 2015).

    Under a mesh the sums are global: the mean is over the frames of all devices. The running
    statistics are in the 'batch_stats' collection. Those that are in the collection 'held' too
    stand still, and are what is normalized by in training as well (training/groups.py).
    """

    dtype: Dtype = jnp.float32
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, (width,), jnp.float32)
        if deterministic or self.has_variable("held", "mean"):
            mean, variance = running_mean.value, running_variance.value
        else:
            mean, variance = masking.masked_mean_and_variance(x, mask[:, :, None], axes=(0, 1))
            mean, variance = mean.reshape(width), variance.reshape(width)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_variance, variance)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        factor = scale * jax.lax.rsqrt(variance + 1e-5)
        offset = bias - mean * factor
        return (x.astype(jnp.float32) * factor[None, None] + offset[None, None]).astype(self.dtype)


def scan_layers(
    layer: nn.Module, count: int, keep: bool, x: jax.Array, mask: jax.Array, *own: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `count` layers [B, T, D] whose parameters are stacked in those of one module.

    It is compiled once. `own` is stacked too: what each layer gets beside the mask. Returns the
    output, and where they are to be kept, those of all layers [count, B, T, D].
    """

    def one(layer: nn.Module, x: jax.Array, mask: jax.Array, *own: jax.Array | None) -> tuple:
        x, _ = layer(x, mask, *own)
        return x, (x if keep else None)

    run = nn.scan(
        one,
        variable_axes={"params": 0, "batch_stats": 0, "held": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, *[0] * len(own)),
        length=count,
    )
    return run(layer, x, mask, *own)
