"""Deep Speech 2 (Amodei et al. 2016): convolutions, then recurrent layers, over log-mel frames.

Settings make the original Deep Speech of it (Hannun et al. 2014), and the form that hears only a
little of the future: one direction and a row convolution.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speech_jax import registry
from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.models.conformer import halved
from speech_jax.ops import convolution, masking, partition, recurrent
from speech_jax.rules import Rules


class DeepSpeech(nn.Module):
    """Log-mel [B, F, M] to hidden [B, F / subsampling, width].

    Attributes:
      width: hidden units of a direction, and of the residual stream (D); directions are summed.
      num_layers: recurrent layers.
      cell: 'lstm', 'gru' or 'simple' (a clipped ReLU).
      bidirectional: or forward in time alone.
      lookahead: frames of the future that a row convolution after the recurrent layers hears; 0:
        none.
      subsampling: log-mel frames per hidden frame: 1, 2, 4 or 8.
      conv_channels, conv_kernels, conv_bands: of the 2-D convolutions; a kernel sees so many frames
        and mel bands. The first ones halve the frames, and each halves the bands. Without any, see
        `context`.
      context: frames on either side that the first dense layer sees, where there are no
        convolutions.
      dense_before, dense_after: dense layers with clipped ReLU around the recurrent ones.
      norm: 'layer' or 'batch', of the inputs of each recurrent layer (and of the convolutions, if
        'batch').
      residual: whether a recurrent layer is added to its input.
      dropout: of the outputs of each layer.
      adapter: hidden units of the adapter behind each recurrent layer (layers.Adapter); 0: none.
      dtype: what the products run in; states and parameters are float32.
    """

    width: int = 1024
    num_layers: int = 5
    cell: str = "lstm"
    bidirectional: bool = True
    lookahead: int = 0
    subsampling: int = 4
    conv_channels: Sequence[int] = (32, 32)
    conv_kernels: Sequence[int] = (11, 11)
    conv_bands: Sequence[int] = (41, 21)
    context: int = 0
    dense_before: int = 0
    dense_after: int = 0
    norm: str = "layer"
    residual: bool = True
    dropout: float = 0.1
    adapter: int = 0
    dtype: Any = "float32"

    listens: ClassVar = "log_mel"
    rules: ClassVar[Rules] = (
        (r"convolution_\d/kernel", (None, None, None, "fsdp")),
        (r"(context|project)/kernel", ("fsdp", None)),
        (r"(convolution_\d|context|project)/bias", ()),
        (r"dense_\w+/kernel", ("fsdp", None)),
        (r"dense_\w+/bias", ()),
        (r"layer_\d+/inputs/kernel", ("fsdp", None, None)),
        (r"layer_\d+/inputs/bias", ()),
        (r"layer_\d+/recurrent", (None, "fsdp", None)),
        (r"adapter/(down|up)/(kernel|bias)", ()),
        (r"lookahead/(kernel|bias)", ()),
        (r"(norm|norm_\d)/(layer/)?(scale|bias)", ()),
    )
    VARIANTS: ClassVar = {
        "tiny": {
            "width": 192, "num_layers": 3, "conv_kernels": (3, 3), "conv_bands": (3, 3),
            "dropout": 0.2,
        },
        "original": {
            "width": 2048, "num_layers": 1, "cell": "simple", "subsampling": 2,
            "conv_channels": (), "conv_kernels": (), "conv_bands": (), "context": 9,
            "dense_before": 2, "dense_after": 1, "residual": False, "dropout": 0.05,
        },
        "ds2": {"subsampling": 2, "norm": "batch", "residual": False},
        "ds2_lookahead": {
            "subsampling": 2, "norm": "batch", "residual": False, "cell": "gru",
            "bidirectional": False, "lookahead": 20,
        },
    }  # fmt: skip

    def output_lengths(self, lengths: int | jax.Array) -> int | jax.Array:
        """Hidden frames for `lengths` log-mel frames: each halving rounds up."""
        return halved(lengths, self._halvings())

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool, layers_too: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        if self.conv_channels:
            x = self._convolve(inputs.astype(self.dtype), lengths, deterministic)
        else:
            x = self._with_context(inputs.astype(self.dtype), lengths)
        lengths = self.output_lengths(lengths)
        mask = masking.length_mask(lengths, x.shape[1])
        seed = None
        if not deterministic:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        for i in range(self.dense_before):
            x = self._dense(x, f"dense_before_{i}", seed, site=i)
        each = [x]
        for i in range(self.num_layers):
            layer = Recurrent(
                self.width, self.cell, 1 + self.bidirectional, self.norm, self.adapter,
                dtype=self.dtype, name=f"layer_{i}",
            )  # fmt: skip
            y = layers.dropout(layer(x, mask, deterministic), self.dropout, seed, site=100 + i)
            x = partition.split_rows(x + y if self.residual else y)
            each.append(x)
        if self.lookahead:
            x = jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype))
            x = Lookahead(self.lookahead, self.dtype, name="lookahead")(x)
        for i in range(self.dense_after):
            x = self._dense(x, f"dense_after_{i}", seed, site=200 + i)
        x = layers.LayerNorm(self.dtype, name="norm")(x)
        if layers_too:
            x, mask = jnp.stack([*each[:-1], x], axis=2), mask[:, :, None]
        return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype)), lengths

    def _halvings(self) -> int:
        known = {1: 0, 2: 1, 4: 2, 8: 3}
        count = known.get(self.subsampling)
        if count is None or (self.conv_channels and count > len(self.conv_channels)):
            raise UserError(
                f"subsampling={self.subsampling} must be 1, 2, 4 or 8, and each halving takes one "
                f"of the {len(self.conv_channels)} convolutions"
            )
        return count

    def _convolve(self, x: jax.Array, lengths: jax.Array, deterministic: bool) -> jax.Array:
        """[B, F, M] through the 2-D convolutions and a projection to [B, T, D].

        Frames past an utterance's length are zero before each, as if it ended there.
        """
        kernels = list(zip(self.conv_kernels, self.conv_bands, strict=False))
        if not len(kernels) == len(self.conv_channels) == len(self.conv_kernels):
            raise UserError(
                f"conv_channels={tuple(self.conv_channels)}, conv_kernels="
                f"{tuple(self.conv_kernels)} and conv_bands={tuple(self.conv_bands)} must be of "
                "equal length"
            )
        x = x[..., None]  # [B, F, M, 1]
        for i, (channels, kernel) in enumerate(zip(self.conv_channels, kernels, strict=True)):
            mask = masking.length_mask(lengths, x.shape[1])
            x = jnp.where(mask[:, :, None, None], x, jnp.zeros((), x.dtype))
            halve = i < self._halvings()
            x = nn.Conv(
                channels,
                kernel,
                strides=(1 + halve, 2),
                padding=[((size - 1) // 2, size // 2) for size in kernel],
                dtype=self.dtype,
                name=f"convolution_{i}",
            )(x)
            lengths = (lengths + 1) // 2 if halve else lengths
            if self.norm == "batch":
                x = self._normalize_channels(x, lengths, deterministic, f"norm_{i}")
            x = partition.split_rows(recurrent.clipped_relu(x))
        rows, frames = x.shape[:2]
        # The bias: see Subsampling in conformer.py.
        project = nn.Dense(
            self.width, dtype=self.dtype, bias_init=nn.initializers.normal(0.1), name="project"
        )
        return project(x.reshape(rows, frames, -1))

    def _normalize_channels(
        self, x: jax.Array, lengths: jax.Array, deterministic: bool, name: str
    ) -> jax.Array:
        """[B, T, M, C] by the mean and variance of each channel over valid frames and bands."""
        rows, frames, bands, channels = x.shape
        mask = jnp.repeat(masking.length_mask(lengths, frames), bands, axis=1)
        flat = x.reshape(rows, frames * bands, channels)
        norm = layers.MaskedBatchNorm(self.dtype, name=name)
        return norm(flat, mask, deterministic).reshape(x.shape)

    def _with_context(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, F, M] to [B, T, D]: a dense layer that sees each frame between its neighbours."""
        mask = masking.length_mask(lengths, x.shape[1])
        x = jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype))
        span, stride = 2 * self.context + 1, self.subsampling
        frames = self.output_lengths(x.shape[1])
        # So many that the windows of all frames are whole.
        after = max(0, (frames - 1) * stride + self.context + 1 - x.shape[1])
        x = jnp.pad(x, ((0, 0), (self.context, after), (0, 0)))
        seen = convolution.windows(x, span, stride)[:, :frames]  # [B, T, span M]
        x = nn.Dense(self.width, dtype=self.dtype, name="context")(seen)
        return recurrent.clipped_relu(x)

    def _dense(self, x: jax.Array, name: str, seed: jax.Array | None, site: int) -> jax.Array:
        x = nn.Dense(self.width, dtype=self.dtype, name=name)(x)
        return layers.dropout(recurrent.clipped_relu(x), self.dropout, seed, site)


