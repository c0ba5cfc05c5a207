"""Greedy decoding against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding import ctc as decoding


def test_greedy_merges_repeats_then_drops_blanks():
    rng = np.random.default_rng(0)
    best = rng.integers(0, 4, (64, 12))
    lengths = rng.integers(0, 13, 64)
    logits = jax.nn.one_hot(jnp.asarray(best), 4)
    labels, counts = jax.jit(decoding.greedy)(logits, jnp.asarray(lengths))
    for row in range(64):
        path = best[row, : lengths[row]]
        expected = [label for label, _ in itertools.groupby(path) if label != 0]
        assert labels[row, : counts[row]].tolist() == expected
        assert not np.any(labels[row, counts[row] :])
