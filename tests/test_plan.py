"""Plans: every utterance once, the least padding, the same for ever; along any dimension."""

import hashlib
import itertools
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.data import plan, sources
from speech_jax.data.batch import Bucket

_CORPORA = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=120)
_SHAPES = st.fixed_dictionaries(
    {
        "count": st.integers(1, 6),
        "budget": st.integers(50, 3000),
        "rows_multiple": st.sampled_from([1, 2, 4]),
        "round_to": st.sampled_from([1, 7, 50]),
    }
)
_SPEEDS = st.sampled_from([(1.0,), (0.9, 1.0, 1.1)])
_ALONG = st.sampled_from(["samples", "labels"])


def _lengths(corpus):
    samples, labels = np.array(corpus).T
    return {"samples": samples, "labels": labels}


def _choose(lengths, speeds=(1.0,), *, along="samples", **shapes):
    """Buckets along a dimension for a corpus played at `speeds`."""
    played = {
        "samples": np.concatenate([plan.stretched_length(lengths["samples"], s) for s in speeds]),
        "labels": np.tile(lengths["labels"], len(speeds)),
    }
    return plan.choose_buckets(played, along=along, budget_of="samples", **shapes)


def _plan(lengths, buckets, *, along="samples", **changes):
    return plan.Plan(lengths, along, buckets, **changes)


def _ids(planned):
    return np.concatenate([batch.ids for batch in planned])


@settings(max_examples=60, deadline=None)
@given(_CORPORA, _SHAPES, _SPEEDS, _ALONG, st.booleans(), st.integers(0, 3))
def test_every_utterance_once_in_a_bucket_that_holds_it(
    corpus, shapes, speeds, along, shuffle, epoch
):
    lengths = _lengths(corpus)
    samples, labels = lengths["samples"], lengths["labels"]
    buckets = _choose(lengths, speeds, along=along, **shapes)
    made = _plan(lengths, buckets, along=along, seed=1, shuffle=shuffle, speeds=speeds)
    planned = made.epoch(epoch)
    ids = _ids(planned)
    assert sorted(ids[ids >= 0]) == list(range(len(samples)))
    assert all((batch.ids >= 0).all() for batch in planned[:-1])  # filler only in the last batch
    assert (planned[-1].ids >= 0).any()
    for bucket, ids, drawn in planned:
        assert bucket in buckets
        assert ids.dtype == np.int32
        assert drawn.dtype == np.float32
        assert ids.shape == drawn.shape == (bucket.rows,)
        real = ids >= 0
        played = plan.stretched_length(samples[ids[real]], drawn[real])
        assert (played <= bucket.size("samples")).all()
        assert (labels[ids[real]] <= bucket.size("labels")).all()
        assert set(drawn[real]) <= set(np.float32(speeds))
        assert (drawn[~real] == 1).all()
    assert len(planned) == made.count(epoch)


