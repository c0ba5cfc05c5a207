"""CTC's value and gradient: ours against optax and, where installed, torch.

`python -m benchmarks.ctc [--json FILE] [--repeats N] [--dtype bfloat16]`. Times are medians of
interleaved runs of the jitted value and gradient with respect to the logits (for torch:
log-softmax, loss and backward); memory is the compiler's temporary bytes. Lengths vary between
0.7 and 1 of T and N.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.table import interleaved_medians, report
from speech_jax.ops import ctc

SHAPES = ((16, 400, 60, 1024), (16, 400, 150, 32), (8, 1500, 200, 1024), (32, 400, 100, 128))


def problem(B, T, N, K, dtype):
    """Random logits [B, T, K], frames [B], labels [B, N], label lengths [B]."""
    rng = np.random.default_rng(0)
    frames = rng.integers(int(0.7 * T), T + 1, B)
    lengths = rng.integers(int(0.7 * N), N + 1, B)
    frames[0], lengths[0] = T, N
    logits = jnp.asarray(rng.standard_normal((B, T, K)), dtype)
    integers = frames, rng.integers(1, K, (B, N)), lengths
    return logits, *(jnp.asarray(x, jnp.int32) for x in integers)


def optax_loss(logits, frames, labels, lengths):
    """optax.ctc_loss with our arguments, float32 [B]."""
    pad = lambda lengths, size: (jnp.arange(size) >= lengths[:, None]).astype(jnp.float32)
    paddings = pad(frames, logits.shape[1]), pad(lengths, labels.shape[1])
    return optax.ctc_loss(logits.astype(jnp.float32), paddings[0], labels, paddings[1])


def implementations():
    """Our implementations that run here, by name."""
    names = [n for n in ctc.IMPLEMENTATIONS if ctc.obstacle(n, jax.default_backend()) == ""]
    return {name: partial(ctc.ctc_loss, implementation=name) for name in names}


def torch_call(arrays):
    """A function that runs torch's loss and gradient on the same data, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return None
    logits, frames, labels, lengths = (torch.tensor(np.array(x, np.float64)) for x in arrays)
    logits = logits.float().to(device).requires_grad_()
    frames, labels, lengths = (x.long().to(device) for x in (frames, labels, lengths))

    def call():
        logits.grad = None
        log_probs = torch.log_softmax(logits, -1).transpose(0, 1)
        torch.nn.functional.ctc_loss(log_probs, labels, frames, lengths, reduction="sum").backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def compare(shape, dtype, repeats):
    """Rows of one shape, and the seconds of each contestant."""
    arrays = problem(*shape, dtype)
    calls, memory = {}, {}
    for name, loss in {**implementations(), "optax": optax_loss}.items():
        total = lambda *args, loss=loss: loss(*args).sum()
        compiled = jax.jit(jax.value_and_grad(total)).lower(*arrays).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*arrays))
    if (call := torch_call(arrays)) is not None:
        calls["torch"] = call
    seconds = interleaved_medians(calls, repeats=repeats)
    ours = min(seconds[name] for name in implementations())
    rows = [
        {
            "B,T,N,K": ",".join(map(str, shape)),
            "implementation": name,
            "ms": 1e3 * seconds[name],
            "ratio to ours": seconds[name] / ours,
            "temporary MB": memory[name] / 1e6 if name in memory else None,
            "of optax": memory[name] / memory["optax"] if name in memory else None,
        }
        for name in seconds
    ]
    return rows, {name: time / ours for name, time in seconds.items()}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    rows, ratios = [], []
    for shape in SHAPES:
        found, ratio = compare(shape, jnp.dtype(args.dtype), args.repeats)
        rows += found
        ratios.append(ratio)
    for name in ratios[0]:
        mean = float(np.exp(np.mean([np.log(ratio[name]) for ratio in ratios])))
        rows.append(dict.fromkeys(rows[0]) | {
            "B,T,N,K": "geometric mean", "implementation": name, "ratio to ours": mean,
        })  # fmt: skip
    report(rows, file=args.json)


if __name__ == "__main__":
    main()
