"""Conformer (Gulati et al. 2020): convolution-augmented Transformer encoder over log-mel frames."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.ops import masking, partition


class Conformer(nn.Module):
    """Log-mel [B, F, M] to hidden [B, F / 4 (or 8), features].

    Attributes:
      features: width of the residual stream (D).
      num_layers, heads, kernel: depth, attention heads, taps of the depthwise convolution.
      expansion: feed-forward width over D.
      subsampling: 4 or 8, input frames per output frame.
      subsampling_channels: channels of the strided convolutions; None is D.
      position: 'rotary' or 'relative' attention.
      conv_norm: 'layer' or 'batch' in the convolution module.
      dropout: on every residual branch and on attention weights.
      scan: compile one layer and loop over it (fast to compile) or unroll (faster to run on CPU).
      remat: recompute each layer's activations in the backward pass.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    features: int = 256
    num_layers: int = 16
    heads: int = 4
    kernel: int = 31
    expansion: int = 4
    subsampling: int = 4
    subsampling_channels: int | None = None
    position: str = "rotary"
    conv_norm: str = "layer"
    dropout: float = 0.1
    scan: bool = True
    remat: bool = False
    dtype: Any = "float32"

    frontend = "log_mel"
    # S, M, L: table 1 of the paper. Tiny is for two CPU cores.
    VARIANTS = {  # noqa: RUF012: linen modules are dataclasses, and this is not one of the fields
        "tiny": {
            "features": 128, "num_layers": 4, "kernel": 15, "subsampling_channels": 32,
            "scan": False,
        },
        "s": {"features": 144, "num_layers": 16, "heads": 4},
        "m": {"features": 256, "num_layers": 16, "heads": 4},
        "l": {"features": 512, "num_layers": 17, "heads": 8},
    }  # fmt: skip

    def output_lengths(self, lengths):
        """Hidden frames for `lengths` log-mel frames: each stride-2 convolution rounds up."""
        for _ in range(_halvings(self.subsampling)):
            lengths = (lengths + 1) // 2
        return lengths

    @nn.compact
    def __call__(self, inputs, lengths, deterministic: bool):
        x = Subsampling(
            self.features,
            self.subsampling_channels or self.features,
            _halvings(self.subsampling),
            dtype=self.dtype,
            name="subsampling",
        )(inputs, lengths)
        lengths = self.output_lengths(lengths)
        mask = masking.length_mask(lengths, x.shape[1])
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        block = (
            nn.remat(Block, prevent_cse=not self.scan, static_argnums=(3,)) if self.remat else Block
        )
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.num_layers,
            )
            x, _ = stack(**self._block_settings(), name="layers")(x, mask, deterministic)
        else:
            for layer in range(self.num_layers):
                x, _ = block(**self._block_settings(), name=f"layer_{layer}")(
                    x, mask, deterministic
                )
        return jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype)), lengths

    def _block_settings(self):
        names = ("heads", "kernel", "expansion", "position", "conv_norm", "dropout", "dtype")
        return {name: getattr(self, name) for name in names}


class Block(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm."""

    heads: int
    kernel: int
    expansion: int
    position: str
    conv_norm: str
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, deterministic: bool):
        width = self.expansion * x.shape[-1]
        common = {"dropout": self.dropout, "dtype": self.dtype}
        half = jnp.asarray(0.5, self.dtype)
        x = partition.split_rows(x)
        x = x + half * layers.FeedForward(width, name="feed_forward_1", **common)(x, deterministic)
        attention = layers.SelfAttention(self.heads, self.position, name="attention", **common)
        x = x + attention(x, mask, deterministic)
        convolution = layers.ConvolutionModule(
            self.kernel, self.conv_norm, name="convolution", **common
        )
        x = x + convolution(x, mask, deterministic)
        x = x + half * layers.FeedForward(width, name="feed_forward_2", **common)(x, deterministic)
        return partition.split_rows(layers.LayerNorm(self.dtype, name="norm")(x)), None


class Subsampling(nn.Module):
    """3x3 convolutions of stride 2 over time and frequency, then a projection to `features`.

    Frames past an utterance's length are zero before each convolution, as if it ended there.
    """

    features: int
    channels: int
    halvings: int
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x, lengths):
        x = x.astype(self.dtype)[:, :, :, None]
        for index in range(self.halvings):
            x = _zero_past(x, lengths)
            x = nn.Conv(
                self.channels,
                (3, 3),
                strides=(2, 2),
                padding=((1, 1), (1, 1)),
                dtype=self.dtype,
                name=f"convolution_{index}",
            )(x)
            x = partition.split_rows(nn.relu(x))
            lengths = (lengths + 1) // 2
        batch, frames = x.shape[:2]
        return nn.Dense(self.features, dtype=self.dtype, name="project")(
            x.reshape(batch, frames, -1)
        )


def _zero_past(x, lengths):
    mask = masking.length_mask(lengths, x.shape[1])[:, :, None, None]
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _halvings(subsampling: int) -> int:
    if subsampling not in (4, 8):
        raise UserError(f"subsampling must be 4 or 8, got {subsampling}")
    return subsampling.bit_length() - 1
