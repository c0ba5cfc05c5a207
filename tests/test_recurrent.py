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
    ours, _ = recurrent.recur(cell, inputs, jnp.asarray(weight), valid)
    expected = by_hand(name, inputs.astype(np.float64), weight.astype(np.float64), LENGTHS)
    at = np.broadcast_to(valid[:, None, :, None], ours.shape)
    np.testing.assert_allclose(np.asarray(ours)[at], expected[at], atol=2e-5)


def test_gradient_is_that_of_differences(case):
    name, cell, inputs, weight, valid, mix = case

    def loss(inputs, weight):
        return (recurrent.recur(cell, inputs, weight, valid)[0] * mix).sum()

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
    gradient = jax.grad(lambda x: (recurrent.recur(cell, x, weight, valid)[0] * mix).sum())(inputs)
    assert not np.any(np.where(valid[:, None, :, None], 0, gradient))


def test_what_is_cut_goes_on_where_it_was_with_its_gradient(case):
    """The states behind the first frames are a start, and learn from the frames that follow."""
    _, cell, inputs, weight, valid, mix = case
    inputs, mix = inputs[:, :1], mix[:, :1]  # the direction that begins at the beginning

    def whole(inputs, weight):
        return (recurrent.recur(cell, inputs, weight, valid)[0] * mix).sum()

    def cut(inputs, weight):
        total, states = 0.0, None
        for part in (slice(0, 3), slice(3, FRAMES)):
            given = inputs[part], weight, valid[part], states
            outputs, states = recurrent.recur(cell, *given)
            total = total + (outputs * mix[part]).sum()
        return total

    given = jnp.asarray(inputs), jnp.asarray(weight[:1])
    found, expected = (jax.value_and_grad(f, (0, 1))(*given) for f in (cut, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize("size", [3, 20])
def test_in_chunks_it_is_the_same_with_its_gradient(case, size):
    _, cell, _, weight, valid, mix = case
    rng = np.random.default_rng(2)
    shapes = (FRAMES, ROWS, 5), (5, *weight.shape[::2]), weight.shape[::2]
    x, kernel, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)

    def plain(x, kernel, bias, weight):
        inputs = jnp.einsum("tbd,dng->tnbg", x, kernel) + bias[None, :, None]
        return (recurrent.recur(cell, inputs, weight, valid)[0] * mix).sum()

    def chunks(x, kernel, bias, weight):
        return (recurrent.recur_in_chunks(cell, x, kernel, bias, weight, valid, size) * mix).sum()

    given = (x, kernel, bias, jnp.asarray(weight))
    found, expected = (jax.value_and_grad(f, range(4))(*given) for f in (chunks, plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_it_is_torchs(case):
    """Of both directions over packed sequences, with every gradient."""
    torch = pytest.importorskip("torch", reason="NO TORCH: the extra `parity` installs it")
    name, cell, _, weight, valid, mix = case
    lengths, rows = [7, 4], 2  # torch takes no row of no frames
    made = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "simple": torch.nn.RNN}[name]
    settings = {"nonlinearity": "relu"} if name == "simple" else {}  # ours is one below 20
    layer = made(5, HIDDEN, bidirectional=True, batch_first=True, **settings)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, FRAMES, 5)).astype(np.float32)
    kernel = rng.standard_normal((5, 2, weight.shape[2])).astype(np.float32)
    kernel, weight, valid, mix = 0.3 * kernel, 0.3 * weight, valid[:, :rows], mix[:, :, :rows]
    with torch.no_grad():
        for n, end in enumerate(("", "_reverse")):
            getattr(layer, f"weight_ih_l0{end}").copy_(torch.tensor(kernel[:, n].T.copy()))
            getattr(layer, f"weight_hh_l0{end}").copy_(torch.tensor(weight[n].T.copy()))
            getattr(layer, f"bias_ih_l0{end}").zero_()
            getattr(layer, f"bias_hh_l0{end}").zero_()

    def ours(x, kernel, weight):
        inputs = jnp.einsum("btd,dng->tnbg", x, kernel)
        outputs, _ = recurrent.recur(cell, inputs, weight, valid)
        outputs = jnp.where(valid[:, None, :, None], outputs, 0.0)
        return (outputs * mix).sum(), outputs

    given = (jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(weight))
    (_, outputs), gradients = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*given)

    rnn = torch.nn.utils.rnn
    held = torch.tensor(x, requires_grad=True)
    theirs, _ = layer(rnn.pack_padded_sequence(held, torch.tensor(lengths), batch_first=True))
    theirs, _ = rnn.pad_packed_sequence(theirs, batch_first=True, total_length=FRAMES)
    theirs = theirs.reshape(rows, FRAMES, 2, HIDDEN).permute(1, 2, 0, 3)
    (theirs * torch.tensor(mix)).sum().backward()
    np.testing.assert_allclose(outputs, theirs.detach(), atol=1e-5)
    np.testing.assert_allclose(gradients[0], held.grad, atol=1e-4)
    for n, end in enumerate(("", "_reverse")):
        for ours, kind in ((gradients[1][:, n], "ih"), (gradients[2][n], "hh")):
            grad = getattr(layer, f"weight_{kind}_l0{end}").grad
            np.testing.assert_allclose(ours, grad.T, atol=1e-4)
