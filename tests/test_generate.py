"""Texts written by a decoder: cached as uncached, beams against all texts there are, bounds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepwise
from speech_jax.decoding import generate
from speech_jax.models.decoder import TextDecoder

VOCABULARY, LONGEST = 4, 4
DECODER = TextDecoder(VOCABULARY, width=16, num_layers=2, heads=2, dropout=0.0)
LENGTHS = np.asarray([7, 3, 5], np.int32)
LIMIT = np.asarray([4, 2, 3], np.int32)


@pytest.fixture(scope="module")
def memory():
    return np.random.default_rng(0).normal(size=(3, 7, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def params(memory):
    tokens = np.zeros((3, 2), np.int32)
    arguments = (tokens, np.full(3, 2, np.int32), memory, LENGTHS)
    init = jax.jit(lambda key: DECODER.init(key, *arguments, True)["params"])
    made = init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.4 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return tree.unflatten([x + y for x, y in zip(leaves, noise, strict=True)])


@pytest.fixture(scope="module")
def whole(params):
    """Log probabilities [B, U, V] behind each symbol, computed at once."""

    @jax.jit
    def whole(tokens, memory, lengths):
        inside = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
        logits = DECODER.apply({"params": params}, tokens, inside, memory, lengths, True)
        return jax.nn.log_softmax(logits)

    return whole


@functools.partial(jax.jit, static_argnames="width")
def start(params, memory, lengths, width):
    return DECODER.apply(
        {"params": params}, width * len(lengths), memory, lengths, LONGEST + 1, method="start"
    )


@jax.jit
def advance(params, carry, symbols):
    logits, carry = DECODER.apply({"params": params}, carry, symbols, method="advance")
    return jax.nn.log_softmax(logits), carry


@functools.partial(jax.jit, static_argnames=("width", "nbest", "penalty"))
def search(params, memory, lengths, limit, width=0, nbest=1, penalty=0.0):
    carry = start(params, memory, lengths, width or 1)
    step = functools.partial(advance, params)
    common = {"begin": DECODER.begin, "limit": limit, "longest": LONGEST}
    if not width:
        return generate.greedy(step, carry, **common)
    return generate.beam(
        step,
        carry,
        pick=DECODER.pick,
        width=width,
        nbest=nbest,
        length_penalty=penalty,
        **common,
    )


def test_pieces_of_any_size_give_what_the_whole_gives(params, memory):
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, (3, 5)).astype(np.int32)
    whole = jax.jit(functools.partial(DECODER.apply, {"params": params}), static_argnums=4)
    wanted = whole(tokens, jnp.full(3, 5, jnp.int32), memory, LENGTHS, True)
    reads = memory, LENGTHS, 8  # symbols, with those that fill the last piece
    stepwise.check(DECODER, params, jnp.asarray(tokens), wanted, reads=reads, sizes=(1, 3, 8))


def test_what_comes_later_and_what_is_padding_changes_nothing(params, memory, whole):
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, VOCABULARY, (3, 5)).astype(np.int32)
    other = np.concatenate([tokens[:, :3], rng.integers(1, VOCABULARY, (3, 2))], 1)
    inside = np.arange(7)[None, :, None] < LENGTHS[:, None, None]
    noise = np.where(inside, memory, 9.0).astype(np.float32)
    a, b = whole(tokens, memory, LENGTHS), whole(other.astype(np.int32), noise, LENGTHS)
    np.testing.assert_allclose(a[:, :3, 1:], b[:, :3, 1:], atol=1e-5)
    assert np.abs(a[:, 3:, 1:] - b[:, 3:, 1:]).max() > 1e-2
    assert (np.exp(a[..., 0]) == 0).all()  # the blank is never written


def test_the_order_of_the_memory_is_known(memory, whole):
    tokens = np.full((3, 1), DECODER.begin, np.int32)
    lengths = np.full(3, memory.shape[1], np.int32)
    there, back = (whole(tokens, x, lengths) for x in (memory, memory[:, ::-1]))
    assert np.abs(there - back).max() > 0.1


def test_cached_greedy_search_gives_the_tokens_of_uncached(params, memory, whole):
    texts = jax.device_get(search(params, memory, LENGTHS, LIMIT))
    for row in range(3):
        written = [DECODER.begin]
        while len(written) <= LIMIT[row]:
            padded = np.zeros((3, 5), np.int32)
            padded[row, : len(written)] = written
            best = int(whole(padded, memory, LENGTHS)[row, len(written) - 1].argmax())
            if best == DECODER.begin:
                break
            written.append(best)
        count = texts.count[row, 0]
        assert texts.labels[row, 0, :count].tolist() == written[1:]
        assert not texts.labels[row, 0, count:].any()


def _all_texts(whole, memory, row, limit, penalty):
    """(score, labels, whether it ended) of every text there can be, the best first."""
    found = []
    for count in range(limit + 1):
        for labels in itertools.product(range(1, VOCABULARY), repeat=count):
            tokens = np.zeros((3, 5), np.int32)
            tokens[:, 0] = DECODER.begin
            tokens[row, 1 : 1 + count] = labels
            scores = np.asarray(whole(tokens, memory, LENGTHS))[row]
            score = float(sum(scores[i, label] for i, label in enumerate(labels)))
            if count < limit or scores[count].argmax() == DECODER.begin:
                score += float(scores[count, DECODER.begin])
                found.append((score / ((6 + count) / 6) ** penalty, list(labels), True))
            else:
                found.append((score / ((5 + count) / 6) ** penalty, list(labels), False))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.8])
def test_a_wide_beam_finds_the_best_of_all_texts(params, memory, whole, penalty):
    texts = search(params, memory, LENGTHS, LIMIT, width=3**4, nbest=5, penalty=penalty)
    texts = jax.device_get(texts)
    for row, limit in enumerate(LIMIT):
        wanted = _all_texts(whole, memory, row, limit, penalty)[:5]
        for n, (score, labels, ended) in enumerate(wanted):
            assert texts.labels[row, n, : texts.count[row, n]].tolist() == labels
            assert texts.ended[row, n] == ended
            np.testing.assert_allclose(texts.score[row, n], score, rtol=1e-4)


def test_a_beam_of_one_is_greedy_and_rows_do_not_see_each_other(params, memory):
    one = jax.device_get(search(params, memory, LENGTHS, LIMIT))
    same = jax.device_get(search(params, memory, LENGTHS, LIMIT, width=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, same)
    wide = jax.device_get(search(params, memory, LENGTHS, LIMIT, width=3, nbest=2))
    turned = search(params, memory[::-1], LENGTHS[::-1], LIMIT[::-1], width=3, nbest=2)
    np.testing.assert_array_equal(wide.labels, turned.labels[::-1])
    np.testing.assert_allclose(wide.score, turned.score[::-1], rtol=1e-5)


def test_how_sure_a_text_is_does_not_depend_on_how_long_ones_are_favoured(params, memory):
    found = [
        generate.confidence(search(params, memory, LENGTHS, LIMIT, width=4, penalty=power), power)
        for power in (0.0, 1e-3)
    ]
    np.testing.assert_allclose(*found, rtol=1e-4)
    texts = search(params, memory, LENGTHS, LIMIT, width=4)
    symbols = texts.count[:, 0] + texts.ended[:, 0].astype(jnp.int32)
    together = found[0] ** symbols.astype(jnp.float32)
    np.testing.assert_allclose(together, np.exp(texts.score[:, 0]), rtol=1e-4)


@pytest.mark.parametrize("width", [0, 2])
def test_what_ends_at_its_limit_is_not_cut(width):
    """A decoder that writes 1, then 2, then the end, each with 0.7."""
    begin = 3
    likely = np.full((4, 4), 0.1)
    likely[[begin, 1, 2], [1, 2, begin]] = 0.7
    scores = jnp.log(jnp.asarray(likely, jnp.float32))
    advance = lambda carry, symbols: (scores[symbols], carry)
    common = {"begin": begin, "limit": jnp.asarray([1, 2, 3], jnp.int32), "longest": 3}
    texts = (
        generate.beam(advance, (), pick=lambda carry, rows: carry, width=width, **common)
        if width
        else generate.greedy(advance, (), **common)
    )
    assert texts.labels[:, 0].tolist() == [[1, 0, 0], [1, 2, 0], [1, 2, 0]]
    assert texts.ended[:, 0].tolist() == [False, True, True]
    np.testing.assert_allclose(texts.score[:, 0], np.log(0.7) * np.asarray([1, 3, 3]), rtol=1e-5)


@pytest.mark.parametrize("width", [0, 3])
def test_what_does_not_end_is_cut_at_its_limit_and_said_to_be(params, memory, width):
    endless = jax.tree.map(lambda x: x, params)
    endless["output"]["bias"] = params["output"]["bias"].at[DECODER.begin].set(-1e9)
    texts = jax.device_get(search(endless, memory, LENGTHS, LIMIT, width=width))
    np.testing.assert_array_equal(texts.count[:, 0], LIMIT)
    assert not texts.ended.any()
    assert (texts.labels[:, 0][np.arange(LONGEST)[None] < LIMIT[:, None]] > 0).all()
