"""Recurrent layers over ragged rows, in one or both directions at once.

The products with the inputs are made before the loop over time, those with the state's gradient
after it, each as one large product; only the product with the state itself is in the loop. For the
gradient, the states are kept and the gates are computed again.

Shapes: T frames, N directions, B rows, G gates, H hidden units.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

States = tuple[jax.Array, ...]  # each [N, B, H]; the first one is the output


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell: what happens to each hidden unit on its own.

    Attributes:
      gates: how many gates there are, G.
      states: how many arrays the state has.
      step: (inputs [.., G H], recurrent [.., G H], states) to the new states, where `inputs` and
        `recurrent` are the products with the input and with the last output.
      additive: whether `inputs` and `recurrent` only ever occur as their sum.
    """

    gates: int
    states: int
    step: Callable[[jax.Array, jax.Array, States], States]
    additive: bool


def _lstm(inputs: jax.Array, recurrent: jax.Array, states: States) -> States:
    enter, forget, new, leave = jnp.split(inputs + recurrent, 4, axis=-1)
    memory = jax.nn.sigmoid(forget) * states[1] + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(leave) * jnp.tanh(memory), memory


def _gru(inputs: jax.Array, recurrent: jax.Array, states: States) -> States:
    # The reset gate acts on the product, not on the state, so that one product is enough.
    reset_in, update_in, new_in = jnp.split(inputs, 3, axis=-1)
    reset, update, new = jnp.split(recurrent, 3, axis=-1)
    new = jnp.tanh(new_in + jax.nn.sigmoid(reset_in + reset) * new)
    update = jax.nn.sigmoid(update_in + update)
    return ((1.0 - update) * new + update * states[0],)


def _simple(inputs: jax.Array, recurrent: jax.Array, states: States) -> States:
    del states
    return (clipped_relu(inputs + recurrent),)


CELLS = {
    "lstm": Cell(4, 2, _lstm, additive=True),  # Hochreiter & Schmidhuber 1997, with forget gates
    "gru": Cell(3, 1, _gru, additive=False),  # Cho et al. 2014
    "simple": Cell(1, 1, _simple, additive=True),  # Hannun et al. 2014
}


def clipped_relu(x: jax.Array) -> jax.Array:
    """Between 0 and 20 (Hannun et al. 2014)."""
    return jnp.clip(x, 0.0, 20.0)


def recur(
    cell: Cell,
    inputs: jax.Array,
    weight: jax.Array,
    valid: jax.Array,
    start: States | None = None,
) -> tuple[jax.Array, States]:
    """The outputs of a layer [T, N, B, H], float32, and its states behind the last frame.

    The second direction runs from the end. A row's state begins with its first valid frame, from
    whichever end, and stands still where a frame is not valid, so that padding changes nothing.

    Args:
      inputs: [T, N, B, G H], the products of the layer's inputs, biases included; both directions
        in the order of time.
      weight: [N, H, G H].
      valid: bool [T, B].
      start: the states before the first frame; None: zeros.
    """
    directions, rows = inputs.shape[1:3]
    start = _nothing(cell, directions, rows, weight) if start is None else start
    outputs, end = _recur(cell, _in_turn(inputs), weight, _directed(valid, directions), start)
    return _in_time(outputs), end


