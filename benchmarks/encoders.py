"""The encoders side by side, and their recurrent layers beside PyTorch's.

  python -m benchmarks.encoders [--json FILE]
  python -m benchmarks.encoders training [--rows=4] [--seconds=3.75] [--runs=WORKDIR,...]

The first is of bidirectional layers over ragged rows, of which the shortest is half of the longest:
forward and backward in float32, gradients of inputs and all weights, in turns. The peer,
torch.nn.LSTM or GRU, runs over packed sequences, which is how it leaves padding out; by one thread
and by all of them, of which the better counts. The extra `parity` installs it.

The second is of whole updates, in turns, on full rows of noise: of the recognizers of
configs/spoken_digits.py, one for each encoder. The time to the first update is that of building the
model, tracing, compiling and running it, without the cache of compiled programs; `temporary` is the
memory that the compiled step needs beside state and batch. WER is what the trainings --runs reached
on `dev`, each in the row of its encoder.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else torch stands still beside other work

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import table
from benchmarks.hardware.build import Model
from configs import spoken_digits
from speech_jax.ops import recurrent

# Cell, rows, frames, hidden units (and inputs).
SHAPES = (
    ("lstm", 4, 400, 192), ("lstm", 8, 200, 256), ("lstm", 16, 200, 512),
    ("gru", 4, 400, 192), ("gru", 8, 200, 256), ("gru", 16, 200, 512),
)  # fmt: skip
VOCABULARY = 27


# ---- Recurrent layers --------------------------------------------------------------------------


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
            outputs, _ = recurrent.recur(cell, projected, weight, valid)
            return jnp.square(outputs * valid[:, None, :, None]).sum()

        return jax.grad(loss, (0, 1, 2))(inputs, projection, weight)

    held = jnp.asarray(inputs)
    return lambda: jax.block_until_ready(step(held, *weights))


def peer(
    name: str, inputs: np.ndarray, lengths: np.ndarray, hidden: int, threads: int
) -> Callable[[], None]:
    """The same by PyTorch, with so many threads."""
    import torch
    from torch.nn.utils import rnn

    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[name](
        inputs.shape[2], hidden, bidirectional=True, batch_first=True
    )
    held = torch.tensor(inputs, requires_grad=True)

    def step():
        torch.set_num_threads(threads)
        packed = rnn.pack_padded_sequence(held, torch.tensor(lengths), batch_first=True)
        outputs, _ = rnn.pad_packed_sequence(layer(packed)[0], batch_first=True)
        outputs.square().sum().backward()

    return step


def recurrent_layers(repeats: int) -> list[dict]:
    """The rows of the table."""
    rows = []
    for name, batch, frames, hidden in SHAPES:
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((batch, frames, hidden)).astype(np.float32)
        lengths = np.linspace(frames, frames // 2, batch).astype(int)
        given = (name, inputs, lengths, hidden)
        calls = {"ours": ours(*given)}
        calls |= {f"torch {n}": peer(*given, n) for n in {1, os.cpu_count()}}
        seconds = table.interleaved_medians(calls, repeats=repeats, warmup=1)
        mine = seconds.pop("ours")
        rows.append(
            {
                "cell": name,
                "rows, frames, hidden": f"{batch}, {frames}, {hidden}",
                "ours, ms": 1e3 * mine,
                "torch, 1 thread, ms": 1e3 * seconds["torch 1"],
                "torch, all, ms": 1e3 * seconds[f"torch {os.cpu_count()}"],
                "times as fast": min(seconds.values()) / mine,
            }
        )
    return rows


# ---- Whole updates -----------------------------------------------------------------------------


def error_rates(folders: Iterable[str]) -> dict[str, float]:
    """The WER in percent of each run, by the name of its encoder."""
    found = {}
    for folder in folders:
        results = json.loads((pathlib.Path(folder) / "results.json").read_text())
        found[results["config"]["model"]["name"]] = 100 * results["splits"]["dev"]["wer"]
    return found


def training(batch: int, seconds: float, repeats: int, runs: Iterable[str]) -> list[dict]:
    """The rows of the table."""
    rows, steps, errors = [], {}, error_rates(runs)
    for name in spoken_digits.ENCODERS:
        config = spoken_digits.get_config(name)
        start = time.perf_counter()
        model = Model(config, VOCABULARY)
        model.start()
        steps[name] = step = model.trace(batch, seconds, labels_per_second=3).compile()
        step.load()
        step()
        rows.append(
            {
                "encoder": name,
                "WER, %": errors.get(name),
                "M parameters": model.parameters / 1e6,
                "first update, s": time.perf_counter() - start,
                "temporary MiB": step.temporary / 2**20,
                "GFLOP": step.flops / 1e9,
            }
        )
    medians = table.interleaved_medians(steps, repeats=repeats)
    for row in rows:
        update = medians[row["encoder"]]
        row |= {"ms": 1e3 * update, "audio s/s": batch * seconds / update}
    return rows


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("recurrent", "training"), default="recurrent")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.75)
    parser.add_argument("--runs", default="", help="workdirs joined by commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    flags = parser.parse_args()
    if flags.what == "training":
        rows = training(
            flags.rows, flags.seconds, flags.repeats, filter(None, flags.runs.split(","))
        )
    else:
        rows = recurrent_layers(flags.repeats)
    table.report(rows, file=flags.json)


if __name__ == "__main__":
    main()
