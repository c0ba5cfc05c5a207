"""Attention in one kernel is attention in three steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.models import layers
from speech_jax.ops import attention, masking, partition

LENGTHS = jnp.asarray([7, 4, 0])


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (3, 7, 2, 8)) for key in keys)


def test_the_kernel_computes_the_same(arrays):
    mask = masking.length_mask(LENGTHS, 7)

    def total(function, *arrays):
        # The row without a key is 0 in a model: layers mask what lies past a row's end.
        return jnp.where(mask[:, :, None, None], jnp.sin(function(*arrays, mask, divisor=3.0)), 0)

    def both(function):
        return jax.value_and_grad(
            lambda *arrays: total(function, *arrays).sum(), argnums=(0, 1, 2)
        )(*arrays)

    # The library's own implementation stands for cuDNN's, which has the same arguments.
    fused = both(functools.partial(attention._fused, implementation="xla"))
    usual = both(attention.attend)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fused, usual)


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "drop", "kernel"),
    [
        ("gpu", "bfloat16", 64, None, True),
        ("gpu", "bfloat16", 64, lambda x: x, False),
        ("gpu", "float32", 64, None, False),
        ("gpu", "bfloat16", 36, None, False),
        ("cpu", "bfloat16", 64, None, False),
        ("tpu", "bfloat16", 64, None, False),
    ],
)
def test_the_kernel_is_used_where_it_fits(monkeypatch, platform, dtype, width, drop, kernel):
    used = []
    monkeypatch.setattr(partition, "platform", lambda: platform)
    monkeypatch.setattr(attention, "_fused", lambda query, *_: used.append(True) or query)
    query = jnp.ones((1, 4, 2, width), dtype)
    attention.attend(query, query, query, jnp.ones((1, 4), bool), drop)
    assert bool(used) is kernel


def test_weights_are_dropped_at_the_rate_of_their_own():
    seed = jnp.asarray([1, 2], jnp.uint32)
    assert layers.weight_dropout(0.1, None) == 0.1
    assert layers.weight_dropout(0.1, 0.0) == 0.0
    assert layers.dropping(0.0, seed, 0) is None
    assert layers.dropping(0.1, None, 0) is None
    x = jnp.ones((50, 50))
    dropped = layers.dropping(0.25, seed, 3)(x)
    np.testing.assert_array_equal(dropped, layers.dropout(x, 0.25, seed, 3))
    assert 0.2 < (dropped == 0).mean() < 0.3
