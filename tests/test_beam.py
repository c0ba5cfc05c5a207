"""Beam search against all label sequences there are, with and without a language model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.decoding import beam, fusion, ngram
from speech_jax.decoding.ctc import aligned, best_path, greedy
from speech_jax.decoding.decoder import Decoder
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


@pytest.mark.parametrize("order", [1, 4])
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


def speech(rows: int, frames: int, classes: int, seed: int = 0) -> jax.Array:
    """Logits as models make them: mostly blanks, a few labels in doubt, some said twice."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, frames, classes)).astype(np.float32)
    logits[..., 0] += 3
    for row in logits:
        for t in rng.choice(frames, size=frames // 3, replace=False):
            row[t, rng.integers(1, classes, size=2)] += rng.uniform(3, 8, size=2)
    return jnp.asarray(logits)


def test_a_beam_of_one_is_greedy_where_one_path_has_all():
    rng = np.random.default_rng(0)
    logits = 40 * jax.nn.one_hot(jnp.asarray(rng.integers(0, 4, (8, 30))), 4)
    lengths = jnp.asarray(rng.integers(0, 31, 8), jnp.int32)
    labels, count = jax.jit(greedy)(logits, lengths)
    found = jax.jit(functools.partial(beam.search, width=1, labels=3))(logits, lengths)
    np.testing.assert_array_equal(found.labels[:, 0], labels)
    np.testing.assert_array_equal(found.count[:, 0], count)


def test_neighbours_and_padding_change_nothing():
    search = jax.jit(functools.partial(beam.search, width=6, labels=5, nbest=2, skip=0.97))
    logits, lengths = speech(3, 40, 6), jnp.asarray([40, 17, 0], jnp.int32)
    whole = search(logits, lengths)
    for row in range(3):
        noise = speech(3, 40, 6, seed=9)
        mixed = noise.at[0, : lengths[row]].set(logits[row, : lengths[row]])
        alone = search(mixed, jnp.asarray([lengths[row], 3, 40], jnp.int32))
        np.testing.assert_array_equal(alone.labels[0], whole.labels[row])
        np.testing.assert_allclose(alone.score[0], whole.score[row], rtol=1e-6, atol=1e-6)
    assert whole.count[2].tolist() == [0, 0]


def test_frames_that_are_blank_are_passed_over():
    logits = np.array(speech(4, 60, 6))
    logits[:, 10:40, 0] += 12  # a pause
    lengths = jnp.full(4, 60, jnp.int32)
    every = jax.jit(functools.partial(beam.search, width=8, labels=5))(logits, lengths)
    fewer = jax.jit(functools.partial(beam.search, width=8, labels=5, skip=0.999))(logits, lengths)
    np.testing.assert_array_equal(every.labels, fewer.labels)
    np.testing.assert_allclose(every.score, fewer.score, rtol=1e-6)


def test_blanks_that_are_certain_part_equal_labels():
    """A skipped blank whose log probability is 0 in float32 still parts a label from the next."""
    path = jnp.array([[1, 0, 1, 0, 0, 2, 2, 0, 2]])
    logits = 40.0 * jax.nn.one_hot(path, 4)
    search = jax.jit(functools.partial(beam.search, width=4, labels=3, skip=0.9999))
    found = search(logits, jnp.array([path.shape[1]]))
    assert found.labels[0, 0, : found.count[0, 0]].tolist() == [1, 1, 2, 2]


def test_labels_of_a_path_are_found_in_its_frames():
    logits, lengths = speech(4, 40, 6), jnp.asarray([40, 30, 7, 0], jnp.int32)
    path = jax.jit(best_path)(logits, lengths)
    again = jax.jit(aligned)(logits, lengths, path.labels, path.count)
    for ours, theirs in zip(path, again, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_flashlight_finds_nothing_better():
    peer = pytest.importorskip("flashlight.lib.text.decoder")
    options = peer.LexiconFreeDecoderOptions(
        beam_size=16,
        beam_size_token=8,
        beam_threshold=1e9,
        lm_weight=0.0,
        sil_score=0.0,
        log_add=True,
        criterion_type=peer.CriterionType.CTC,
    )
    theirs = peer.LexiconFreeDecoder(options, peer.ZeroLM(), -1, 0, [])
    logits = speech(20, 50, 8)
    found = jax.jit(functools.partial(beam.search, width=16, labels=8))(logits, jnp.full(20, 50))
    for row, log_probs in enumerate(np.asarray(jax.nn.log_softmax(logits))):
        best = theirs.decode(np.ascontiguousarray(log_probs).ctypes.data, 50, 8)[0]
        assert found.score[row, 0] > best.score - 1e-3


def test_a_decoder_can_be_traced_again(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(arpa(3))
    settings = {"name": "beam", "lm": str(path), "width": 4, "nbest": 3}
    decoder = Decoder(settings, Transcript(CharacterTokenizer(" AB")), 0.04)
    logits, lengths = speech(4, 24, 4), jnp.full(4, 24, jnp.int32)
    rows = jax.jit(decoder.search)(logits, lengths)
    first = decoder.read({name: value[0] for name, value in jax.device_get(rows).items()})
    assert decoder(logits[:1], lengths[:1]) == [first]
    assert first.alternatives[0] == (first.text, first.score)
    scores = [score for _, score in first.alternatives]
    assert scores == sorted(scores, reverse=True)
    assert decoder.weighed(0.0, 0.0)(logits[:1], lengths[:1])[0].score > first.score


def test_a_large_table_holds_every_arc():
    keys = np.unique(np.random.default_rng(0).integers(0, 2**31, 20_000)).astype(np.uint32)
    slots = fusion._cuckoo(keys)
    held = np.sort(slots[slots >= 0])
    np.testing.assert_array_equal(held, np.arange(len(keys)))
    places = np.stack(list(fusion._places(keys, len(slots))), axis=1)
    np.testing.assert_array_equal((slots[places] == held[:, None]).sum(axis=1), 1)


def test_a_model_of_something_else_is_refused(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(arpa(2).replace("A", "CAT").replace("B", "DOG"))
    with pytest.raises(ngram.LanguageModelError, match="1 of the language model's 3 units"):
        fusion.make(ngram.read(path), SPELLINGS, weight=1.0)