def recur_in_chunks(
    cell: Cell,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    weight: jax.Array,
    valid: jax.Array,
    size: int,
) -> jax.Array:
    """The outputs of `recur` where memory is short.

    Of the gates, which are most of what a layer needs, there are only ever those of `size` frames:
    the gradient makes them again from the inputs and the states between chunks.

    Args:
      inputs: [T, B, D], of the layer; kernel [D, N, G H] and bias [N, G H] are of their products.
      weight, valid: as of `recur`.
    """
    frames, rows, _ = inputs.shape
    directions, count = kernel.shape[1], -(-frames // size)

    def chunks(x):  # [T, N, B, ...] to [count, size, N, B, ...]
        x = jnp.pad(x, ((0, count * size - frames), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(count, size, *x.shape[1:])

    @jax.checkpoint
    def one(states: States, chunk: tuple) -> tuple[States, jax.Array]:
        x, inside = chunk
        products = _product(x, tuple(kernel.swapaxes(0, 1)))
        products = products + bias.astype(jnp.float32)[None, :, None]
        outputs, states = _recur(cell, products.astype(x.dtype), weight, inside, states)
        return states, outputs

    each = _in_turn(jnp.repeat(inputs[:, None], directions, axis=1))
    start = _nothing(cell, directions, rows, weight)
    _, outputs = lax.scan(one, start, (chunks(each), chunks(_directed(valid, directions))))
    return _in_time(outputs.reshape(count * size, *outputs.shape[2:])[:frames])


def _nothing(cell: Cell, directions: int, rows: int, weight: jax.Array) -> States:
    return (jnp.zeros((directions, rows, weight.shape[1]), jnp.float32),) * cell.states


def _in_turn(x: jax.Array) -> jax.Array:
    """The second direction [T, 1, ...] from the end of time."""
    return jnp.concatenate([x[:, :1], jnp.flip(x[:, 1:], axis=0)], axis=1)


_in_time = _in_turn  # it is its own inverse


def _directed(valid: jax.Array, directions: int) -> jax.Array:
    """Bool [T, B] to [T, N, B, 1]."""
    return _in_turn(jnp.repeat(valid[:, None, :, None], directions, axis=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    cell: Cell, inputs: jax.Array, weight: jax.Array, valid: jax.Array, start: States
) -> tuple[jax.Array, States]:
    end, after = _forward(cell, inputs, weight, valid, start)
    return after[0], end


def _forward(
    cell: Cell, inputs: jax.Array, weight: jax.Array, valid: jax.Array, start: States
) -> tuple[States, States]:
    """The states after the last frame [N, B, H], and those after every frame [T, N, B, H]."""
    matrices = tuple(weight)  # here, since XLA would copy them out of `weight` at every frame

    def advance(states: States, frame: tuple) -> tuple[States, States]:
        product, inside = frame
        new = cell.step(product.astype(jnp.float32), _product(states[0], matrices), states)
        new = tuple(jnp.where(inside, *pair) for pair in zip(new, states, strict=True))
        return new, new

    return lax.scan(advance, start, (inputs, valid))


def _product(hidden: jax.Array, matrices: Sequence[jax.Array]) -> jax.Array:
    """[.., N, B, H] by N times [H, G H] to float32 [.., N, B, G H]; one product a direction.

    XLA has no fast product of a batch of matrices on CPU.
    """
    hidden = hidden.astype(matrices[0].dtype)
    return jnp.stack(
        [
            jnp.matmul(hidden[..., n, :, :], matrix, preferred_element_type=jnp.float32)
            for n, matrix in enumerate(matrices)
        ],
        axis=-3,
    )


def _keep(
    cell: Cell, inputs: jax.Array, weight: jax.Array, valid: jax.Array, start: States
) -> tuple:
    end, after = _forward(cell, inputs, weight, valid, start)
    before = tuple(jnp.concatenate([s[None], a[:-1]]) for s, a in zip(start, after, strict=True))
    return (after[0], end), (inputs, weight, valid, before)


def _backward(cell: Cell, kept: tuple, gradient: tuple[jax.Array, States]) -> tuple:
    inputs, weight, valid, before = kept
    gradient, end_gradient = gradient
    recurrent = _product(before[0], tuple(weight))  # [T, N, B, G H]
    transposed = tuple(weight.transpose(0, 2, 1))

    def retreat(later: States, frame: tuple) -> tuple[States, tuple]:
        output_gradient, product, state_product, inside, states = frame
        later = (later[0] + output_gradient, *later[1:])
        _, pull = jax.vjp(cell.step, product.astype(jnp.float32), state_product, states)
        inputs_gradient, recurrent_gradient, earlier = pull(
            tuple(jnp.where(inside, g, 0.0) for g in later)
        )
        earlier = (earlier[0] + _product(recurrent_gradient, transposed), *earlier[1:])
        earlier = tuple(e + jnp.where(inside, 0.0, g) for e, g in zip(earlier, later, strict=True))
        own = (recurrent_gradient,) if cell.additive else (recurrent_gradient, inputs_gradient)
        return earlier, tuple(g.astype(inputs.dtype) for g in own)

    frames = (gradient, inputs, recurrent, valid, before)
    start_gradient, gradients = lax.scan(retreat, end_gradient, frames, reverse=True)
    weight_gradient = jnp.stack(
        [
            jnp.einsum(
                "tbh,tbg->hg",
                before[0][:, n].astype(inputs.dtype),
                gradients[0][:, n],
                preferred_element_type=jnp.float32,
            )
            for n in range(weight.shape[0])
        ]
    )
    return gradients[-1], weight_gradient.astype(weight.dtype), None, start_gradient


_recur.defvjp(_keep, _backward)
