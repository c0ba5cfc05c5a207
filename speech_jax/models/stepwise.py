"""What runs a piece at a time: a streaming encoder, a decoder of text, a model of the waveform.

A linen module is stepwise that has beside its call on whole sequences

    delay                     int; output i of all pieces, one after another, is output i - delay
                              of the whole: the first `delay` outputs are of nothing
    start(rows)               the carry before the first piece, a pytree of arrays [rows, ...] and
                              of scalars that all rows share, such as the time; a decoder's takes
                              what it reads besides:
                              start(rows, memory, memory_lengths, steps)
    advance(carry, piece)     (outputs, the next carry, of the same shapes and dtypes)

Both are called through `apply`, as they may need parameters:

    carry = module.apply({"params": params}, rows, method="start")
    outputs, carry = module.apply({"params": params}, carry, piece, method="advance")

A piece is an array [B, N, ...], or a pytree of such arrays (samples and what they are conditioned
on; frames and which of them are valid), and N is static. Outputs are [B, N, ...]; or, where s
inputs make an output, [B, N / s, ...], and N is a multiple of s. Zeros (False, label 0) follow the
last input while the last `delay` outputs come; a module for which the end is something else than
silence has what is valid in its piece. What a row gets does not depend on its neighbours, and the
carry of a row is all that is known of it: rows can be taken, put in another order, or started anew.

tests/stepwise.py has the suite.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.ops import convolution

Pytree = Any


class Stepwise(Protocol):
    """The protocol above, for annotations; `apply` and the rest are of linen."""

    delay: int

    def start(self, rows: int, *reads: Any) -> Pytree: ...

    def advance(self, carry: Pytree, piece: Pytree) -> tuple[Pytree, Pytree]: ...

    def apply(self, variables: Pytree, *args: Any, **kwargs: Any) -> Any: ...


def run(module: Stepwise, variables: Pytree, carry: Pytree, inputs: Pytree, size: int) -> Pytree:
    """What all pieces of `size` give, in one loop: the outputs of the whole [B, ceil(T / s), ...].

    Args:
      variables: {"params": ...}; carry: from `start`.
      inputs: an array [B, T, ...] or a pytree of them.
      size: inputs of a piece, a multiple of the s of the module.
    """
    length = jax.tree.leaves(inputs)[0].shape[1]

    def outputs_of(pieces: int, carry: Pytree) -> Pytree:
        def split(x):  # [B, T, ...] to [pieces, B, size, ...]
            x = convolution.at_length(x, pieces * size)
            return jnp.moveaxis(x.reshape(len(x), pieces, size, *x.shape[2:]), 1, 0)

        def one(carry, piece):
            outputs, carry = module.apply(variables, carry, piece, method="advance")
            return carry, outputs

        _, outputs = lax.scan(one, carry, jax.tree.map(split, inputs))
        return outputs

    shape = jax.tree.leaves(jax.eval_shape(lambda: outputs_of(1, carry)))[0].shape
    each = size // shape[2]  # inputs of an output
    whole = -(-length // each)
    outputs = outputs_of(-(-(length + module.delay * each) // size), carry)

    def join(x):  # [pieces, B, n, ...] to [B, whole, ...]
        x = jnp.moveaxis(x, 0, 1)
        x = x.reshape(len(x), -1, *x.shape[3:])
        return lax.slice_in_dim(x, module.delay, module.delay + whole, axis=1)

    return jax.tree.map(join, outputs)
