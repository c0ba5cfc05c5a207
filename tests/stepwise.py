"""The suite of what is stepwise (speech_jax/models/stepwise.py): tests call `check`."""

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.models import stepwise


def check(module, params, inputs, whole, *, state=None, reads=None, sizes=(1, 3, 8), atol=1e-5):
    """Pieces of any size give what the whole gives, and rows do not see each other.

    Args:
      inputs: an array [B, T, ...] or a pytree of them, B >= 2, of which each position is valid.
      whole: what the module gives of them at once, an array or a pytree of [B, T / s, ...].
      state: the other variables of the module, such as batch statistics.
      reads: what `start` takes beside the number of rows, arrays [B, ...] or plain values.
      sizes: of the pieces, multiples of s; not all of them should divide T, and twice the
        first one is T at most.
      atol: by the dtype that the module computes in.
    """
    variables, reads = {"params": params, **(state or {})}, tuple(reads or ())
    rows = jax.tree.leaves(inputs)[0].shape[0]

    def start():
        return module.apply(variables, rows, *reads, method="start")

    def close(ours, theirs):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=atol)

    for size in sizes:
        pieces = jax.jit(
            lambda inputs, size=size: stepwise.run(module, variables, start(), inputs, size)
        )
        outputs = pieces(inputs)
        close(outputs, whole)
        assert all(np.abs(np.asarray(x, np.float32)).max() > 0 for x in jax.tree.leaves(outputs))

    # The last size once more. The first row, among others that are another's.
    changed = jax.tree.map(lambda x: x.at[1:].set(jnp.flip(x[1:], axis=1)), inputs)
    outputs = pieces(changed)
    close(*(jax.tree.map(lambda x: x[:1], tree) for tree in (outputs, whole)))
    moved = [
        np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))[1:].max()
        for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(whole), strict=True)
    ]
    assert max(moved) > atol  # or the others have not been changed

    # And rows that are taken, of inputs and of the carry, go on as they would have.
    carry = start()
    order = jnp.arange(rows)[::-1]

    def take(tree):
        return jax.tree.map(lambda x: jnp.take(x, order, axis=0) if x.ndim else x, tree)

    @jax.jit
    def advance(carry, piece):
        return module.apply(variables, carry, piece, method="advance")

    size = sizes[0]
    first, second = (
        jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], inputs) for i in range(2)
    )
    _, carry = advance(carry, first)
    outputs, after = advance(carry, second)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), carry, after)
    assert all(jax.tree.leaves(same)), "the carry changes its shapes"
    close(advance(take(carry), take(second))[0], take(outputs))
