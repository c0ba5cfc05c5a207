"""A bidirectional recurrent layer over ragged rows: ours against torch.nn.LSTM and GRU, in turns.

  python -m benchmarks.encoders [--json FILE]

Forward and backward in float32, gradients of inputs and all weights; rows between half of the
frames and all of them. The peer runs over packed sequences, which is how it leaves padding out.
The extra `parity` installs it.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import table
from speech_jax.ops import recurrent

# Cell, rows, frames, hidden units (and inputs).
SHAPES = (
    ("lstm", 4, 400, 192), ("lstm", 8, 200, 256), ("lstm", 16, 200, 512),
    ("gru", 4, 400, 192), ("gru", 8, 200, 256), ("gru", 16, 200, 512),
)  # fmt: skip


def ours(name: str, inputs: np.ndarray, lengths: np.ndarray, hidden: int) -> Callable[[], None]:
    """A step of inputs [B, T, D]."""
    cell = recurrent.CELLS[name]
    rng = np.random.default_rng(1)
    shapes = (2, inputs.shape[2], cell.gates * hidden), (2, hidden, cell.gates * hidden)
    weights = [jnp.asarray(0.05 * rng.standard_normal(s), jnp.float32) for s in shapes]
    valid = jnp.asarray(np.arange(inputs.shape[1])[:, None] < lengths[None])

    @jax.jit
    def step(inputs, projection, weight):
        def loss(inputs, projection, weight):
            projected = jnp.einsum("btd,ndg->tnbg", inputs, projection)
            outputs = recurrent.recur(cell, projected, weight, valid)
            return jnp.square(outputs * valid[:, None, :, None]).sum()

        return jax.grad(loss, (0, 1, 2))(inputs, projection, weight)

    held = jnp.asarray(inputs)
    return lambda: jax.block_until_ready(step(held, *weights))


def peer(name: str, inputs: np.ndarray, lengths: np.ndarray, hidden: int) -> Callable[[], None]:
    """The same by PyTorch."""
    import torch
    from torch.nn.utils import rnn

    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[name](
        inputs.shape[2], hidden, bidirectional=True, batch_first=True
    )
    held = torch.tensor(inputs, requires_grad=True)

    def step():
        packed = rnn.pack_padded_sequence(held, torch.tensor(lengths), batch_first=True)
        outputs, _ = rnn.pad_packed_sequence(layer(packed)[0], batch_first=True)
        outputs.square().sum().backward()

    return step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for name, batch, frames, hidden in SHAPES:
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((batch, frames, hidden)).astype(np.float32)
        lengths = np.linspace(frames, frames // 2, batch).astype(int)
        given = (name, inputs, lengths, hidden)
        seconds = table.interleaved_medians({"ours": ours(*given), "peer": peer(*given)}, repeats=7)
        rows.append(
            {
                "cell": name,
                "rows, frames, hidden": f"{batch}, {frames}, {hidden}",
                "ours, ms": 1e3 * seconds["ours"],
                "torch, ms": 1e3 * seconds["peer"],
                "times as fast": seconds["peer"] / seconds["ours"],
            }
        )
    table.report(rows, file=args.json)


if __name__ == "__main__":
    main()
