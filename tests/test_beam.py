"""Beam search against all label sequences there are, with and without a language model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.decoding import beam, fusion, ngram
from speech_jax.ops.ctc import ctc_loss

FRAMES, CLASSES = 5, 4
SPELLINGS = ("", " ", "A", "B")


def arpa(order: int, seed: int = 0) -> str:
    """A model of three labels with random numbers, and gaps that it must back off from."""
    texts = ["A B ▁ A", "A B B", "▁ A A B", "B ▁ B A"]
    spoken = [("<s>", *text.split(), "</s>") for text in texts]
    rng = np.random.default_rng(seed)
    levels = [[(unit,) for unit in ("<unk>", "<s>", "</s>", "▁", "A", "B")]]
    for n in range(2, order + 1):
        levels.append(sorted({one[i : i + n] for one in spoken for i in range(len(one) - n + 1)}))
    lines = ["\\data\\", *(f"ngram {n}={len(one)}" for n, one in enumerate(levels, 1))]
    for n, grams in enumerate(levels, 1):
        lines += ["", f"\\{n}-grams:"]
        for gram in grams:
            backoff = f"\t{rng.uniform(-1, 0):.5f}" if n < order and rng.random() < 0.8 else ""
            lines.append(f"{rng.uniform(-2, 0):.5f}\t{' '.join(gram)}{backoff}")
    return "\n".join([*lines, "", "\\end\\", ""])


def everything(frames: int) -> list[tuple[int, ...]]:
    """All label sequences that may come of so many frames."""
    return [labels for n in range(frames + 1) for labels in itertools.product((1, 2, 3), repeat=n)]


@functools.cache
def likelihoods(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, K], and log p of each of `everything`."""
    logits = 2 * np.random.default_rng(seed).standard_normal((FRAMES, CLASSES)).astype(np.float32)
    all_labels = everything(FRAMES)
    padded = np.zeros((len(all_labels), FRAMES), np.int32)
    for row, labels in zip(padded, all_labels, strict=True):
        row[: len(labels)] = labels
    count = np.asarray([len(labels) for labels in all_labels], np.int32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (len(count), FRAMES, CLASSES))
    loss = jax.jit(ctc_loss)(rows, jnp.full(len(count), FRAMES), padded, count)
    return logits, -np.asarray(loss)


def test_a_wide_beam_finds_the_best_of_all():
    search = jax.jit(functools.partial(beam.search, width=80, labels=9, nbest=20))
    batch = [likelihoods(seed) for seed in range(4)]
    found = search(jnp.stack([logits for logits, _ in batch]), jnp.full(4, FRAMES))
    for row, (_, expected) in enumerate(batch):
        best = np.argsort(-expected)[:20]
        np.testing.assert_allclose(found.score[row], expected[best], rtol=1e-4, atol=1e-4)
        pairs = zip(found.labels[row], found.count[row], strict=True)
        said = [tuple(one[:n].tolist()) for one, n in pairs]
        assert said[:5] == [everything(FRAMES)[i] for i in best[:5]]
        assert len(set(said)) == 20


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_language_model_is_added(order, tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(arpa(order))
    known = ngram.read(path)
    tables = fusion.make(known, SPELLINGS, weight=0.7, bonus=0.3)
    spoken = [[SPELLINGS[i].replace(" ", "▁") for i in labels] for labels in everything(FRAMES)]
    added = np.asarray([0.7 * known.score(one) + 0.3 * len(one) for one in spoken])
    search = jax.jit(functools.partial(beam.search, width=200, labels=9, nbest=10, fusion=tables))
    for seed in range(2):
        logits, likelihood = likelihoods(seed)
        found = search(jnp.asarray(logits)[None], jnp.asarray([FRAMES]))
        expected = likelihood + added
        best = np.argsort(-expected)[:10]
        np.testing.assert_allclose(found.score[0], expected[best], rtol=1e-4, atol=1e-4)
        assert (
            tuple(found.labels[0, 0, : found.count[0, 0]].tolist()) == everything(FRAMES)[best[0]]
        )
