"""The suite of what is stepwise, on a small module: a convolution that looks ahead, and strides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import stepwise


class Ahead(nn.Module):
    """Frames [B, T, 2] to a weighted sum of 6 of them for every `stride`, some of them ahead."""

    stride: int = 1
    leak: bool = False  # from row to row: what the suite is to find
    taps = 6

    @property
    def delay(self):
        return 3 // self.stride

    def __call__(self, x):
        ahead = (self.delay + 1) * self.stride - 1
        x = jnp.pad(x, ((0, 0), (self.taps - 1 - ahead, ahead), (0, 0)))
        return self._windows(x)

    @nn.nowrap
    def start(self, rows):
        return jnp.zeros((rows, self.taps - self.stride, 2))

    def advance(self, carry, piece):
        x = jnp.concatenate([carry, piece], axis=1)
        return self._windows(x), x[:, piece.shape[1] :]

    @nn.compact
    def _windows(self, x):
        weight = self.param("weight", nn.initializers.normal(1.0), (self.taps, 2))
        count = (x.shape[1] - self.taps) // self.stride + 1
        rows = [
            jnp.einsum("btd,td->b", x[:, i * self.stride : i * self.stride + self.taps], weight)
            for i in range(count)
        ]
        outputs = jnp.stack(rows, axis=1)
        return outputs + outputs[:, :1].mean(0)[None] if self.leak else outputs


def run(sizes, **settings):
    module = Ahead(**settings)
    inputs = jax.random.normal(jax.random.key(0), (3, 20, 2))
    params = module.init(jax.random.key(1), inputs)["params"]
    whole = module.apply({"params": params}, inputs)
    stepwise.check(module, params, inputs, whole, sizes=sizes)


def test_pieces_give_what_the_whole_gives():
    run((1, 7, 20))


def test_so_do_they_where_several_inputs_make_an_output():
    run((3, 9), stride=3)


def test_a_leak_between_rows_is_found():
    with pytest.raises(AssertionError):
        run((20,), leak=True)
