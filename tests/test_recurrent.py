"""The recurrent scan against a loop in numpy, a row and a direction at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.ops import recurrent

FRAMES, ROWS, HIDDEN = 7, 3, 4
LENGTHS = (7, 4, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(name, inputs, weight, lengths):
    """[T, N, B, H], straight from the definitions."""
    frames, directions, rows, _ = inputs.shape
    hidden = weight.shape[1]
    out = np.zeros((frames, directions, rows, hidden))
    for n in range(directions):
        for b in range(rows):
            h = c = np.zeros(hidden)
            valid = range(lengths[b])
            for t in reversed(valid) if n else valid:
                x, r = inputs[t, n, b], h @ weight[n]
                if name == "lstm":
                    i, f, g, o = np.split(x + r, 4)
                    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                    h = sigmoid(o) * np.tanh(c)
                elif name == "gru":
                    (x1, x2, x3), (r1, r2, r3) = np.split(x, 3), np.split(r, 3)
                    z = sigmoid(x2 + r2)
                    h = (1 - z) * np.tanh(x3 + sigmoid(x1 + r1) * r3) + z * h
                else:
                    h = np.clip(x + r, 0, 20)
                out[t, n, b] = h
    return out


@pytest.fixture(params=recurrent.CELLS, ids=str)
def case(request):
    cell = recurrent.CELLS[request.param]
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((FRAMES, 2, ROWS, cell.gates * HIDDEN)).astype(np.float32)
    weight = rng.standard_normal((2, HIDDEN, cell.gates * HIDDEN)).astype(np.float32)
    valid = np.arange(FRAMES)[:, None] < np.array(LENGTHS)[None]
    mix = rng.standard_normal((FRAMES, 2, ROWS, HIDDEN)) * valid[:, None, :, None]
    return request.param, cell, inputs, weight, valid, mix.astype(np.float32)


def test_states_are_those_of_the_definition(case):
    name, cell, inputs, weight, valid, _ = case
    ours = np.asarray(recurrent.recur(cell, inputs, jnp.asarray(weight), valid))
    expected = by_hand(name, inputs.astype(np.float64), weight.astype(np.float64), LENGTHS)
    at = np.broadcast_to(valid[:, None, :, None], ours.shape)
    np.testing.assert_allclose(ours[at], expected[at], atol=2e-5)


def test_gradient_is_that_of_differences(case):
    name, cell, inputs, weight, valid, mix = case

    def loss(inputs, weight):
        return (recurrent.recur(cell, inputs, weight, valid) * mix).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(inputs), jnp.asarray(weight))
    rng = np.random.default_rng(1)
    for k, gradient in enumerate(gradients):
        for _ in range(4):
            way = rng.standard_normal(gradient.shape) * 1e-5
            pair = [inputs.astype(np.float64), weight.astype(np.float64)]
            ends = []
            for sign in (1, -1):
                moved = list(pair)
                moved[k] = moved[k] + sign * way
                ends.append((by_hand(name, *moved, LENGTHS) * mix).sum())
            slope = (ends[0] - ends[1]) / 2
            np.testing.assert_allclose((gradient * way).sum(), slope, rtol=2e-3, atol=1e-8)


def test_what_is_not_valid_has_no_gradient(case):
    _, cell, inputs, weight, valid, mix = case
    gradient = jax.grad(lambda x: (recurrent.recur(cell, x, weight, valid) * mix).sum())(inputs)
    assert not np.any(np.where(valid[:, None, :, None], 0, gradient))