class Recurrent(nn.Module):
    """A norm and a recurrent layer: [B, T, D] to [B, T, width], the directions summed."""

    width: int
    cell: str
    directions: int
    norm: str
    adapter: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        cell = registry.lookup("cell", recurrent.CELLS, self.cell)
        if self.norm == "batch":
            x = layers.MaskedBatchNorm(self.dtype, name="norm")(x, mask, deterministic)
        elif self.norm == "layer":
            x = layers.LayerNorm(self.dtype, name="norm")(x)
        else:
            raise UserError(f"norm must be 'layer' or 'batch', got {self.norm!r}")
        gates = cell.gates * self.width
        inputs = nn.DenseGeneral((self.directions, gates), dtype=self.dtype, name="inputs")(x)
        weight = self.param(
            "recurrent",
            nn.initializers.orthogonal(),
            (self.directions, self.width, gates),
        ).astype(self.dtype)
        inputs = inputs.transpose(1, 2, 0, 3)  # [T, N, B, G H]
        hidden = recurrent.recur(cell, inputs, weight, mask.T)  # [T, N, B, H]
        x = hidden.sum(axis=1).swapaxes(0, 1).astype(self.dtype)
        return layers.Adapter(self.adapter, self.dtype, name="adapter")(x) if self.adapter else x


class Lookahead(nn.Module):
    """A row convolution: each channel sees `frames` of the future (Wang et al. 2016)."""

    frames: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        taps = nn.initializers.normal((self.frames + 1) ** -0.5)
        weight = self.param("kernel", taps, (self.frames + 1, x.shape[-1])).astype(self.dtype)
        return convolution.depthwise(x, weight, None, past=0)
