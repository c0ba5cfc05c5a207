"""CTC and a decoder of text together: prefix scores against CTC's loss, and what a search finds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.decoding import beam, joint
from speech_jax.ops.ctc import ctc_loss

B, T, K, END, LONGEST = 3, 6, 4, 4, 6
LENGTHS = np.asarray([6, 3, 5], np.int32)


by_frames = jax.jit(beam.search, static_argnames=("width", "labels", "nbest"))


@pytest.fixture(scope="module")
def logits():
    return 2 * np.random.default_rng(0).normal(size=(B, T, K)).astype(np.float32)


@pytest.fixture(scope="module")
def bigrams():
    """Log probabilities [K + 1, K + 1] of a symbol behind another one, of which none is 0."""
    scores = np.random.default_rng(1).normal(size=(K + 1, K + 1)).astype(np.float32)
    scores[:, 0] = beam.NEVER
    return jax.nn.log_softmax(scores)


TEXTS = [
    list(labels)
    for count in range(LONGEST + 1)
    for labels in itertools.product(range(1, K), repeat=count)
]


@pytest.fixture(scope="module")
def by_ctc(logits):
    """Log probabilities [texts, B] of all texts."""
    labels = np.zeros((len(TEXTS), LONGEST), np.int32)
    for number, text in enumerate(TEXTS):
        labels[number, : len(text)] = text
    count = np.asarray(list(map(len, TEXTS)), np.int32)
    each = lambda one: (
        -ctc_loss(
            logits, LENGTHS, jnp.tile(one[0], (B, 1)), jnp.tile(one[1], B), zero_infinity=False
        )
    )
    return np.asarray(jax.jit(lambda *all: jax.lax.map(each, all))(labels, count))


@pytest.fixture(scope="module")
def by_decoder(bigrams):
    """Log probabilities [texts] of all texts, which end."""
    pairs = [zip([END, *text], [*text, END], strict=True) for text in TEXTS]
    return np.asarray([sum(float(bigrams[pair]) for pair in pairs_of) for pairs_of in pairs])


def test_a_prefix_has_the_probability_of_all_texts_that_begin_with_it(logits, by_ctc):
    heard = joint.emissions(logits, LENGTHS)
    prefixes = joint.empty(heard, 1)
    advance, scored = jax.jit(joint.extended), jax.jit(joint.continued)
    for prefix in ([], [2], [2, 2], [2, 2, 1]):
        scores = np.asarray(scored(heard, prefixes))[:, 0]  # [B, K + 1]
        np.testing.assert_allclose(
            scores[:, END], np.maximum(by_ctc[TEXTS.index(prefix)], beam.NEVER), rtol=1e-4
        )
        for label in range(1, K):
            longer = [*prefix, label]
            inside = [text[: len(longer)] == longer for text in TEXTS]
            wanted = np.logaddexp.reduce(by_ctc[inside], axis=0)
            np.testing.assert_allclose(
                scores[:, label], np.maximum(wanted, beam.NEVER), rtol=1e-4, atol=1e-4
            )
        assert (scores[:, 0] <= beam.NEVER).all()
        following = {0: 2, 1: 2, 2: 1, 3: 3}[len(prefix)]
        label = jnp.full((B, 1), following, jnp.int32)
        prefixes = advance(heard, prefixes, label, scores[:, following, None])


@functools.partial(jax.jit, static_argnames=("weight", "width", "nbest"))
def search(logits, bigrams, weight, width, nbest=1):
    def advance(carry, symbols):
        return bigrams[symbols], carry

    return joint.search(
        advance,
        jnp.zeros(B * width),
        logits,
        LENGTHS,
        weight=weight,
        pick=lambda carry, rows: carry[rows],
        begin=END,
        limit=jnp.asarray(LENGTHS),
        longest=LONGEST,
        width=width,
        nbest=nbest,
    )


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_search_finds_the_texts_that_are_best_by_both(
    logits, bigrams, by_ctc, by_decoder, weight
):
    """With 1 those of CTC, with 0 those of the decoder."""
    found = jax.device_get(search(logits, bigrams, weight, 100, 3))
    total = (1 - weight) * by_decoder[:, None] + (weight * by_ctc if weight else 0.0)
    for row in range(B):
        fits = [len(text) <= LENGTHS[row] for text in TEXTS]
        order = sorted(np.flatnonzero(fits), key=lambda n: -total[n, min(row, total.shape[1] - 1)])
        got = [
            (found.labels[row, n, : found.count[row, n]].tolist(), found.score[row, n])
            for n in range(3)
            if found.ended[row, n]
        ]
        assert got
        for (labels, score), number in zip(got, order, strict=False):
            assert labels == TEXTS[number]
            column = min(row, total.shape[1] - 1)
            np.testing.assert_allclose(score, total[number, column], rtol=1e-4)


def test_with_all_weight_on_ctc_it_is_its_beam_search(logits, bigrams):
    ours = jax.device_get(search(logits, bigrams, 1.0, 30))
    theirs = jax.device_get(by_frames(logits, LENGTHS, width=30, labels=K))
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.score, theirs.score, rtol=1e-4)


def test_rescoring_puts_the_best_of_ctc_in_order(logits, bigrams, by_ctc, by_decoder):
    def written(labels, count):
        before = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=END)
        places = jnp.arange(T + 1)[None]
        after = jnp.where(places == count[:, None], END, jnp.pad(labels, ((0, 0), (0, 1))))
        return jnp.where(places <= count[:, None], bigrams[before, after], 0).sum(1)

    settings = {"weight": 0.4, "width": 8, "labels": K, "nbest": 8}
    texts = jax.jit(functools.partial(joint.rescore, written, **settings))(logits, LENGTHS)
    texts = jax.device_get(texts)
    kept = jax.device_get(by_frames(logits, LENGTHS, width=8, labels=K, nbest=8))
    for row in range(B):
        read = lambda found, n, row=row: found.labels[row, n, : found.count[row, n]].tolist()
        numbers = [TEXTS.index(read(kept, n)) for n in range(8) if kept.score[row, n] > -1e29]
        total = 0.6 * by_decoder + 0.4 * by_ctc[:, row]
        best = sorted(numbers, key=lambda number: -total[number])
        assert [read(texts, n) for n in range(len(best))] == [TEXTS[number] for number in best]
        np.testing.assert_allclose(texts.score[row, : len(best)], total[best], rtol=1e-4)
