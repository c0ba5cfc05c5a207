"""What a transducer has beside its encoder: predictors of the next label, and the joiner.

A predictor reads the labels that were said so far, the blank (0) before the first one, and is
stepwise (models/stepwise.py): it is called as `predictor(labels int32 [B, N]) -> [B, N, width]`,
and gives the same label by label.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speech_jax.errors import UserError
from speech_jax.ops import recurrent
from speech_jax.rules import Rules

# How the parameters lie on a mesh.
RULES: Rules = (
    (r"predictor/embedding", (None, "fsdp")),
    (r"predictor/(window|inputs)/kernel", ("fsdp", None)),
    (r"predictor/(window|inputs)/bias", ()),
    (r"predictor/recurrent", (None, "fsdp", None)),
    (r"joiner/\w+/kernel", ("fsdp", None)),
    (r"joiner/\w+/bias", ()),
    (r"simple/\w+/kernel", ("fsdp", None)),
    (r"simple/\w+/bias", ()),
)


class Stateless(nn.Module):
    """A predictor that knows the last `context` labels alone (Ghodsi et al. 2020)."""

    labels: int
    width: int
    context: int = 2
    dtype: Any = "float32"

    delay: ClassVar = 0

    def __call__(self, labels: jax.Array) -> jax.Array:
        return self.advance(self.start(len(labels)), labels)[0]

    @nn.nowrap
    def start(self, rows: int) -> jax.Array:
        """The labels before the first one: int32 [rows, context - 1]."""
        return jnp.zeros((rows, self.context - 1), jnp.int32)

    @nn.compact
    def advance(self, carry: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What follows each of labels int32 [B, N], and the carry."""
        count = labels.shape[1]
        ids = jnp.concatenate([carry, labels], axis=1)
        x = _embedded(self, ids)  # [B, N + context - 1, width]
        x = jnp.concatenate([x[:, i : i + count] for i in range(self.context)], axis=-1)
        x = nn.Dense(self.width, dtype=self.dtype, name="window")(x)
        return nn.relu(x), ids[:, count:]


class Recurrent(nn.Module):
    """A predictor that knows all labels so far: an LSTM (Graves 2012)."""

    labels: int
    width: int
    dtype: Any = "float32"

    delay: ClassVar = 0

    def __call__(self, labels: jax.Array) -> jax.Array:
        return self.advance(self.start(len(labels)), labels)[0]

    @nn.nowrap
    def start(self, rows: int) -> recurrent.States:
        """Output and memory of the LSTM, float32 [rows, width] each."""
        return (jnp.zeros((rows, self.width)),) * 2

    @nn.compact
    def advance(
        self, carry: recurrent.States, labels: jax.Array
    ) -> tuple[jax.Array, recurrent.States]:
        """What follows each of labels int32 [B, N], and the carry."""
        gates = 4 * self.width
        inputs = nn.Dense(gates, dtype=self.dtype, name="inputs")(_embedded(self, labels))
        orthogonal = nn.initializers.orthogonal()
        weight = self.param("recurrent", orthogonal, (1, self.width, gates)).astype(self.dtype)
        hidden, states = recurrent.recur(
            recurrent.CELLS["lstm"],
            inputs.swapaxes(0, 1)[:, None],  # [N, 1, B, 4 width]
            weight,
            jnp.ones(labels.shape[::-1], bool),
            tuple(state[None] for state in carry),
        )
        return hidden[:, 0].swapaxes(0, 1).astype(self.dtype), tuple(s[0] for s in states)


def _embedded(module: nn.Module, ids: jax.Array) -> jax.Array:
    shape = module.labels, module.width
    table = module.param("embedding", nn.initializers.normal(1.0), shape)
    return table.astype(module.dtype)[ids]


def make_predictor(name: str, labels: int, width: int, context: int, dtype: Any) -> nn.Module:
    """A predictor by its name, 'stateless' or 'recurrent'; `context` is for the first one."""
    if name == "stateless":
        return Stateless(labels, width, context, dtype)
    if name == "recurrent":
        return Recurrent(labels, width, dtype)
    raise UserError(f"config.task.predictor={name!r} must be 'stateless' or 'recurrent'")


class Joiner(nn.Module):
    """Logits of what is heard in a frame and of what was said before: tanh of a sum, and a layer.

    `outputs` are labels, and durations behind them.
    """

    width: int
    outputs: int
    dtype: Any = "float32"

    def setup(self) -> None:
        self.encoded = nn.Dense(self.width, dtype=self.dtype)
        self.predicted = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        self.logits = nn.Dense(self.outputs, dtype=self.dtype)

    def __call__(self, encoded: jax.Array, predicted: jax.Array) -> jax.Array:
        """Float32 [..., outputs] of projections [..., width] that broadcast to each other."""
        return self.logits(jnp.tanh(encoded + predicted)).astype(jnp.float32)


class Simple(nn.Module):
    """Logits of the two apart, whose sum stands in for the joiner's (ops/transducer.py)."""

    outputs: int
    dtype: Any = "float32"

    def setup(self) -> None:
        self.encoded = nn.Dense(self.outputs, dtype=self.dtype)
        self.predicted = nn.Dense(self.outputs, dtype=self.dtype)

    def __call__(self, hidden: jax.Array, said: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encoded(hidden), self.predicted(said)
