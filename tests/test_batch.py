"""A batch is what its fields say: shapes and arrays agree, and padding stays padding."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.data.batch import (
    Bucket,
    Field,
    collate,
    length_key,
    shapes,
    signature,
    size_names,
)

_NAMES = ("samples", "labels", "frames")
_DTYPES = st.sampled_from(["int16", "int32", "float32", "uint8"])
_SIZES = st.lists(st.one_of(st.sampled_from(_NAMES), st.integers(1, 3)), max_size=3)
_FIELDS = st.dictionaries(
    st.sampled_from(["audio", "target", "video", "context"]),
    st.builds(Field, _DTYPES, _SIZES.map(tuple), st.integers(0, 9)),
    max_size=4,
)
_BUCKETS = st.builds(
    Bucket,
    st.integers(1, 5),
    st.tuples(*(st.tuples(st.just(name), st.integers(1, 6)) for name in _NAMES)),
)
_SEEDS = st.integers(0, 2**16)


def _rows(fields, bucket, rng):
    """Random rows: filler, rows that lack a field, arrays of any length along the first name."""
    rows = []
    for number in range(bucket.rows):
        if rng.random() < 0.3:
            rows.append(None)
            continue
        example = {}
        for name, field in fields.items():
            if rng.random() < 0.8:
                shape = [bucket.size(s) if isinstance(s, str) else s for s in field.sizes]
                if field.has_length:
                    shape[0] = rng.integers(shape[0] + 1)
                example[name] = rng.integers(10, 99, shape).astype(field.dtype)
        rows.append((10 + number, example))
    return rows


@settings(max_examples=80, deadline=None)
@given(_FIELDS, _BUCKETS, _SEEDS)
def test_a_batch_is_what_its_shapes_say(fields, bucket, seed):
    batch = collate(fields, bucket, _rows(fields, bucket, np.random.default_rng(seed)))
    expected = shapes(fields, bucket)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected
    lengths = {length_key(name) for name, field in fields.items() if field.has_length}
    assert batch.keys() == fields.keys() | lengths | {"weight", "index"}
    assert set(size_names(fields)) <= set(_NAMES)
    nothing = collate(fields, bucket, [None] * bucket.rows)
    assert signature(nothing) == signature(batch)
    as_shapes = {name: jax.ShapeDtypeStruct(*value) for name, value in expected.items()}
    assert signature(as_shapes) == signature(batch)


@settings(max_examples=80, deadline=None)
@given(_FIELDS, _BUCKETS, _SEEDS)
def test_rows_hold_their_arrays_and_nothing_else(fields, bucket, seed):
    rows = _rows(fields, bucket, np.random.default_rng(seed))
    batch = collate(fields, bucket, rows)
    for number, row in enumerate(rows):
        index, example = row or (-1, {})
        assert batch["index"][number] == index
        assert batch["weight"][number] == (row is not None)
        for name, field in fields.items():
            array = batch[name][number]
            if not field.has_length:
                np.testing.assert_array_equal(
                    array, example.get(name, np.full_like(array, field.fill))
                )
                continue
            own = example.get(name, np.zeros((0, *array.shape[1:])))
            length = batch[length_key(name)][number]
            assert length == len(own)
            np.testing.assert_array_equal(array[:length], own)
            assert (array[length:] == field.fill).all()


def test_what_is_longer_than_the_bucket_is_cut():
    fields = {"audio": Field("int16", ("samples",))}
    bucket = Bucket(1, (("samples", 3),))
    batch = collate(fields, bucket, [(0, {"audio": np.arange(5, dtype=np.int16)})])
    assert batch["audio"].tolist() == [[0, 1, 2]]
    assert batch["audio_length"].tolist() == [3]


def test_a_row_may_be_narrower_than_its_other_dimensions():
    fields = {"video": Field("uint8", ("frames", "pixels"), fill=7)}
    bucket = Bucket(1, (("frames", 2), ("pixels", 3)))
    batch = collate(fields, bucket, [(0, {"video": np.ones((1, 2), np.uint8)})])
    assert batch["video"].tolist() == [[[1, 1, 7], [7, 7, 7]]]
    assert batch["video_length"].tolist() == [1]


def test_signatures_tell_shapes_apart_and_not_the_share_of_the_rows():
    fields = {"audio": Field("int16", ("samples",)), "labels": Field("int32", ("labels",))}

    def batch(rows, samples, labels):
        bucket = Bucket(rows, (("samples", samples), ("labels", labels)))
        return collate(fields, bucket, [None] * rows)

    assert signature(batch(2, 8, 4)) == signature(batch(4, 8, 4))
    assert len({signature(batch(2, *sizes)) for sizes in ((8, 4), (8, 5), (9, 4), (4, 8))}) == 4
    assert str(Bucket(2, (("samples", 8), ("labels", 4)))) == "2 rows of 8 samples and 4 labels"


def test_a_bucket_without_a_dimension_of_the_fields():
    with pytest.raises(KeyError, match="labels"):
        shapes({"labels": Field("int32", ("labels",))}, Bucket(1, (("samples", 8),)))
