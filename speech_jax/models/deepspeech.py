"""Deep Speech 2 (Amodei et al. 2016): convolutions, then recurrent layers, over log-mel frames.

Settings make the original Deep Speech of it (Hannun et al. 2014), and the form that hears only a
little of the future: one direction and a row convolution. That one runs piece by piece, too
(models/stepwise.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speech_jax import registry
from speech_jax.errors import UserError
from speech_jax.models import edges, layers
from speech_jax.models.conformer import halved
from speech_jax.models.edges import Carry, Edge, LogMelStepwise
from speech_jax.ops import convolution, partition, recurrent
from speech_jax.rules import Rules

CHUNK = 64  # frames of a recurrent layer that `remat` computes again at once


class DeepSpeech(LogMelStepwise):
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
      remat: compute the gates again in the backward pass, a chunk of frames at a time.
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
    remat: bool = False
    dtype: Any = "float32"

    listens: ClassVar = "log_mel"
    above: ClassVar = r"(lookahead|dense_after_\d+|norm)/.*"
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

    @property
    def delay(self) -> int:
        """Hidden frames that an output of `advance` lags behind its piece."""
        return list(self._edges().values())[-1].delay

    @nn.nowrap
    def start(self, rows: int, bands: int) -> Carry:
        """What is known before the first piece of log-mel frames of so many bands.

        Raises:
          UserError: of a Deep Speech that hears all of the future.
        """
        if self.bidirectional:
            raise UserError(
                "a Deep Speech of two directions hears all of an utterance before its first "
                "output: for pieces, train one with bidirectional=False"
            )
        carry, shape = {}, (bands,) if not self.conv_channels else (bands, 1)
        for name, edge in self._edges().items():
            shape = (self.width,) if name == "lookahead" else shape
            carry[name] = edge.start(rows, *shape, dtype=self.dtype)
            if self.conv_channels and name != "lookahead":
                shape = ((shape[0] + 1) // 2, self.conv_channels[len(carry) - 1])
        states = registry.lookup("cell", recurrent.CELLS, self.cell).states
        for i in range(self.num_layers):
            carry[f"layer_{i}"] = (jnp.zeros((rows, self.width), jnp.float32),) * states
        return carry

    def _edges(self) -> dict[str, Edge]:
        """Of the convolutions in their order, or of the context, and of the row convolution."""
        found, lag = {}, 0
        for i, size in enumerate(self.conv_kernels if self.conv_channels else ()):
            stride = 1 + (i < self._halvings())
            found[f"convolution_{i}"] = edge = Edge((size - 1) // 2, size // 2, stride, lag)
            lag = edge.delay
        if not self.conv_channels:
            found["context"] = edge = Edge(self.context, self.context, self.subsampling)
            lag = edge.delay
        if self.lookahead:
            found["lookahead"] = Edge(0, self.lookahead, 1, lag)
        return found

    @nn.compact
    def _run(
        self,
        inputs: jax.Array,
        valid: jax.Array,
        known: Carry,
        deterministic: bool,
        layers_too: bool,
    ) -> tuple[jax.Array, Carry]:
        carry = {}

        def surround(name: str, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
            edge = self._edges()[name]
            x, valid, carry[name] = edge.surround(x, valid, known.get(name))
            return x, valid

        hear = self._convolve if self.conv_channels else self._with_context
        x, valid = hear(inputs.astype(self.dtype), valid, deterministic, surround)
        mask = edges.mask_of(valid, x)
        seed = None
        if not deterministic:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        for i in range(self.dense_before):
            x = self._dense(x, f"dense_before_{i}", seed, site=i)
        each = [x]
        for i in range(self.num_layers):
            layer = Recurrent(
                self.width, self.cell, 1 + self.bidirectional, self.norm, self.adapter,
                CHUNK if self.remat else None, dtype=self.dtype, name=f"layer_{i}",
            )  # fmt: skip
            y, carry[layer.name] = layer(x, mask, deterministic, known.get(layer.name))
            y = layers.dropout(y, self.dropout, seed, site=100 + i)
            x = partition.split_rows(x + y if self.residual else y)
            each.append(x)
        if self.lookahead:
            x, valid = surround("lookahead", x, valid)
            x = Lookahead(self.lookahead, self.dtype, name="lookahead")(x)
            mask = edges.mask_of(valid, x)
        for i in range(self.dense_after):
            x = self._dense(x, f"dense_after_{i}", seed, site=200 + i)
        x = layers.LayerNorm(self.dtype, name="norm")(x)
        if layers_too:
            x, mask = jnp.stack([*each[:-1], x], axis=2), mask[:, :, None]
        return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype)), carry

    def _halvings(self) -> int:
        known = {1: 0, 2: 1, 4: 2, 8: 3}
        count = known.get(self.subsampling)
        if count is None or (self.conv_channels and count > len(self.conv_channels)):
            raise UserError(
                f"subsampling={self.subsampling} must be 1, 2, 4 or 8, and each halving takes one "
                f"of the {len(self.conv_channels)} convolutions"
            )
        return count

    def _convolve(
        self, x: jax.Array, valid: jax.Array, deterministic: bool, surround: Callable
    ) -> tuple[jax.Array, jax.Array]:
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
            x, valid = surround(f"convolution_{i}", x, valid)
            x = nn.Conv(
                channels,
                kernel,
                strides=(1 + (i < self._halvings()), 2),
                padding=((0, 0), ((kernel[1] - 1) // 2, kernel[1] // 2)),
                dtype=self.dtype,
                name=f"convolution_{i}",
            )(x)
            if self.norm == "batch":
                x = self._normalize_channels(x, edges.mask_of(valid, x), deterministic, f"norm_{i}")
            x = partition.split_rows(recurrent.clipped_relu(x))
        rows, frames = x.shape[:2]
        # The bias: see Subsampling in conformer.py.
        project = nn.Dense(
            self.width, dtype=self.dtype, bias_init=nn.initializers.normal(0.1), name="project"
        )
        return project(x.reshape(rows, frames, -1)), valid

    def _normalize_channels(
        self, x: jax.Array, mask: jax.Array, deterministic: bool, name: str
    ) -> jax.Array:
        """[B, T, M, C] by the mean and variance of each channel over valid frames and bands."""
        rows, frames, bands, channels = x.shape
        flat = x.reshape(rows, frames * bands, channels)
        norm = layers.MaskedBatchNorm(self.dtype, name=name)
        return norm(flat, jnp.repeat(mask, bands, axis=1), deterministic).reshape(x.shape)

    def _with_context(
        self, x: jax.Array, valid: jax.Array, deterministic: bool, surround: Callable
    ) -> tuple[jax.Array, jax.Array]:
        """[B, F, M] to [B, T, D]: a dense layer that sees each frame between its neighbours."""
        del deterministic
        x, valid = surround("context", x, valid)
        seen = convolution.windows(x, 2 * self.context + 1, self.subsampling)  # [B, T, span M]
        x = nn.Dense(self.width, dtype=self.dtype, name="context")(seen)
        return recurrent.clipped_relu(x), valid

    def _dense(self, x: jax.Array, name: str, seed: jax.Array | None, site: int) -> jax.Array:
        x = nn.Dense(self.width, dtype=self.dtype, name=name)(x)
        return layers.dropout(recurrent.clipped_relu(x), self.dropout, seed, site)


class Recurrent(nn.Module):
    """A norm and a recurrent layer: [B, T, D] to [B, T, width], the directions summed.

    With `chunk`, training computes the gates again, of so many frames at once. With the `states`
    before the first frame [B, width], of one direction, it returns those behind the last one, too.
    """

    width: int
    cell: str
    directions: int
    norm: str
    adapter: int
    chunk: int | None
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        deterministic: bool,
        states: recurrent.States | None = None,
    ) -> tuple[jax.Array, recurrent.States | None]:
        cell = registry.lookup("cell", recurrent.CELLS, self.cell)
        if self.norm == "batch":
            x = layers.MaskedBatchNorm(self.dtype, name="norm")(x, mask, deterministic)
        elif self.norm == "layer":
            x = layers.LayerNorm(self.dtype, name="norm")(x)
        else:
            raise UserError(f"norm must be 'layer' or 'batch', got {self.norm!r}")
        gates = cell.gates * self.width
        project = Projection(self.directions, gates, self.dtype, name="inputs")
        weight = self.param(
            "recurrent",
            nn.initializers.orthogonal(),
            (self.directions, self.width, gates),
        ).astype(self.dtype)
        if self.chunk and not deterministic:
            x = x.swapaxes(0, 1)  # [T, B, D]
            hidden = recurrent.recur_in_chunks(
                cell, x, *project.parameters(x.shape[-1]), weight, mask.T, self.chunk
            )
        else:
            inputs = project(x).transpose(1, 2, 0, 3)  # [T, N, B, G H]
            start = states and tuple(state[None] for state in states)
            hidden, end = recurrent.recur(cell, inputs, weight, mask.T, start)
            states = states and tuple(state[0] for state in end)
        x = hidden.sum(axis=1).swapaxes(0, 1).astype(self.dtype)  # of [T, N, B, H]
        x = layers.Adapter(self.adapter, self.dtype, name="adapter")(x) if self.adapter else x
        return x, states


class Projection(nn.Module):
    """[B, T, D] to what the gates of each direction get of it, [B, T, N, G H]."""

    directions: int
    gates: int
    dtype: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.parameters(x.shape[-1])
        product = jnp.matmul(x, kernel.reshape(1, x.shape[-1], -1))
        return product.reshape(*x.shape[:2], *bias.shape) + bias[None, None]

    @nn.compact
    def parameters(self, width: int) -> tuple[jax.Array, jax.Array]:
        """The kernel [D, N, G H] and the bias [N, G H]."""
        shape = (self.directions, self.gates)
        drawn = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        kernel = self.param("kernel", drawn, (width, *shape))
        bias = self.param("bias", nn.initializers.zeros, shape)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Lookahead(nn.Module):
    """A row convolution: each channel sees `frames` of the future (Wang et al. 2016).

    [B, T + frames, D] to [B, T, D].
    """

    frames: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        taps = nn.initializers.normal((self.frames + 1) ** -0.5)
        weight = self.param("kernel", taps, (self.frames + 1, x.shape[-1])).astype(self.dtype)
        seen = convolution.depthwise(x, weight, None, past=0)
        return lax.slice_in_dim(seen, 0, x.shape[1] - self.frames, axis=1)
