"""WaveNet (van den Oord et al. 2016) as an encoder: dilated gated convolutions over log-mel.

A causal one runs piece by piece, too (models/stepwise.py).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speech_jax.errors import UserError
from speech_jax.models import edges, layers
from speech_jax.models.conformer import HALVING, Subsampling, halved, halvings
from speech_jax.models.edges import Carry, Edge, Kept, LogMelStepwise
from speech_jax.ops import convolution, partition
from speech_jax.rules import Rules

# How the layers, and what is behind them, lie on a mesh.
RULES: Rules = (
    (r"layer_\d+/gate", (None, "fsdp", None)),
    (r"layer_\d+/gate_bias", ()),
    (r"layer_\d+/(project|skip)/kernel", ("fsdp", None)),
    (r"layer_\d+/(project|skip)/bias", ()),
    (r"output/kernel", ("fsdp", None)),
    (r"output/bias", ()),
    (r"norm/layer/(scale|bias)", ()),
)


class WaveNet(LogMelStepwise):
    """Log-mel [B, F, M] to hidden [B, F / subsampling, width], the sum of what all layers skip.

    A norm before each layer, which the paper lacks, spares a slow warm-up.

    Attributes:
      width: of the residual stream, of the gates and of what is skipped (D).
      num_layers: of all; the dilations are 1, 2, 4, ...
      cycle: layers after which the dilations start again.
      kernel: taps of a dilated convolution.
      causal: frames hear no later ones, beyond what one frame is made of.
      subsampling: 4 or 8, log-mel frames per hidden frame.
      subsampling_channels: channels of the strided convolutions; None is D.
      dropout: of what each layer adds.
      adapter: hidden units of the adapter of what each layer adds (layers.Adapter); 0: none.
      remat: recompute each layer's activations in the backward pass.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    width: int = 256
    num_layers: int = 15
    cycle: int = 5
    kernel: int = 7
    causal: bool = False
    subsampling: int = 4
    subsampling_channels: int | None = None
    dropout: float = 0.1
    adapter: int = 0
    remat: bool = False
    dtype: Any = "float32"

    delay = 0
    listens: ClassVar = "log_mel"
    above: ClassVar = "(output|norm)/.*"
    rules: ClassVar[Rules] = (
        (r"subsampling/convolution_\d/kernel", (None, None, None, "fsdp")),
        (r"subsampling/project/kernel", ("fsdp", None)),
        (r"subsampling/(convolution_\d|project)/bias", ()),
        *RULES,
        (r"adapter/(down|up)/(kernel|bias)", ()),
    )
    # Large: as many channels as the paper's model of speech has gates.
    VARIANTS: ClassVar = {
        "tiny": {
            "width": 96, "num_layers": 8, "cycle": 4, "kernel": 5, "subsampling_channels": 32,
        },
        "base": {"width": 256},
        "large": {"width": 512, "subsampling_channels": 256},
    }  # fmt: skip

    def output_lengths(self, lengths: int | jax.Array) -> int | jax.Array:
        """Hidden frames for `lengths` log-mel frames: each stride-2 convolution rounds up."""
        return halved(lengths, halvings(self.subsampling))

    @nn.nowrap
    def start(self, rows: int, bands: int) -> Carry:
        """What is known before the first piece of log-mel frames of so many bands.

        Raises:
          UserError: of a WaveNet that hears the future.
        """
        if not self.causal:
            raise UserError(
                "a WaveNet that is not causal hears frames of the future: for pieces, train one "
                "with causal=True"
            )
        shape, halves = (bands, 1), []
        for _ in range(halvings(self.subsampling)):
            halves.append(HALVING.start(rows, *shape, dtype=self.dtype))
            shape = (shape[0] + 1) // 2, self.subsampling_channels or self.width
        each = [reach(self.kernel, dilation, causal=True) for dilation in self.dilations]
        return {"subsampling": halves} | {
            f"layer_{i}": edge.start(rows, self.width, dtype=self.dtype)
            for i, edge in enumerate(each)
        }

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of each layer, in hidden frames."""
        return tuple(2 ** (i % self.cycle) for i in range(self.num_layers))

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
        x, valid, carry["subsampling"] = Subsampling(
            self.width,
            self.subsampling_channels or self.width,
            halvings(self.subsampling),
            dtype=self.dtype,
            name="subsampling",
        )(inputs, valid, known.get("subsampling"))
        seed = None
        if not deterministic:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        total, each = jnp.zeros_like(x), [x]
        make = nn.remat(Layer) if self.remat else Layer
        for i, dilation in enumerate(self.dilations):
            name = f"layer_{i}"
            layer = make(
                self.width, self.kernel, dilation, self.causal, self.dtype, self.adapter, name=name
            )
            change, skipped, carry[name] = layer(x, valid, None, known.get(name))
            x = partition.split_rows(x + layers.dropout(change, self.dropout, seed, site=i))
            total = total + skipped
            each.append(x)
        # With the residual stream, to which the last layer would else add for nothing.
        x = nn.Dense(self.width, dtype=self.dtype, name="output")(nn.relu(total + x))
        x = layers.LayerNorm(self.dtype, name="norm")(x)
        mask = edges.mask_of(valid, x)
        if layers_too:
            x, mask = jnp.stack([*each[:-1], x], axis=2), mask[:, :, None]
        return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype)), carry


def reach(kernel: int, dilation: int, causal: bool) -> Edge:
    """What the taps of a dilated convolution see."""
    past = (kernel - 1) * dilation
    return Edge(past, 0) if causal else Edge(past // 2, past - past // 2)


class Layer(nn.Module):
    """A gated dilated convolution: what it adds to [B, T, D], and what it skips to the end.

    `valid` and `kept` are as of edges.Edge.surround, and what is to keep is returned behind the
    rest. `condition` [B, T, 2 D] is added to the gates.
    """

    width: int
    kernel: int
    dilation: int
    causal: bool
    dtype: Any
    adapter: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array | None,
        condition: jax.Array | None = None,
        kept: Kept | None = None,
    ) -> tuple[jax.Array, jax.Array, Kept | None]:
        x = layers.LayerNorm(self.dtype, name="norm")(x)
        edge = reach(self.kernel, self.dilation, self.causal)
        x, _, kept = edge.surround(x, valid, kept)
        shape = (self.kernel, x.shape[-1], 2 * self.width)
        weight = self.param("gate", nn.initializers.lecun_normal(in_axis=(0, 1)), shape)
        bias = self.param("gate_bias", nn.initializers.zeros, (2 * self.width,))
        gates = convolution.dilated(x, weight.astype(self.dtype), self.dilation)
        gates = gates + bias.astype(self.dtype)[None, None]
        if condition is not None:
            gates = gates + condition
        value, gate = jnp.split(gates, 2, axis=-1)
        hidden = jnp.tanh(value) * nn.sigmoid(gate)
        project, skip = (
            nn.Dense(self.width, dtype=self.dtype, name=name) for name in ("project", "skip")
        )
        change = project(hidden)
        if self.adapter:
            change = layers.Adapter(self.adapter, self.dtype, name="adapter")(change)
        return change, skip(hidden), kept