@settings(max_examples=40, deadline=None)
@given(_CORPORA, _SHAPES, _ALONG)
def test_buckets_are_the_best_of_all(corpus, shapes, along):
    lengths = _lengths(corpus)
    buckets = _choose(lengths, along=along, **shapes)
    rounded = np.maximum(-(-lengths[along] // shapes["round_to"]), 1) * shapes["round_to"]
    edges = np.unique(rounded)
    count = min(shapes["count"], len(edges))

    def padded(chosen):
        return sum(chosen[place] for place in np.searchsorted(chosen, rounded))

    chosen = [bucket.size(along) for bucket in buckets]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    if len(edges) <= 14:
        best = min(
            padded([*inner, edges[-1]])
            for inner in itertools.combinations(edges[:-1].tolist(), count - 1)
        )
        assert padded(chosen) == best


@settings(max_examples=40, deadline=None)
@given(_CORPORA, _SHAPES, _ALONG)
def test_buckets_hold_a_constant_time_and_every_shorter_utterance(corpus, shapes, along):
    lengths = _lengths(corpus)
    buckets = _choose(lengths, along=along, **shapes)
    multiple, other = shapes["rows_multiple"], {"samples": "labels", "labels": "samples"}[along]
    for bucket in buckets:
        assert multiple <= bucket.rows < len(corpus) + multiple
        assert bucket.rows % multiple == 0
        assert bucket.size(other) % 8 == 0
        assert bucket.size(other) >= lengths[other][lengths[along] <= bucket.size(along)].max()
        if bucket.rows > multiple:
            assert bucket.rows * bucket.size("samples") <= shapes["budget"]
        if bucket.rows < len(corpus):  # no room for more rows
            assert (bucket.rows + multiple) * bucket.size("samples") > shapes["budget"]


def test_a_plan_is_for_ever():
    """What a seed gives never changes: a run that began with an older version goes on with it."""
    rng = np.random.default_rng(0)
    samples = rng.integers(8_000, 560_000, 2999)
    lengths = {"samples": samples, "labels": samples // 1500 + rng.integers(0, 9, 2999)}
    speeds = (0.9, 1.0, 1.1)
    buckets = _choose(lengths, speeds, count=6, budget=16000 * 120, rows_multiple=4)
    digest = hashlib.sha256()
    for shuffle in (True, False):
        made = _plan(lengths, buckets, seed=5, shuffle=shuffle, speeds=speeds)
        for epoch in range(3):
            for bucket, ids, drawn in made.epoch(epoch):
                shape = [bucket.size("samples"), bucket.size("labels"), bucket.rows]
                digest.update(np.asarray(shape, np.int64).tobytes())
                digest.update(ids.tobytes() + drawn.tobytes())
    expected = "55fc28c8fc1d06988100fc92d54fd0d4b733d66b4f70e3dd72b774c940dfd6c7"
    assert digest.hexdigest() == expected


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    samples = rng.gamma(4, 40000, 2000).astype(int) + 8000
    return {"samples": samples, "labels": samples // 1500}


def _buckets(corpus, speeds=(1.0,), **changes):
    return _choose(
        corpus, speeds, **{"count": 6, "budget": 16000 * 120, "round_to": 1600} | changes
    )


def test_plan_depends_on_seed_and_epoch_alone(corpus):
    speeds = (0.9, 1.0)
    buckets = _buckets(corpus, speeds)

    def key(seed, epoch):
        planned = _plan(corpus, buckets, seed=seed, speeds=speeds).epoch(epoch)
        return [(b.bucket, b.ids.tolist(), b.speeds.tolist()) for b in planned]

    first = key(0, 0)
    assert key(0, 1) != first  # and nothing is left behind by other plans
    assert key(1, 0) != first
    assert key(0, 0) == first


def test_shuffles_within_and_across_buckets(corpus):
    made = _plan(corpus, _buckets(corpus))
    one, two = made.epoch(0), made.epoch(1)
    sizes = [batch.bucket.size("samples") for batch in one]
    assert sizes != sorted(sizes)
    assert sizes != [batch.bucket.size("samples") for batch in two]
    partners = [{frozenset(batch.ids.tolist()) for batch in planned} for planned in (one, two)]
    assert not partners[0] & partners[1]


def test_short_utterances_come_first_for_some_epochs(corpus):
    """The batches are the same ones, by length; then all is as it would be without."""
    buckets = _buckets(corpus)
    usual, sorted_ = (_plan(corpus, buckets, seed=3, short_first=n) for n in (0, 2))
    key = lambda batch: tuple(batch.ids)
    for epoch in range(3):
        ours, theirs = sorted_.epoch(epoch), usual.epoch(epoch)
        assert sorted(map(key, ours)) == sorted(map(key, theirs))
        sizes = [batch.bucket.size("samples") for batch in ours if (batch.ids >= 0).all()]
        assert (sizes == sorted(sizes)) == (epoch < 2)
        assert (list(map(key, ours)) == list(map(key, theirs))) == (epoch == 2)


def test_evaluation_is_by_duration(corpus):
    buckets = _buckets(corpus)
    planned = _plan(corpus, buckets, shuffle=False).epoch(0)
    ids = _ids(planned)
    assert (np.diff(corpus["samples"][ids[ids >= 0]]) >= 0).all()
    assert [b.ids.tolist() for b in planned] == [
        b.ids.tolist() for b in _plan(corpus, buckets, seed=9, shuffle=False).epoch(5)
    ]


def test_speeds_are_drawn_evenly_and_lengths_follow(corpus):
    speeds = (0.9, 1.0, 1.1)
    made = _plan(corpus, _buckets(corpus, speeds), speeds=speeds)
    planned, again = made.epoch(0), made.epoch(1)
    drawn = np.concatenate([batch.speeds[batch.ids >= 0] for batch in planned])
    assert all(0.25 < (drawn == np.float32(speed)).mean() < 0.42 for speed in speeds)
    of = [{i: s for b in p for i, s in zip(b.ids, b.speeds, strict=True)} for p in (planned, again)]
    assert 0.5 < np.mean([of[0][i] != of[1][i] for i in range(len(drawn))]) < 0.8
    # 0.9 is not a float32: 18000 / float32(0.9) would round up to 20001.
    assert plan.stretched_length(np.array([18000, 18001]), np.float32(0.9)).tolist() == [
        20000,
        20002,
    ]


def test_what_has_no_length_has_a_batch_too():
    lengths = {"labels": np.array([0, 0, 3])}
    buckets = plan.choose_buckets(lengths, along="labels", count=2, budget=6, round_to=1)
    assert [bucket.size("labels") for bucket in buckets] == [1, 3]
    ids = _ids(_plan(lengths, buckets, along="labels").epoch(0))
    assert sorted(ids[ids >= 0]) == [0, 1, 2]


def test_only_what_is_stretched_follows_the_speed():
    lengths = {"samples": np.array([900, 900]), "labels": np.array([9, 9])}
    buckets = (Bucket(2, (("samples", 1000), ("labels", 9))),)
    made = _plan(lengths, buckets, speeds=(0.9,))
    assert [batch.ids.tolist() for batch in made.epoch(0)] == [[0, 1]]
    both = _plan(lengths, buckets, speeds=(0.9,), stretched=("samples", "labels"))
    with pytest.raises(ValueError, match="no bucket holds utterance 0"):
        both.epoch(0)


def _padding_fraction(planned, samples):
    """The share of the planned samples that is padding: ends of rows and filler rows alike."""
    used = padded = 0
    for bucket, ids, speeds in planned:
        real = ids >= 0
        used += plan.stretched_length(samples[ids[real]], speeds[real]).sum()
        padded += bucket.size("samples") * bucket.rows
    return 1 - used / padded


@pytest.mark.parametrize("speeds", [(1.0,), (0.9, 1.0, 1.1)])
def test_padding_on_librispeech(speeds, tmp_path):
    data = os.environ.get("SPEECH_JAX_TEST_DATA", "")
    root = pathlib.Path(data) / "LibriSpeech"
    if not data or not root.is_dir():
        pytest.skip(
            "SPEECH_JAX_TEST_DATA does not name a folder with LibriSpeech: real padding NOT checked"
        )
    source = sources.open_source("librispeech", root=root, split="train-clean-5", cache=tmp_path)
    lengths = {
        "samples": np.array([round(u.duration * 16000) for u in source.utterances]),
        "labels": np.array([len(u.text) for u in source.utterances]),
    }
    buckets = _buckets(lengths, speeds, count=8)
    planned = _plan(lengths, buckets, speeds=speeds).epoch(0)
    assert _padding_fraction(planned, lengths["samples"]) < 0.08


def test_errors(corpus):
    with pytest.raises(ValueError, match="no utterances"):
        plan.choose_buckets({"samples": []}, along="samples", count=2, budget=10)
    for name in ("count", "budget", "rows_multiple", "round_to"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            _buckets(corpus, **{name: 0})
    buckets = _buckets(corpus)
    for samples, labels in ((10**9, 1), (10, 10**6)):
        one = {"samples": np.array([samples]), "labels": np.array([labels])}
        message = f"no bucket holds utterance 0 .*{samples} samples, {labels} labels"
        with pytest.raises(ValueError, match=message):
            _plan(one, buckets).epoch(0)
    for speeds in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="speeds must be"):
            _plan(corpus, buckets, speeds=speeds)


# ---- How far a run is --------------------------------------------------------------------------


def test_epochs_are_whole_where_they_end():
    epochs = plan.Epochs([4, 3, 5, 4].__getitem__)
    assert [epochs.after(n) for n in range(9)] == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1, 4 / 3, 5 / 3, 2, 2.2]
    )
    assert [n for n in range(1, 13) if epochs.passed(n, 1.0)] == [4, 7, 12]
    assert [n for n in range(1, 13) if epochs.passed(n, 2.0)] == [7]
    assert [n for n in range(1, 9) if epochs.passed(n, 0.5)] == [2, 4, 6, 7]


def test_a_shorter_wait_than_a_batch_is_every_batch():
    epochs = plan.Epochs(lambda number: 2)
    assert all(epochs.passed(n, 0.1) for n in range(1, 7))
