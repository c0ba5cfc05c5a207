import itertools
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.data import plan, sources

_CORPORA = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=120)
_SHAPES = st.fixed_dictionaries(
    {
        "count": st.integers(1, 6),
        "batch_samples": st.integers(50, 3000),
        "rows_multiple": st.sampled_from([1, 2, 4]),
        "round_to": st.sampled_from([1, 7, 50]),
    }
)
_SPEEDS = st.sampled_from([(1.0,), (0.9, 1.0, 1.1)])


def _choose(corpus, speeds, **shapes):
    samples, labels = np.array(corpus).T
    buckets = plan.choose_buckets(
        np.concatenate([plan.perturbed_samples(samples, speed) for speed in speeds]),
        np.tile(labels, len(speeds)),
        **shapes,
    )
    return samples, labels, buckets


def _ids(planned):
    return np.concatenate([batch.ids for batch in planned])


@settings(max_examples=60, deadline=None)
@given(_CORPORA, _SHAPES, _SPEEDS, st.booleans(), st.integers(0, 3))
def test_every_utterance_once_in_a_bucket_that_holds_it(corpus, shapes, speeds, shuffle, epoch):
    samples, labels, buckets = _choose(corpus, speeds, **shapes)
    planned = plan.plan_epoch(
        samples, labels, buckets, seed=1, epoch=epoch, shuffle=shuffle, speeds=speeds
    )
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
        assert (plan.perturbed_samples(samples[ids[real]], drawn[real]) <= bucket.samples).all()
        assert (labels[ids[real]] <= bucket.labels).all()
        assert set(drawn[real]) <= set(np.float32(speeds))
        assert (drawn[~real] == 1).all()
    assert len(planned) == plan.count_batches(
        samples, labels, buckets, seed=1, epoch=epoch, speeds=speeds
    )


