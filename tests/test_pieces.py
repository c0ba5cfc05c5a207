"""Pieces of a recording end in its pauses, whatever stands around them; chunks overlap."""

import itertools

import numpy as np
import pytest

from speech_jax.deploy import pieces

RATE = 8_000


def speech(seed: int, bursts: int, pauses=(0.4, 3.0)) -> tuple[np.ndarray, np.ndarray]:
    """(int16 [T] of bursts of noise in quiet noise, bool [T] where the bursts are)."""
    rng = np.random.default_rng(seed)
    parts, spoken = [], []
    for _ in range(bursts):
        for level, (low, high) in ((3000, (0.5, 4.0)), (8, pauses)):
            parts.append(rng.normal(0, level, round(rng.uniform(low, high) * RATE)))
            spoken.append(np.full(len(parts[-1]), level > 8))
    return np.concatenate(parts).astype(np.int16), np.concatenate(spoken)


def cut(samples, longest=20.0, block=1 << 20):
    blocks = (samples[i : i + block] for i in range(0, len(samples), block))
    return list(pieces.cut(blocks, RATE, longest))


def test_all_that_is_spoken_is_in_one_piece_and_cuts_are_in_pauses():
    samples, spoken = speech(0, 60)
    found = cut(samples)
    heard = np.zeros(len(samples), int)
    for piece in found:
        stop = piece.start + len(piece.samples)
        heard[piece.start : stop] += 1
        np.testing.assert_array_equal(piece.samples, samples[piece.start : stop])
        assert not spoken[piece.start] or piece.start == 0
        assert not spoken[stop - 1]
        assert len(piece.samples) <= pieces.LONGEST * RATE
    assert heard.max() == 1
    assert heard[spoken].all()
    assert heard.mean() < spoken.mean() + 0.1, "silence is heard"


def test_blocks_make_no_difference():
    samples, _ = speech(1, 80)
    for block in (777, 50_000):
        for one, other in zip(cut(samples), cut(samples, block=block), strict=True):
            assert one.start == other.start
            np.testing.assert_array_equal(one.samples, other.samples)


@pytest.mark.parametrize("bursts", [1, 40])
@pytest.mark.parametrize(("before", "after"), [(0, 0.001), (0, 0.5), (2, 0), (1.1, 7), (70, 200)])
def test_zeros_around_a_recording_are_no_part_of_it(bursts, before, after):
    samples, spoken = speech(2, bursts)
    samples = samples[: np.flatnonzero(spoken)[-1]]  # it ends in a word
    before, after = (np.zeros(round(seconds * RATE), np.int16) for seconds in (before, after))
    found = cut(np.concatenate([before, samples, after]))
    for one, other in zip(found, cut(samples), strict=True):
        assert one.start - len(before) == other.start
        np.testing.assert_array_equal(one.samples, other.samples)


def test_an_utterance_is_one_piece_with_its_short_pauses_and_zeros():
    samples, _ = speech(3, 4, pauses=(0.3, 0.9))
    samples[: RATE // 10], samples[-1] = 0, 1
    found = cut(samples)
    assert len(found) == 1
    assert found[0].start == 0
    np.testing.assert_array_equal(found[0].samples, samples)
    assert len(cut(samples, longest=len(samples) / RATE - 1)) > 1


def test_silence_is_no_piece_and_the_shortest_sound_is_one():
    assert cut(np.zeros(100 * RATE, np.int16)) == []
    assert cut(np.zeros(0, np.int16)) == []
    assert [len(piece.samples) for piece in cut(np.ones(1, np.int16))] == [1]


def test_without_a_pause_pieces_end_anyway():
    """Read no further ahead than a minute or two, so that memory is bounded."""
    rng = np.random.default_rng(0)
    taken = 0

    def blocks():
        nonlocal taken
        for _ in range(60):
            taken += 10 * RATE
            yield rng.normal(0, 3000, 10 * RATE).astype(np.int16)

    done = 0
    for piece in pieces.cut(blocks(), RATE, 20.0):
        assert piece.start == done
        assert len(piece.samples) <= 62 * RATE
        done += len(piece.samples)
        assert taken - done <= 80 * RATE
    assert done == taken == 600 * RATE


@pytest.mark.parametrize("longest", [5, 8.3, 10, 30])
def test_frames_of_chunks_are_those_of_the_piece(longest):
    for length, frame in itertools.product(
        (1, 5 * RATE, 40_001, 66_399, 80_001, 480_000), (160, 640)
    ):
        found, place = pieces.chunks(length, longest, RATE, frame), 0
        for chunk in found:
            assert chunk.start % frame == 0
            assert 0 < chunk.stop - chunk.start <= longest * RATE
            assert chunk.start // frame + chunk.first == place, "a frame is lost or doubled"
            place = chunk.start // frame + (chunk.last or 0)
            margin = (chunk.stop - chunk.start) // frame - (chunk.last or 0)
            assert chunk.last is None or margin * frame >= RATE
        assert found[-1].last is None
        assert found[-1].stop == length
