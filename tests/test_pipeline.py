"""From a source to batches: what is used, what is left out and why, and the same rows for ever."""

import dataclasses
import json
import os
import pathlib
import types

import numpy as np
import pytest
import soundfile

from speech_jax.data import audio, pipeline, sources, text
from speech_jax.data.parts.audio import Audio, Crop, Noise, open_noise
from speech_jax.data.parts.category import Category
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.plan import Plan, stretched_length
from speech_jax.tasks.recognize import Recognize

_RATE = 8000
_SPEEDS = (0.9, 1.0, 1.1)
_AUDIO = Audio(sample_rate=_RATE)
_TRANSCRIPT = Transcript(text.CharacterTokenizer("ABC"))
_SIZES = (("samples", "audio"), ("labels", "labels"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 tones of 0.3 to 1.5 s, each of its own pitch, and what each "says"."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        seconds = round(float(rng.uniform(0.3, 1.5)), 2)
        time = np.arange(round(seconds * _RATE)) / _RATE
        tone = 8000 * np.sin(2 * np.pi * (200 + 50 * i) * time)
        soundfile.write(folder / f"{i:02d}.wav", tone.astype(np.int16), _RATE)
        words = "".join(rng.choice(list("ABC"), size=rng.integers(1, 6)))
        rows.append({"audio_filepath": f"{i:02d}.wav", "duration": seconds, "text": words})
    _write(folder, rows)
    return folder


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    for i in range(3):
        samples = np.random.default_rng(i).normal(0, 2000, _RATE).astype(np.int16)
        soundfile.write(folder / f"{i}.wav", samples, _RATE)
    return open_noise(folder, probability=0.7, snr_db=(5, 20))


@pytest.fixture(scope="module")
def corpus(folder):
    return _corpus(folder)


def _write(folder, rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _source(folder):
    return sources.open_source(
        "manifest", root=folder, split="train", cache=folder, trust_durations=True
    )


def _corpus(folder, **kwargs):
    parts = {"audio": _AUDIO, "labels": _TRANSCRIPT}
    return pipeline.make_corpus(_source(folder), parts, **kwargs)


def _buckets(corpus, **changes):
    settings = {"along": "samples", "count": 3, "budget": 6 * _RATE, "rows_multiple": 4}
    return corpus.buckets(**settings | {"round_to": _RATE // 10, "speeds": _SPEEDS} | changes)


def _plan(corpus, **changes):
    buckets = changes.pop("buckets", None) or _buckets(corpus)
    settings = {"seed": 3, "speeds": _SPEEDS, "stretched": corpus.stretched}
    return Plan(corpus.lengths, "samples", buckets, **settings | changes)


def _with_noise(corpus, noise):
    noisy = dataclasses.replace(corpus.parts["audio"], noise=noise)
    return dataclasses.replace(corpus, parts={**corpus.parts, "audio": noisy})


def _take(corpus, count=None, plan=None, noise=None, **kwargs):
    """All batches, or so many of them, with noise in the audio or without."""
    corpus = _with_noise(corpus, noise) if noise else corpus
    iterator = pipeline.batches(corpus, plan or _plan(corpus), **{"threads": 2} | kwargs)
    try:
        return [next(iterator) for _ in range(count)] if count else list(iterator)
    finally:
        iterator.close()


def _assert_equal(some, other):
    assert len(some) == len(other)
    for one, two in zip(some, other, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)
            assert one[key].dtype == two[key].dtype


def test_batches_hold_the_utterances(corpus):
    seen = []
    for batch in _take(corpus, plan=_plan(corpus, speeds=(1.0,)), repeat=False):
        rows = len(batch["index"])
        assert {key: value.dtype for key, value in batch.items()} == {
            "audio": np.int16,
            "audio_length": np.int32,
            "labels": np.int32,
            "labels_length": np.int32,
            "weight": np.float32,
            "index": np.int32,
        }
        sizes = tuple((name, batch[key].shape[1]) for name, key in _SIZES)
        assert (rows, sizes) in _buckets(corpus)
        for row in range(rows):
            place, length = batch["index"][row], batch["audio_length"][row]
            labels = batch["labels"][row][: batch["labels_length"][row]]
            assert not batch["audio"][row][length:].any()
            assert not batch["labels"][row][len(labels) :].any()
            if place < 0:
                assert (batch["weight"][row], length, len(labels)) == (0, 0, 0)
                continue
            utterance = corpus.source.utterances[place]
            samples, _ = soundfile.read(corpus.source.open(place), dtype="int16")
            np.testing.assert_array_equal(batch["audio"][row][:length], samples)
            assert (
                _TRANSCRIPT.read({key: array[row] for key, array in batch.items()})
                == utterance.text
            )
            assert batch["weight"][row] == 1
            seen.append(place)
    assert sorted(seen) == list(range(24))


def test_resume_at_every_position(corpus, noise):
    whole = _take(corpus, 14, noise=noise)  # more than three epochs
    for start in range(len(whole)):
        _assert_equal(_take(corpus, len(whole) - start, noise=noise, start=start), whole[start:])
    iterator = pipeline.batches(_with_noise(corpus, noise), _plan(corpus))
    for position, batch in enumerate(whole):
        assert iterator.get_state() == {"next_index": position}
        _assert_equal([next(iterator)], [batch])
    iterator.set_state({"next_index": 5})
    _assert_equal([next(iterator)], whole[5:6])
    iterator.close()


@pytest.mark.parametrize("count", [2, 4])
def test_the_data_do_not_depend_on_the_number_of_hosts(corpus, noise, count):
    alone = _take(corpus, 9, noise=noise)
    hosts = [
        _take(corpus, 9, noise=noise, process_index=i, process_count=count) for i in range(count)
    ]
    together = [
        {key: np.concatenate([batch[key] for batch in shares]) for key in shares[0]}
        for shares in zip(*hosts, strict=True)
    ]
    _assert_equal(together, alone)


def test_the_data_do_not_depend_on_threads(corpus, noise):
    _assert_equal(
        _take(corpus, 9, noise=noise, threads=0), _take(corpus, 9, noise=noise, threads=5)
    )


def test_every_epoch_covers_the_corpus_at_the_planned_speeds(corpus):
    counts = [_plan(corpus).count(epoch) for epoch in range(4)]
    batches = iter(_take(corpus, sum(counts)))
    lengths = []
    for count in counts:
        epoch = [next(batches) for _ in range(count)]
        index = np.concatenate([batch["index"] for batch in epoch])
        length = np.concatenate([batch["audio_length"] for batch in epoch])
        assert sorted(index[index >= 0]) == list(range(24))
        order = np.argsort(index)[-24:]
        lengths.append(length[order])
        possible = [stretched_length(corpus.lengths["samples"], speed) for speed in _SPEEDS]
        assert (np.stack(possible) == lengths[-1]).any(axis=0).all()
    assert len({tuple(length) for length in lengths}) == 4


def test_evaluation_is_one_pass_by_duration(corpus):
    plan = _plan(corpus, shuffle=False, speeds=(1.0,))
    batches = _take(corpus, plan=plan, repeat=False)
    index = np.concatenate([batch["index"] for batch in batches])
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert sorted(index[weight > 0]) == list(range(24))
    assert (index[weight == 0] == -1).all()
    assert (np.diff(corpus.lengths["samples"][index[weight > 0]]) >= 0).all()


def test_noise_is_added_to_its_share_and_to_nothing_else(corpus, noise):
    plan = _plan(corpus, speeds=(1.0,))
    clean, noisy = _take(corpus, 10, plan), _take(corpus, 10, plan, noise)
    changed = []
    for one, two in zip(clean, noisy, strict=True):
        np.testing.assert_array_equal(one["index"], two["index"])
        for row in np.flatnonzero(one["weight"]):
            length = one["audio_length"][row]
            speech, sound = (b["audio"][row][:length].astype(float) for b in (one, two))
            added = np.mean((sound - speech) ** 2)
            changed.append(added > 0)
            if added:
                assert 4.9 < 10 * np.log10(np.mean(speech**2) / added) < 20.1
    assert 0.5 < np.mean(changed) < 0.9
    for probability in (0.0, 1.0):
        sometimes = open_noise(
            os.path.dirname(noise.files[0]), probability=probability, snr_db=(10, 10)
        )
        batch = _take(corpus, 1, plan, sometimes)[0]
        real = batch["weight"] > 0
        same = (batch["audio"] == clean[0]["audio"]).all(axis=1)
        assert (same[real] == (probability == 0)).all()


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the corpus with a truncated, a vanishing and a wrongly measured file."""
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    corpus = _corpus(tmp_path)
    cut = tmp_path / "03.wav"
    cut.write_bytes(cut.read_bytes()[:1000])
    (tmp_path / "07.wav").unlink()
    soundfile.write(tmp_path / "11.wav", np.ones(_RATE * 9, np.int16), _RATE)
    return corpus


def test_audio_that_cannot_be_loaded_is_skipped_and_named(damaged, corpus):
    batches = _take(damaged, repeat=False, on_error="skip")
    index = np.concatenate([batch["index"] for batch in batches])
    bad = {3, 7, 11}
    assert sorted(index[index >= 0]) == sorted(set(range(24)) - bad)
    assert set(damaged.skipped) == {"03", "07", "11"}
    assert "truncated" in damaged.skipped["03"]
    assert "no such file" in damaged.skipped["07"]
    assert "lasts 9.00 s, its source states" in damaged.skipped["11"]
    # Only those rows differ from the batches of the undamaged corpus.
    for one, two in zip(batches, _take(corpus, repeat=False), strict=True):
        lost = np.isin(two["index"], list(bad))
        assert (one["weight"][lost] == 0).all()
        assert (one["labels_length"][lost] == 0).all()
        np.testing.assert_array_equal(one["index"][~lost], two["index"][~lost])
        np.testing.assert_array_equal(one["audio"][~lost], two["audio"][~lost])


def test_audio_that_cannot_be_loaded_raises(damaged):
    with pytest.raises(audio.AudioError, match=r"0[37]\.wav|utterance 11"):
        _take(damaged, repeat=False)


def _faulty(folder, tmp_path, number=5, **fields) -> pathlib.Path:
    """The manifest of the corpus with one utterance changed."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[number] |= fields
    for row in rows:
        row.setdefault("id", pathlib.Path(row["audio_filepath"]).stem)
        row["audio_filepath"] = str(folder / row["audio_filepath"])
    _write(tmp_path, rows)
    return tmp_path


# What a model with a frame for every 160 samples can align.
_UNUSABLE = Recognize(
    encoder=types.SimpleNamespace(output_lengths=lambda frames: frames),
    frontend=types.SimpleNamespace(lengths=lambda samples: samples // 160),
    counts={"labels": 4},
).unusable


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "ABÉ"}, r"unknown character: character 'É' \(U\+00C9"),
        ({"text": "ABCAAA" * 20}, r"not alignable: 120 labels need \d+ frames, the encoder makes"),
        # 7 labels and 6 blanks between them
        (
            {"text": "AAAAAAA", "duration": 0.25},
            "not alignable: 7 labels need 13 frames, the encoder makes 12 of this audio",
        ),
        ({"duration": 1e-9}, "too short: 0.00 s"),
    ],
)
def test_what_cannot_be_used(folder, tmp_path, fields, reason):
    root = _faulty(folder, tmp_path, **fields)
    with pytest.raises(pipeline.CorpusError, match=f"utterance 05: {reason}.*on_error='skip'"):
        _corpus(root, unusable=_UNUSABLE)
    corpus = _corpus(root, unusable=_UNUSABLE, on_error="skip")
    assert list(corpus.left_out) == ["05"]
    kinds = ("unknown character", "not alignable", "too short")
    assert corpus.left_out["05"].split(":")[0] in kinds
    assert 5 not in corpus.index
    assert len(corpus) == 23
    whole = _corpus(folder)
    for name, lengths in corpus.lengths.items():  # the others are as long as ever
        np.testing.assert_array_equal(lengths, np.delete(whole.lengths[name], 5))


def test_alignable_at_every_speed(folder, tmp_path):
    root = _faulty(folder, tmp_path, text="ABCABCABCABC", duration=0.24)
    assert len(_corpus(root, unusable=_UNUSABLE)) == 24
    with pytest.raises(pipeline.CorpusError, match="not alignable: 12 labels need 12 frames"):
        _corpus(root, unusable=_UNUSABLE, max_speed=1.1)


def test_an_utterance_that_lacks_a_part(folder, tmp_path):
    source = _source(_faulty(folder, tmp_path, speaker="eve"))
    parts = {"audio": _AUDIO, "who": Category(("eve",), name="who", tag="speaker", unseen=True)}
    with pytest.raises(pipeline.CorpusError, match="utterance 00: no speaker: "):
        pipeline.make_corpus(source, parts)
    corpus = pipeline.make_corpus(source, parts, on_error="skip")
    assert corpus.index.tolist() == [5]
    assert len(corpus.left_out) == 23
    # An evaluation leaves none out: there are just no classes to compare with.
    lenient = {name: part.for_evaluation() for name, part in parts.items()}
    corpus = pipeline.make_corpus(source, lenient)
    assert len(corpus) == 24
    plan = Plan(corpus.lengths, "samples", _buckets(corpus), stretched=corpus.stretched)
    for batch in _take(corpus, plan=plan, repeat=False):
        np.testing.assert_array_equal(batch["who"], np.where(batch["index"] == 5, 0, -1))


def test_limits_leave_out_and_name(folder):
    corpus = _corpus(folder, min_seconds=0.6, max_seconds=1.2)
    seconds = np.array([u.duration for u in corpus.source.utterances])
    kept = (seconds >= 0.6) & (seconds <= 1.2)
    assert corpus.index.tolist() == np.flatnonzero(kept).tolist()
    assert len(corpus.left_out) == (~kept).sum()
    assert {reason[: len("too short")].strip() for reason in corpus.left_out.values()} == {
        "too short",
        "too long:",
    }
    # Places in batches are those of the source, not of what is left of it.
    index = np.concatenate([batch["index"] for batch in _take(corpus, repeat=False)])
    assert sorted(index[index >= 0]) == np.flatnonzero(kept).tolist()


def test_what_the_source_skipped_is_left_out(folder, tmp_path):
    root = _faulty(folder, tmp_path, audio_filepath="absent.wav")
    source = sources.open_source("manifest", root=root, split="train", cache=root, on_error="skip")
    corpus = pipeline.make_corpus(source, {"audio": _AUDIO})
    assert len(corpus) == 23
    assert corpus.left_out == source.skipped != {}


def test_nothing_left(folder):
    with pytest.raises(pipeline.CorpusError, match=r"no utterances left to use \(24 too short\)"):
        _corpus(folder, min_seconds=100)


def test_audio_alone(folder):
    source = _source(folder)
    corpus = pipeline.make_corpus(source, {"audio": _AUDIO})
    assert len(corpus) == 24
    assert list(corpus.lengths) == ["samples"]
    assert _take(corpus, 1)[0].keys() == {"audio", "audio_length", "weight", "index"}
    assert corpus.seconds == pytest.approx(sum(u.duration for u in source.utterances))


def test_audio_alone_is_cropped_at_a_new_place_in_each_epoch(folder):
    source = _source(folder)
    cropped = {"audio": Crop(sample_rate=_RATE, longest=0.5)}
    corpus = pipeline.make_corpus(source, cropped, max_seconds=0.5)
    whole = pipeline.make_corpus(source, {"audio": _AUDIO}, max_seconds=0.5)
    assert len(corpus) == 24 > len(whole)
    assert corpus.lengths["samples"].max() == _RATE // 2
    heard = {}
    for batch in _take(corpus, 40, _plan(corpus, speeds=(1.0,))):
        for place, row, length in zip(
            batch["index"], batch["audio"], batch["audio_length"], strict=True
        ):
            if place >= 0:
                heard.setdefault(int(place), []).append(row[:length])
    longest = max(heard, key=lambda place: source.utterances[place].duration)
    whole = audio.decode(source.open(longest), _RATE)
    windows = np.lib.stride_tricks.sliding_window_view(whole, _RATE // 2)
    # A tone repeats itself: windows are told apart by their phase, so by where they start.
    places = {tuple(np.flatnonzero((windows == part).all(1))) for part in heard[longest]}
    assert () not in places
    assert len(places) > 1


def test_a_rounded_duration_is_not_a_fault(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    longest = max(rows, key=lambda row: row["duration"])
    root = _faulty(folder, tmp_path, rows.index(longest), duration=longest["duration"] - 0.06)
    corpus = _corpus(root)
    buckets = _buckets(corpus, round_to=_RATE // 100, speeds=(1.0,))
    plan = _plan(corpus, buckets=buckets, speeds=(1.0,))
    batches = _take(corpus, plan=plan, repeat=False)
    index = np.concatenate([batch["index"] for batch in batches])
    assert sorted(index[index >= 0]) == list(range(24))
    assert max(batch["audio_length"].max() for batch in batches) == buckets[-1].size("samples")


def test_noise_differs_from_epoch_to_epoch(corpus, noise):
    one = Noise(noise.files[:1], 1.0, (10, 10))
    heard = []
    for batch in _take(corpus, 20, _plan(corpus, speeds=(1.0,)), one):
        for row in np.flatnonzero(batch["index"] == 7):
            heard.append(batch["audio"][row][: batch["audio_length"][row]].tobytes())
    assert len(set(heard)) == len(heard) > 2


def test_batches_along_another_dimension(corpus):
    buckets = _buckets(corpus, along="labels", round_to=1, speeds=(1.0,))
    plan = Plan(corpus.lengths, "labels", buckets, shuffle=False)
    batches = _take(corpus, plan=plan, repeat=False)
    labels = np.concatenate([batch["labels_length"][batch["weight"] > 0] for batch in batches])
    assert len(labels) == 24
    assert (np.diff(labels) >= 0).all()
    assert len({batch["labels"].shape[1] for batch in batches}) > 1
    assert all(batch["audio"].size <= 6 * _RATE for batch in batches)


def test_a_fingerprint_is_of_the_utterances_and_their_lengths(folder, corpus, tmp_path):
    assert corpus.fingerprint() == _corpus(folder).fingerprint()
    found = {corpus.fingerprint(), _corpus(folder, min_seconds=0.6).fingerprint()}
    for number, changes in enumerate(({"text": "ABCABC"}, {"duration": 0.31}, {"id": "6"})):
        root = tmp_path / str(number)
        root.mkdir()
        found.add(_corpus(_faulty(folder, root, **changes)).fingerprint())
    assert len(found) == 5


def test_the_rows_of_a_batch_must_be_shared(corpus):
    with pytest.raises(ValueError, match="cannot be shared by 3 hosts"):
        pipeline.batches(corpus, _plan(corpus), process_count=3)
