"""Masks of lengths and of random spans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.ops import masking


def runs(flags):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return edges[1::2] - edges[::2]


def test_spans_are_inside_and_of_the_stated_amount():
    lengths = jnp.array([200, 120, 10, 9, 0])
    draw = jax.jit(lambda key: masking.random_spans(key, lengths, 220, 0.65, 10))
    masks = np.stack([draw(jax.random.key(seed)) for seed in range(200)])
    valid = np.asarray(masking.length_mask(lengths, 220))
    assert not (masks & ~valid).any()
    fraction = masks.mean((0, 2)) * 220 / np.maximum(np.asarray(lengths), 1)
    # 0.65 if spans did not overlap; at random starts about 1 - exp(-0.65).
    assert fraction[0] == pytest.approx(1 - np.exp(-0.65), abs=0.04)
    assert fraction[1] == pytest.approx(1 - np.exp(-0.65), abs=0.04)
    assert (fraction[2], fraction[3], fraction[4]) == (1.0, 0.0, 0.0)
    # Every valid position is reached, and the ends no more often than the middle.
    assert (masks[:, 0, :200].any(0)).all()
    for row in masks[:, 0]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        assert (edges[1::2] - edges[::2] >= 10).all()


def test_spans_stay_inside_and_reach_both_ends():
    lengths = jnp.array([10])
    hit = np.zeros(16, bool)
    for seed in range(200):
        mask = np.asarray(masking.span_mask(jax.random.key(seed), lengths, jnp.array([[3]]), 16))[0]
        assert mask.sum() <= 3
        assert len(runs(mask)) <= 1
        hit |= mask
    assert hit.tolist() == [True] * 10 + [False] * 6