@settings(max_examples=40, deadline=None)
@given(_CORPORA, _SHAPES)
def test_buckets_are_the_best_of_all(corpus, shapes):
    samples, _, buckets = _choose(corpus, (1.0,), **shapes)
    rounded = -(-samples // shapes["round_to"]) * shapes["round_to"]
    edges = np.unique(rounded)
    count = min(shapes["count"], len(edges))

    def padded(chosen):
        return sum(chosen[place] for place in np.searchsorted(chosen, rounded))

    lengths = [bucket.samples for bucket in buckets]
    assert lengths == sorted(set(lengths))
    assert len(lengths) == count
    if len(edges) <= 14:
        best = min(
            padded([*inner, edges[-1]])
            for inner in itertools.combinations(edges[:-1].tolist(), count - 1)
        )
        assert padded(lengths) == best


@settings(max_examples=40, deadline=None)
@given(_CORPORA, _SHAPES)
def test_buckets_hold_a_constant_time_and_every_shorter_utterance(corpus, shapes):
    samples, labels, buckets = _choose(corpus, (1.0,), **shapes)
    multiple = shapes["rows_multiple"]
    for bucket in buckets:
        assert multiple <= bucket.rows < len(samples) + multiple
        assert bucket.rows % multiple == 0
        assert bucket.labels % 8 == 0
        assert bucket.labels >= labels[samples <= bucket.samples].max()
        if bucket.rows > multiple:
            assert bucket.rows * bucket.samples <= shapes["batch_samples"]
        if bucket.rows < len(samples):  # no room for more rows
            assert (bucket.rows + multiple) * bucket.samples > shapes["batch_samples"]


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    samples = rng.gamma(4, 40000, 2000).astype(int) + 8000
    return samples, samples // 1500


def _buckets(corpus, **changes):
    return plan.choose_buckets(
        *corpus, **{"count": 6, "batch_samples": 16000 * 120, "round_to": 1600} | changes
    )


def test_plan_depends_on_seed_and_epoch_alone(corpus):
    speeds = (0.9, 1.0)
    buckets = plan.choose_buckets(
        plan.perturbed_samples(corpus[0], 0.9), corpus[1], count=6, batch_samples=16000 * 120
    )

    def key(seed, epoch):
        planned = plan.plan_epoch(*corpus, buckets, seed=seed, epoch=epoch, speeds=speeds)
        return [(b.bucket, b.ids.tolist(), b.speeds.tolist()) for b in planned]

    first = key(0, 0)
    assert key(0, 1) != first  # and nothing is left behind by other plans
    assert key(1, 0) != first
    assert key(0, 0) == first


def test_shuffles_within_and_across_buckets(corpus):
    buckets = _buckets(corpus)
    one, two = (plan.plan_epoch(*corpus, buckets, seed=0, epoch=epoch) for epoch in (0, 1))
    sizes = [batch.bucket.samples for batch in one]
    assert sizes != sorted(sizes)
    assert sizes != [batch.bucket.samples for batch in two]
    partners = [{frozenset(batch.ids.tolist()) for batch in planned} for planned in (one, two)]
    assert not partners[0] & partners[1]


def test_evaluation_is_by_duration(corpus):
    planned = plan.plan_epoch(*corpus, _buckets(corpus), seed=0, epoch=0, shuffle=False)
    ids = _ids(planned)
    assert (np.diff(corpus[0][ids[ids >= 0]]) >= 0).all()
    assert [b.ids.tolist() for b in planned] == [
        b.ids.tolist()
        for b in plan.plan_epoch(*corpus, _buckets(corpus), seed=9, epoch=5, shuffle=False)
    ]


def test_speeds_are_drawn_evenly_and_lengths_follow(corpus):
    speeds = (0.9, 1.0, 1.1)
    slow = plan.perturbed_samples(corpus[0], 0.9)
    buckets = plan.choose_buckets(slow, corpus[1], count=6, batch_samples=16000 * 120)
    planned = plan.plan_epoch(*corpus, buckets, seed=0, epoch=0, speeds=speeds)
    drawn = np.concatenate([batch.speeds[batch.ids >= 0] for batch in planned])
    assert all(0.25 < (drawn == np.float32(speed)).mean() < 0.42 for speed in speeds)
    again = plan.plan_epoch(*corpus, buckets, seed=0, epoch=1, speeds=speeds)
    of = [{i: s for b in p for i, s in zip(b.ids, b.speeds, strict=True)} for p in (planned, again)]
    assert 0.5 < np.mean([of[0][i] != of[1][i] for i in range(len(corpus[0]))]) < 0.8
    # 0.9 is not a float32: 18000 / float32(0.9) would round up to 20001.
    assert plan.perturbed_samples(np.array([18000, 18001]), np.float32(0.9)).tolist() == [
        20000,
        20002,
    ]


def test_padding_fraction_counts_row_ends_and_filler_rows():
    bucket = plan.Bucket(samples=100, labels=8, rows=2)
    ones = np.ones(2, np.float32)
    planned = [
        plan.PlannedBatch(bucket, np.array([0, 1], np.int32), ones),
        plan.PlannedBatch(bucket, np.array([2, -1], np.int32), ones * np.float32(0.5)),
    ]
    assert plan.padding_fraction(planned, np.array([100, 50, 40])) == pytest.approx(
        1 - (100 + 50 + 80) / 400
    )
    assert plan.padding_fraction([], np.array([])) == 0


@pytest.mark.parametrize("speeds", [(1.0,), (0.9, 1.0, 1.1)])
def test_padding_on_librispeech(speeds, tmp_path):
    data = os.environ.get("SPEECH_JAX_TEST_DATA", "")
    root = pathlib.Path(data) / "LibriSpeech"
    if not data or not root.is_dir():
        pytest.skip(
            "SPEECH_JAX_TEST_DATA does not name a folder with LibriSpeech: real padding NOT checked"
        )
    source = sources.open_source("librispeech", root=root, split="train-clean-5", cache=tmp_path)
    samples = np.array([round(u.duration * 16000) for u in source.utterances])
    labels = np.array([len(u.text) for u in source.utterances])
    buckets = plan.choose_buckets(
        np.concatenate([plan.perturbed_samples(samples, speed) for speed in speeds]),
        np.tile(labels, len(speeds)),
        count=8,
        batch_samples=16000 * 120,
    )
    planned = plan.plan_epoch(samples, labels, buckets, seed=0, epoch=0, speeds=speeds)
    assert plan.padding_fraction(planned, samples) < 0.08


def test_errors(corpus):
    with pytest.raises(ValueError, match="no utterances"):
        plan.choose_buckets([], [], count=2, batch_samples=10)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        _buckets(corpus, count=0)
    buckets = _buckets(corpus)
    with pytest.raises(ValueError, match="no bucket holds utterance 0"):
        plan.plan_epoch([10**9], [1], buckets, seed=0, epoch=0)
    with pytest.raises(ValueError, match="no bucket holds utterance 0"):
        plan.plan_epoch([10], [10**6], buckets, seed=0, epoch=0)
    with pytest.raises(ValueError, match="speeds must be"):
        plan.plan_epoch(*corpus, buckets, seed=0, epoch=0, speeds=())
