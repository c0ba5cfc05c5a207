"""Prepared data: what is written, what is read back, the command, and Beam."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile

tfds = pytest.importorskip("tensorflow_datasets", reason="the extra 'tfds' is not installed")

from speech_jax import errors  # noqa: E402 (after what needs the extra)
from speech_jax.data import audio, prepare, sources  # noqa: E402

# Apache Beam keeps protobuf below 7, whose version 6 warns of how TFDS reads its metadata.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")

RATE = 16000


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECH_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path) -> sources.Source:
    """Fourteen utterances of every kind: rates, channels, encodings, labels."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(14):
        rate = (8000, 16000, 22050)[number % 3]
        extension, subtype = (("flac", None), ("wav", "FLOAT"), ("ogg", "OPUS"))[number % 3]
        rate = 16000 if extension == "ogg" else rate
        shape = (rng.integers(rate // 4, rate), 1 + number % 2)
        path = tmp_path / "data" / f"{number:02}.{extension}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, shape), rate, subtype=subtype)
        row = {"audio_filepath": path.name, "text": f"TEXT {number} É", "speaker": str(number % 4)}
        rows.append(row | {"label": "odd" if number % 2 else ""})
    manifest = tmp_path / "data" / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.open_source("manifest", root=tmp_path / "data", split="train")


def open_prepared(root) -> sources.Source:
    return sources.open_source("prepared", root=root, split="train")


def folder_of(root) -> pathlib.Path:
    return root / "utterances" / "train" / "1.1.0"


def assert_same(prepared: sources.Source, corpus: sources.Source) -> None:
    assert prepared.utterances == corpus.utterances
    for index in range(len(corpus.utterances)):
        for rate in (8000, 16000):
            expected = audio.decode(corpus.open(index), rate)
            np.testing.assert_array_equal(audio.decode(prepared.open(index), rate), expected)


@pytest.mark.parametrize(
    ("workers", "shard_seconds", "least"), [(1, 9999, 1), (1, 0.4, 11), (2, 2, 3)]
)
def test_prepared_data_is_the_corpus_bit_for_bit(tmp_path, corpus, workers, shard_seconds, least):
    out = tmp_path / "out"
    hours = shard_seconds / 3600
    skipped = prepare.prepare(corpus, "train", out, workers=workers, shard_hours=hours)
    assert skipped == {}
    assert_same(open_prepared(out), corpus)
    shards = len(list(folder_of(out).glob("*.array_record-*")))
    assert shards >= least
    assert (shards == 1) == (least == 1)
    assert [path.name for path in out.iterdir()] == ["utterances"]


def test_flac_is_stored_as_it_is_and_the_rest_as_flac(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    for index in range(len(corpus.utterances)):
        content = prepared.open(index).read()
        assert content[:4] == b"fLaC"
        if corpus.open(index).endswith(".flac"):
            assert content == pathlib.Path(corpus.open(index)).read_bytes()


def test_the_format_is_that_of_tfds(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out")
    data = tfds.data_source("utterances/train", split="train", data_dir=tmp_path / "out")
    assert len(data) == 14
    record, utterance = data[3], corpus.utterances[3]
    assert record["text"].decode() == utterance.text
    assert json.loads(record["tags"]) == utterance.tags == {"speaker": "3", "label": "odd"}
    assert record["duration"] == pytest.approx(utterance.duration)
    assert record["samples"] / record["rate"] == utterance.duration
    assert "tensorflow" not in sys.modules


def test_a_split_that_is_there_stays_unless_overwritten(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out")
    fewer = sources.FileSource(corpus.utterances[:5], corpus.files[:5], {})
    prepare.prepare(fewer, "train", tmp_path / "out")
    assert len(open_prepared(tmp_path / "out").utterances) == 14
    prepare.prepare(fewer, "train", tmp_path / "out", overwrite=True)
    assert_same(open_prepared(tmp_path / "out"), fewer)


def test_another_split_can_be_added(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out")
    prepare.prepare(corpus, "dev-clean-2", tmp_path / "out")
    with pytest.raises(
        sources.SourceError, match=r"no prepared split 'test' .* dev-clean-2, train"
    ):
        sources.open_source("prepared", root=tmp_path / "out", split="test")


def test_audio_that_cannot_be_decoded_ends_it_with_nothing_written(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out")
    path = pathlib.Path(corpus.open(3))
    path.write_bytes(path.read_bytes()[:3000])
    for workers in (1, 2):
        with pytest.raises(sources.SourceError, match=rf"'03': .*{path.name}.*--on_error=skip"):
            prepare.prepare(corpus, "train", tmp_path / "new", workers=workers)
        assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(sources.SourceError):
        prepare.prepare(corpus, "train", tmp_path / "out", overwrite=True)
    assert len(open_prepared(tmp_path / "out").utterances) == 14


def test_audio_that_cannot_be_decoded_can_be_skipped(tmp_path, corpus):
    path = pathlib.Path(corpus.open(3))
    path.write_bytes(path.read_bytes()[:3000])
    skipped = prepare.prepare(
        corpus, "train", tmp_path / "out", on_error="skip", shard_hours=0.4 / 3600
    )
    assert list(skipped) == ["03"]
    keep = [index for index in range(14) if index != 3]
    kept = sources.FileSource(
        tuple(corpus.utterances[index] for index in keep),
        tuple(corpus.files[index] for index in keep),
        {},
    )
    assert_same(open_prepared(tmp_path / "out"), kept)
    for path in map(pathlib.Path, corpus.files):
        path.write_bytes(b"")
    with pytest.raises(sources.SourceError, match="every utterance of split 'train' was skipped"):
        prepare.prepare(corpus, "train", tmp_path / "none", on_error="skip")
    assert list((tmp_path / "none").iterdir()) == []


def test_a_name_that_tfds_cannot_have_is_an_error(tmp_path, corpus):
    with pytest.raises(sources.SourceError, match="split 'a/b' must be of letters"):
        prepare.prepare(corpus, "a/b", tmp_path / "out")


def test_prepared_data_is_not_prepared_again(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out")
    with pytest.raises(sources.SourceError, match="prepared already; copy its folder"):
        prepare.prepare(open_prepared(tmp_path / "out"), "train", tmp_path / "other")


DAMAGED_INDEXES = [None, "", "[1]", '["x", 1.0, "", {}]\n', "[" * 9000, '["x", 1, "", {}]\n' * 14]


@pytest.mark.parametrize("damage", [*DAMAGED_INDEXES, '["x", 1.0, "", {"a": 1}]\n' * 14])
def test_the_index_is_made_again_where_it_is_missing_or_damaged(tmp_path, corpus, damage):
    prepare.prepare(corpus, "train", tmp_path / "out")
    index = folder_of(tmp_path / "out") / "index.jsonl"
    whole = index.read_text()
    if damage is None:
        index.unlink()
    else:
        index.write_text(damage)
    assert open_prepared(tmp_path / "out").utterances == corpus.utterances
    assert index.read_text() == whole


class OldUtterances(prepare.Utterances, skip_registration=True):
    """What was written when speaker and label were columns and there were no other tags."""

    name = "utterances"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        info = super()._info()
        features = {name: info.features[name] for name in info.features if name != "tags"}
        features |= {name: tfds.features.Text() for name in ("speaker", "label")}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _shard_iterators_per_split(self, dl_manager):
        def as_it_was(shard):
            for key, example in shard():
                tags = json.loads(example.pop("tags"))
                yield key, example | {key: tags.get(key, "") for key in ("speaker", "label")}

        shards = [functools.partial(as_it_was, shard) for shard in self._shards]
        return {"train": shards}


@pytest.mark.parametrize("indexed", [True, False])
def test_data_that_an_older_version_prepared_opens_and_can_be_replaced(
    tmp_path, corpus, monkeypatch, indexed
):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "Utterances", OldUtterances)
        prepare.prepare(corpus, "train", tmp_path / "out")
    folder = tmp_path / "out" / "utterances" / "train" / "1.0.0"
    index = folder / "index.jsonl"
    rows = [
        [u.id, u.duration, u.text, u.tags.get("speaker", ""), u.tags.get("label", "")]
        for u in corpus.utterances
    ]
    index.write_text("".join(json.dumps(row) + "\n" for row in rows)) if indexed else index.unlink()
    assert_same(open_prepared(tmp_path / "out"), corpus)
    assert prepare.prepare(corpus, "train", tmp_path / "out") is None
    prepare.prepare(corpus, "train", tmp_path / "out", overwrite=True)
    assert_same(open_prepared(tmp_path / "out"), corpus)
    assert [path.name for path in folder.parent.iterdir()] == ["1.1.0"]


def test_segments_and_any_tags_are_prepared(tmp_path):
    samples = np.random.default_rng(0).normal(0, 2000, RATE).astype(np.int16)
    soundfile.write(tmp_path / "call.wav", samples, RATE)
    rows = [
        {"audio_filepath": "call.wav", "offset": 0.5 * i, "duration": 0.5, "translation": "é"}
        for i in (0, 1)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = sources.open_source("manifest", root=tmp_path, split="train")
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare.prepare(source, "train", out, workers=workers)
        prepared = open_prepared(out)
        assert prepared.utterances[0].tags == {"translation": "é"}
        np.testing.assert_array_equal(audio.decode(prepared.open(1), RATE), samples[8000:])
        assert_same(prepared, source)


def test_two_manifests_of_one_name_and_a_split_that_is_there_are_said(tmp_path, corpus):
    other = tmp_path / "data" / "other" / "train.jsonl"
    other.parent.mkdir()
    soundfile.write(other.parent / "z.wav", np.ones(RATE), RATE)
    other.write_text('{"audio_filepath": "z.wav", "text": "Z"}')
    arguments = ["--source=manifest", f"--root={tmp_path}/data", f"--out={tmp_path}/out"]
    failed = run(*arguments, f"--splits=train,{other}", "--workers=1", check=False)
    assert failed.returncode == 1
    assert "would be prepared as 'train', which another split" in failed.stderr
    again = run(*arguments, "--splits=train", "--workers=1")
    assert "is left as it is; --overwrite replaces it" in again.stdout


def test_missing_and_damaged_shards_are_errors(tmp_path, corpus):
    prepare.prepare(corpus, "train", tmp_path / "out", shard_hours=2 / 3600)
    shard = sorted(folder_of(tmp_path / "out").glob("*.array_record-*"))[1]
    content = bytearray(shard.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 64)
    content[middle] = bytes(byte ^ 255 for byte in content[middle])
    shard.write_bytes(content)
    source = open_prepared(tmp_path / "out")
    with pytest.raises(audio.AudioError, match=r"cannot be read from .* prepare the split again"):
        [source.open(index) for index in range(14)]
    for damage in (lambda: shard.write_bytes(b""), shard.unlink):
        damage()
        with pytest.raises(sources.SourceError, match=f"{shard.name} is missing or empty"):
            open_prepared(tmp_path / "out")
    (folder_of(tmp_path / "out") / "dataset_info.json").write_text("{")
    with pytest.raises(sources.SourceError, match="is damaged"):
        open_prepared(tmp_path / "out")


# ---- The command -------------------------------------------------------------------------------


def run(*arguments, check=True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "speech_jax.data.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_help_teaches():
    shown = run("--help", check=False).stdout
    for word in ("--source=librispeech --root=", "--splits", "--workers", "--beam_runner", "TFDS"):
        assert word in shown


def test_the_command_prepares_and_reports(tmp_path, corpus):
    arguments = ["--source=manifest", f"--root={tmp_path}/data", f"--out={tmp_path}/out"]
    shown = run(*arguments, "--splits=train", "--workers=2")
    assert "train: " in shown.stdout
    assert "0 utterances skipped" in shown.stdout
    assert_same(open_prepared(tmp_path / "out"), corpus)
    pathlib.Path(corpus.open(2)).write_bytes(b"")
    failed = run(*arguments, "--splits=train", "--overwrite", check=False)
    assert failed.returncode == 1
    assert "error: manifest " in failed.stderr
    assert "Traceback" not in failed.stderr
    by_path = f"--splits={tmp_path}/data/train.jsonl"
    manifest = tmp_path / "data" / "train.jsonl"
    manifest.write_text(manifest.read_text().replace('"text"', '"said"'))
    arguments.append("--arguments=text_key=said,trust_durations=False")
    shown = run(*arguments, by_path, "--overwrite", "--on_error=skip", "--workers=1")
    assert "1 utterances skipped" in shown.stdout
    assert "02.ogg: the file is empty" in shown.stdout
    assert [u.text for u in open_prepared(tmp_path / "out").utterances] == [
        u.text for u in corpus.utterances if u.text != "TEXT 2 É"
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text_kye=said", "unknown key 'text_kye' .did you mean 'text_key'"),
        ("text_key=5", "text_key=5 of a source of kind 'manifest' must be a text"),
        ("trust_durations=no", "trust_durations='no' .* must be True or False"),
        ("said", "--arguments=said: give NAME=VALUE"),
    ],
)
def test_arguments_that_a_source_does_not_take_are_named(tmp_path, corpus, given, message):
    with pytest.raises(errors.UserError, match=message):
        sources.open_source(
            "manifest", root=tmp_path / "data", split="train", **dict([prepare._argument(given)])
        )


@pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is not None, reason="the extra 'beam' is installed"
)
def test_without_beam_the_error_says_how_to_install_it(tmp_path, corpus):
    with pytest.raises(sources.SourceError, match=r"pip install 'speech_jax\[beam\]'"):
        prepare.prepare(corpus, "train", tmp_path / "out", beam_runner="DirectRunner")


@pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="the extra 'beam' is not installed: PREPARING ON BEAM IS NOT TESTED",
)
def test_beam_writes_the_same_data(tmp_path, corpus):
    # More than ten shards: TFDS 4.9.10 by itself puts shard 10 before shard 2.
    run(
        *("--source=manifest", f"--root={tmp_path}/data", f"--out={tmp_path}/out"),
        *("--splits=train", f"--shard_hours={0.3 / 3600}", "--beam_runner=DirectRunner"),
        "--beam_options=direct_num_workers=1",
    )
    assert len(list(folder_of(tmp_path / "out").glob("*.array_record-*"))) > 10
    assert_same(open_prepared(tmp_path / "out"), corpus)
    assert os.listdir(tmp_path / "out") == ["utterances"]
