import os
import pathlib
import sys

import numpy as np
import pytest
import soundfile

from speech_jax.data import audio, sources
from speech_jax.data.sources import synthetic

_COUNT = 24  # more than two processes' worth of chunks


def _open(root, split="train", **kwargs):
    kwargs = {"utterances": _COUNT} | kwargs
    return sources.open_source("synthetic", root=root, split=split, cache=root, **kwargs)


def _bytes(source):
    return [pathlib.Path(source.open(i)).read_bytes() for i in range(len(source.utterances))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    for split in synthetic.SPLITS:
        _open(root, split)
    return root


def test_sentences_and_voices_are_in_one_split_only():
    lines = {split: list(synthetic.utterances(split, 3000, 0)) for split in synthetic.SPLITS}
    texts = {split: {line["text"] for line in rows} for split, rows in lines.items()}
    voices = {split: {line["speaker"] for line in rows} for split, rows in lines.items()}
    for some, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not texts[some] & texts[other]
        assert not voices[some] & voices[other]
        assert not set(synthetic.VARIANTS[some]) & set(synthetic.VARIANTS[other])
    assert len(texts["test"]) == len(lines["test"])
    words = {split: set(" ".join(texts[split]).split()) for split in texts}
    assert words["test"] <= words["train"]
    assert words["dev"] <= words["train"]
    assert len(words["train"]) <= 100
    assert all(text.isupper() and text.isascii() for text in texts["train"])
    assert {voice.split("+")[0] for voice in voices["test"]} == set(synthetic.ACCENTS)


def test_other_seeds_and_sizes():
    def texts(count, seed):
        return [line["text"] for line in synthetic.utterances("train", count, seed)]

    assert texts(50, 0) == texts(80, 0)[:50]
    assert texts(50, 0) != texts(50, 1)


def test_speech_is_what_the_manifest_says(root):
    source = _open(root)
    assert len(source.utterances) == _COUNT
    assert len({u.tags["speaker"] for u in source.utterances}) > _COUNT // 2
    for i, utterance in enumerate(source.utterances):
        info = soundfile.info(source.open(i))
        assert (info.samplerate, info.channels, info.format) == (16000, 1, "FLAC")
        samples = audio.decode(source.open(i), 16000)
        assert len(samples) / 16000 == pytest.approx(utterance.duration, abs=1e-4)
        # A human pace, few enough labels for 40 ms frames, and neither silence nor clipping.
        assert 5 < len(utterance.text) / utterance.duration < 22
        level = np.abs(samples.astype(int))
        assert 2000 < level.max() < 32000
        loud = np.flatnonzero(level > 0.05 * level.max())
        assert loud[0] < 0.4 * 16000
        assert loud[-1] > len(samples) - 0.4 * 16000


def test_speech_does_not_depend_on_processes_or_size(root, tmp_path):
    expected = _bytes(_open(root))
    again = _open(tmp_path, utterances=_COUNT + 9, processes=3)
    assert _bytes(again)[:_COUNT] == expected
    assert _bytes(_open(root, "test")) != expected


def test_kept_on_disk_and_whole(root, monkeypatch):
    assert sorted(p.name for p in (root / "synthetic").iterdir()) == sorted(
        f"v1-seed0-{split}-{_COUNT}" for split in synthetic.SPLITS
    )
    monkeypatch.setattr(synthetic, "_speak_all", None)  # it is not spoken again
    assert len(_open(root, "dev").utterances) == _COUNT


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ACCENTS", ("en-atlantis",))
    with pytest.raises(sources.SourceError, match=r"espeak-ng failed: .*no voice en-atlantis"):
        _open(tmp_path)
    assert not list((tmp_path / "synthetic").iterdir())


def test_without_espeak_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(sources.SourceError, match=r"pip install 'speech_jax\[quickstart\]'"):
        _open(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sizes_by_split(root):
    sizes = {"dev": _COUNT, "train": 10**9}
    assert len(_open(root, "dev", utterances=sizes).utterances) == _COUNT
    with pytest.raises(sources.SourceError, match="utterances is 1000000000"):
        _open(root, "train", utterances=sizes)


def test_errors(tmp_path):
    with pytest.raises(sources.SourceError, match="no split 'valid'; it has train, dev, test"):
        _open(tmp_path, "valid")
    with pytest.raises(sources.SourceError, match="utterances is 0"):
        _open(tmp_path, utterances=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(sources.SourceError, match=r"cannot be written .* SPEECH_JAX_CACHE"):
        _open(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
