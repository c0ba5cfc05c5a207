"""The transducer's value and gradient: ours against a plain scan in JAX and warprnnt-numba.

`python -m benchmarks.transducer [--json FILE] [--repeats N]`. All begin with the projections of
frames and labels, and end with their gradients and those of the joiner's layer. Contestants:

  ours            ops/transducer.py: the joint in pieces, occupancies by diagonals
  band 5          the same where a simple joint says, 5 positions a frame, its own loss included
  plain           the joint whole, log-softmax, a scan over frames, autodiff
  map             the joint by lax.map over frames, as others spare its memory, then our lattice
  warprnnt-numba  where it and torch are installed, on CPU; the joint whole, by torch

Times are medians of interleaved runs, memory is the compiler's temporary bytes; of the last shape
nothing but the memory is measured. Lengths vary between 0.7 and 1 of T and U.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.table import interleaved_medians, report
from speech_jax.ops import transducer, transducer_band
from speech_jax.ops.transducer import Joint

SHAPES = ((4, 100, 30, 128, 128), (8, 100, 40, 128, 256), (4, 300, 150, 128, 32))
LARGE = (16, 200, 100, 128, 1024)
SPAN = 5


def problem(B, T, U, D, K):
    """Projections [B, T, D] and [B, U + 1, D], the layer, labels, frames, label lengths."""
    rng = np.random.default_rng(0)
    frames = rng.integers(int(0.7 * T), T + 1, B)
    lengths = rng.integers(int(0.7 * U), U + 1, B)
    frames[0], lengths[0] = T, U
    shapes = (B, T, D), (B, U + 1, D), (D, K), (K,)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    integers = rng.integers(1, K, (B, U)), frames, lengths
    return *arrays, *(jnp.asarray(x, jnp.int32) for x in integers)


def ours(encoded, predicted, kernel, bias, labels, frames, lengths):
    """The sum of our losses."""
    joint = transducer.joint_log_probs(encoded, predicted, kernel, bias, labels)
    return transducer.transducer_loss(joint, frames, lengths).sum()


def banded(encoded, predicted, kernel, bias, labels, frames, lengths):
    """The same in a band, and the loss of the simple joint, by the same layer."""
    simple = transducer.simple_joint(encoded @ kernel, predicted @ kernel, labels)
    each, occupancy = transducer.loss_and_occupancy(simple, frames, lengths)
    starts = transducer_band.band(occupancy, frames, lengths, SPAN)
    joint = transducer.joint_log_probs(
        encoded, predicted, kernel, bias, labels, starts=starts, span=SPAN
    )
    return (each + transducer_band.banded_loss(joint, starts, frames, lengths)).sum()


def _picked(logits, labels):
    """Log probabilities of the blank and of what follows, of logits [..., U + 1, K]."""
    log_probs = jax.nn.log_softmax(logits)
    ids = jnp.broadcast_to(jnp.pad(labels, ((0, 0), (0, 1))), logits.shape[:-1])
    return log_probs[..., 0], jnp.take_along_axis(log_probs, ids[..., None], -1)[..., 0]


def plain(encoded, predicted, kernel, bias, labels, frames, lengths):
    """The joint whole; alpha frame by frame, along the labels by a sum of exponentials."""
    logits = jnp.tanh(encoded[:, :, None] + predicted[:, None]) @ kernel + bias
    blank, label = _picked(logits.swapaxes(0, 1), labels)  # [T, B, U + 1]
    before = jnp.pad(jnp.cumsum(label, -1)[..., :-1], ((0, 0), (0, 0), (1, 0)))

    def step(carry, frame):
        entering, total = carry
        t, blank, before = frame
        alpha = before + lax.cumlogsumexp(entering - before, axis=1)
        end = jnp.take_along_axis(alpha + blank, lengths[:, None], 1)[:, 0]
        return (alpha + blank, jnp.where(t == frames - 1, end, total)), None

    entering = jnp.full(blank.shape[1:], -1e30).at[:, 0].set(0.0)
    carry = entering, jnp.zeros(len(frames))
    (_, total), _ = lax.scan(step, carry, (jnp.arange(len(blank)), blank, before))
    return -total.sum()


def mapped(encoded, predicted, kernel, bias, labels, frames, lengths):
    """The joint frame by frame, whose softmax is kept for the gradient nevertheless."""
    frame = lambda x: _picked(jnp.tanh(x[:, None] + predicted) @ kernel + bias, labels)
    blank, label = (x.swapaxes(0, 1) for x in lax.map(frame, encoded.swapaxes(0, 1)))
    return transducer.transducer_loss(Joint(blank, label), frames, lengths).sum()


CONTESTANTS = {"ours": ours, f"band {SPAN}": banded, "plain": plain, "map": mapped}


def numba_call(arrays):
    """A function that runs warprnnt-numba and torch on the same data, or None without them."""
    try:
        import torch
        from warprnnt_numba import RNNTLossNumba
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None
    floats = [torch.tensor(np.asarray(x)).requires_grad_() for x in arrays[:4]]
    encoded, predicted, kernel, bias = floats
    integers = [torch.tensor(np.asarray(x)) for x in arrays[4:]]
    loss = RNNTLossNumba(blank=0, reduction="sum")

    def call():
        for one in floats:
            one.grad = None
        logits = torch.tanh(encoded[:, :, None] + predicted[:, None]) @ kernel + bias
        value = loss(logits.log_softmax(-1), *integers)
        value.sum().backward()
        return float(value.detach().sum())

    return call


def compiled(loss, arrays):
    """Its value and gradients, compiled."""
    return jax.jit(jax.value_and_grad(loss, argnums=range(4))).lower(*arrays).compile()


def compare(shape, repeats):
    """Rows of one shape; without `repeats` of the memory alone."""
    arrays = problem(*shape)
    programs = {name: compiled(loss, arrays) for name, loss in CONTESTANTS.items()}
    memory = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
    calls = {
        name: lambda program=program: jax.block_until_ready(program(*arrays))
        for name, program in programs.items()
    }
    seconds = dict.fromkeys(programs)
    if repeats:
        values = {name: float(call()[0]) for name, call in calls.items() if "band" not in name}
        if (call := numba_call(arrays)) is not None:
            calls["warprnnt-numba"], values["warprnnt-numba"] = call, call()
        np.testing.assert_allclose(list(values.values()), values["plain"], rtol=1e-4)
        seconds = interleaved_medians(calls, repeats=repeats, warmup=1)
    return [
        {
            "B,T,U,D,K": ",".join(map(str, shape)),
            "implementation": name,
            "ms": 1e3 * seconds[name] if repeats else None,
            "ratio to ours": seconds[name] / seconds["ours"] if repeats else None,
            "temporary MB": memory[name] / 1e6 if name in memory else None,
            "of plain": memory[name] / memory["plain"] if name in memory else None,
        }
        for name in seconds
    ]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    rows = [row for shape in SHAPES for row in compare(shape, args.repeats)]
    report(rows + compare(LARGE, 0), file=args.json)


if __name__ == "__main__":
    main()
