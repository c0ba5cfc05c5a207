"""Every kind of source keeps one contract, and says clearly what is wrong with bad data."""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import threading
import unicodedata

import numpy as np
import pytest
import soundfile
from absl import logging

from speech_jax.data import audio, sources
from speech_jax.data.sources import archive, pieces
from speech_jax.errors import UserError

# Apache Beam keeps protobuf below 7, whose version 6 warns of how TFDS reads its metadata.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")

RATE = 16000
TEXTS = ["ONE TWO", "THREE", "FOUR FIVE SIX", "SEVEN EIGHT", "NINE", "ZERO ONE"]


def write_corpus(root: pathlib.Path, split: str, extension="flac", **kwargs) -> pathlib.Path:
    """Writes root/split in LibriSpeech's layout: 3 speakers, 2 chapters each, 2 utterances each."""
    rng = np.random.default_rng(0)
    for speaker in (7, 19, 103):
        for chapter in (2, 31):
            folder = root / split / str(speaker) / str(chapter)
            folder.mkdir(parents=True)
            lines = []
            for number in range(2):
                name = f"{speaker}-{chapter}-{number:04}"
                samples = rng.normal(0, 2000, rng.integers(3000, 9000)).astype(np.int16)
                soundfile.write(folder / f"{name}.{extension}", samples, RATE, **kwargs)
                lines.append(f"{name} {TEXTS[rng.integers(len(TEXTS))]}\n")
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return root / split


def write_manifest(source: sources.Source, path: pathlib.Path, **extra) -> None:
    """Writes the utterances of `source` as a manifest, the last first."""
    with open(path, "w") as file:
        for index, utterance in reversed(list(enumerate(source.utterances))):
            row = {"id": utterance.id, "text": utterance.text} | utterance.tags
            row["audio_filepath"] = os.path.relpath(source.open(index), path.parent)
            file.write(json.dumps(row | extra) + "\n")


def make_segments(source: sources.Source, root: pathlib.Path) -> sources.Source:
    """Opens a manifest of segments of one recording: all utterances, end to end."""
    spoken = [audio.decode(source.open(i), RATE) for i in range(len(source.utterances))]
    soundfile.write(root / "call.flac", np.concatenate(spoken), RATE)
    offset, rows = 0, []
    for utterance, samples in zip(source.utterances, spoken, strict=True):
        row = {"audio_filepath": "call.flac", "offset": offset / RATE, "text": utterance.text}
        rows.append(row | {"id": utterance.id, "duration": len(samples) / RATE} | utterance.tags)
        offset += len(samples)
    (root / "segments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.open_source("manifest", root=root, split="segments")


def write_kaldi(source: sources.Source, folder: pathlib.Path, segments=()) -> None:
    """Writes a Kaldi data folder; `segments` are (utterance, recording, begin, end)."""
    folder.mkdir()
    files = {"wav.scp": [], "text": [], "utt2spk": []}
    for index, utterance in enumerate(source.utterances):
        files["wav.scp"].append(f"{utterance.id} {os.path.relpath(source.open(index), folder)}")
        files["text"].append(f"{utterance.id}\t{utterance.text} ")
        files["utt2spk"].append(f"{utterance.id} {utterance.tags['speaker']}\r")
    if segments:
        files["segments"] = [" ".join(map(str, segment)) for segment in segments]
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))


def write_common_voice(source: sources.Source, root: pathlib.Path) -> None:
    """Writes root/dev.tsv and root/clips."""
    (root / "clips").mkdir()
    lines = ["client_id\tpath\tsentence\tup_votes\tage"]
    for index, utterance in enumerate(source.utterances):
        path = pathlib.Path(source.open(index))
        (root / "clips" / path.name).write_bytes(path.read_bytes())
        lines.append(f"{utterance.tags['speaker']}\t{path.name}\t{utterance.text}\t\t")
    (root / "dev.tsv").write_text("\n".join(lines) + "\n")


def write_parquet(source: sources.Source, path: pathlib.Path, group=5, **columns) -> None:
    """Writes what `datasets.Dataset.to_parquet` does, some rows to a group."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for index, utterance in enumerate(source.utterances):
        file = pathlib.Path(source.open(index))
        sound = {"bytes": file.read_bytes(), "path": file.name}
        row = {"audio": sound, "sentence": utterance.text}
        rows.append(row | {"speaker_id": int(utterance.tags["speaker"])} | columns)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def open_folder(root, split="train", **kwargs):
    return sources.open_source("librispeech", root=root, split=split, **kwargs)


def spoken(test_data: str, name: str, split: str):
    if not test_data:
        pytest.skip("SPEECH_JAX_TEST_DATA is not set: REAL SPEECH IS NOT TESTED")
    return open_folder(pathlib.Path(test_data) / name, split)


def make_source(kind: str, root: pathlib.Path) -> sources.Source:
    """Opens a small source of the `kind`, made below `root`."""
    test_data = os.environ.get("SPEECH_JAX_TEST_DATA", "")
    if kind == "real opus":
        return spoken(test_data, "SpokenDigits", "dev")
    if kind == "real flac":
        return spoken(test_data, "LibriSpeech", "dev-clean-5-flac")
    if kind == "synthetic":
        pytest.importorskip("espeakng_loader", reason="the extra 'quickstart' is not installed")
        return sources.open_source("synthetic", root=root, split="dev", utterances=12)
    extension = kind.removeprefix("folder ") if kind.startswith("folder ") else "flac"
    subtype = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(extension, {})
    folder = write_corpus(root, "train", extension, **subtype)
    if kind == "archive":
        with tarfile.open(root / "train.tar.gz", "w:gz") as tar:
            tar.add(folder, "LibriSpeech/train")
        folder.rename(root / "original")
    source = open_folder(root)
    if kind == "manifest":
        write_manifest(source, root / "train.jsonl")
        return sources.open_source("manifest", root=root, split="train")
    if kind == "segments":
        return make_segments(source, root)
    if kind == "kaldi":
        write_kaldi(source, root / "kaldi")
        return sources.open_source("kaldi", root=root, split="kaldi")
    if kind == "common_voice":
        write_common_voice(source, root)
        return sources.open_source("common_voice", root=root, split="dev")
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
        write_parquet(source, root / "train-00000-of-00001.parquet")
        return sources.open_source("parquet", root=root, split="train")
    if kind == "prepared":
        pytest.importorskip("tensorflow_datasets", reason="the extra 'tfds' is not installed")
        from speech_jax.data import prepare

        prepare.prepare(source, "train", root / "prepared", shard_hours=1 / 3600)
        return sources.open_source("prepared", root=root / "prepared", split="train")
    if kind == "concatenated":
        write_corpus(root / "more", "other", "wav")
        for path in sorted((root / "more").rglob("*-*-*.wav")):
            path.rename(path.with_name(f"x{path.name}"))
        for path in (root / "more").rglob("*.trans.txt"):
            text = path.read_text()
            path.write_text("".join(f"x{line}\n" for line in text.splitlines()))
        return sources.concatenate([source, open_folder(root / "more", "other")])
    return source


KINDS = ["folder flac", "folder wav", "folder opus", "archive", "manifest", "prepared"]
KINDS += [
    "segments",
    "kaldi",
    "common_voice",
    "parquet",
    "synthetic",
    "concatenated",
    "real opus",
    "real flac",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECH_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEECH_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_source(request.param, tmp_path_factory.mktemp("data"))


def decode_all(source: sources.Source, indices) -> list[np.ndarray]:
    return [audio.decode(source.open(index), RATE) for index in indices]


# ---- The contract ------------------------------------------------------------------------------


def test_utterances_are_unique_sorted_and_have_text(source):
    ids = [utterance.id for utterance in source.utterances]
    assert ids
    assert ids == sorted(set(ids))
    assert all(utterance.text.strip() == utterance.text != "" for utterance in source.utterances)
    assert source.skipped == {}


def test_durations_are_those_of_the_audio(source):
    for index, utterance in enumerate(source.utterances):
        decoded = audio.decode(source.open(index), RATE)
        assert len(decoded) / RATE == pytest.approx(utterance.duration, abs=0.02)


def test_random_access_equals_reading_in_order(source):
    count = min(20, len(source.utterances))
    in_order = decode_all(source, range(count))
    for index in np.random.default_rng(0).permutation(count):
        np.testing.assert_array_equal(decode_all(source, [index])[0], in_order[index])


def test_threads_read_what_one_reads(source):
    serial = decode_all(source, range(min(10, len(source.utterances))))
    indices = list(range(len(serial))) * 8
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parallel = pool.map(lambda index: decode_all(source, [index])[0], indices)
        for index, samples in zip(indices, parallel, strict=True):
            np.testing.assert_array_equal(samples, serial[index])


def test_a_pickled_source_is_the_same(source):
    decode_all(source, [0])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.utterances == source.utterances
    for one, other in zip(decode_all(source, range(3)), decode_all(copy, range(3)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stream_that_there_is_not_is_named(source):
    name = source.utterances[0].id
    with pytest.raises(sources.SourceError, match=f"'{name}' has no stream 'video'; it has audio"):
        source.open(0, "video")


# ---- The same data in every form ---------------------------------------------------------------


SAME = ["archive", "manifest", "prepared", "segments", "kaldi", "common_voice", "parquet"]


@pytest.mark.parametrize("kind", SAME)
def test_every_form_of_a_corpus_gives_the_same_utterances(tmp_path, kind):
    write_corpus(tmp_path / "plain", "train")
    folder = open_folder(tmp_path / "plain")
    other = make_source(kind, tmp_path / kind)
    chapterless = [
        dataclasses.replace(one, tags={k: v for k, v in one.tags.items() if k != "chapter"})
        for one in (*folder.utterances, *other.utterances)
    ]  # which the layout of folders alone tells
    assert chapterless[: len(folder.utterances)] == chapterless[len(folder.utterances) :]
    everything = range(len(folder.utterances))
    for one, two in zip(decode_all(folder, everything), decode_all(other, everything), strict=True):
        np.testing.assert_array_equal(one, two)


def test_texts_and_speakers_are_those_of_the_layout(tmp_path):
    folder = write_corpus(tmp_path, "train")
    found = {u.id: u for u in open_folder(tmp_path).utterances}
    line = (folder / "103/31/103-31.trans.txt").read_text().splitlines()[1]
    assert f"103-31-0001 {found['103-31-0001'].text}" == line
    assert found["103-31-0001"].tags == {"speaker": "103", "chapter": "31"}
    assert len(found) == 12


def test_an_archive_unpacked_by_hand_needs_no_move(tmp_path):
    write_corpus(tmp_path / "LibriSpeech", "train")
    assert len(open_folder(tmp_path).utterances) == 12


def test_an_archive_is_unpacked_once_beside_it(tmp_path):
    source = make_source("archive", tmp_path)
    assert source.open(0).startswith(str(tmp_path / "train"))
    (tmp_path / "train.tar.gz").unlink()
    assert open_folder(tmp_path) == source


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_an_archive_in_a_read_only_root_is_unpacked_into_the_cache(tmp_path):
    make_source("archive", tmp_path / "data")
    subprocess.run(["rm", "-r", tmp_path / "data" / "train"], check=True)
    (tmp_path / "data").chmod(0o555)
    source = open_folder(tmp_path / "data")
    assert source.open(0).startswith(str(tmp_path / "cache"))
    (tmp_path / "data").chmod(0o755)


def test_a_manifest_takes_what_nemo_writes(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(8000, np.int16), RATE)
    rows = [
        {"audio_filepath": "a.wav", "duration": 0.4999, "text": "ONE"},
        {"audio_filepath": f"{tmp_path}/b/../a.wav", "id": "b", "speaker": 12, "text": None},
    ]
    (tmp_path / "b").mkdir()
    text = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "dev.jsonl").write_text(text, "utf-8")
    second = sources.Utterance("b", 0.5, tags={"speaker": "12"})
    expected = (sources.Utterance("a", 0.5, "ONE"), second)
    for root, split in [(tmp_path, "dev"), (tmp_path, "dev.jsonl"), (".", tmp_path / "dev.jsonl")]:
        opened = sources.open_source("manifest", root=root, split=str(split))
        assert opened.utterances == expected
    trusting = sources.open_source("manifest", root=tmp_path, split="dev", trust_durations=True)
    assert [utterance.duration for utterance in trusting.utterances] == [0.4999, 0.5]


# ---- Durations are read once -------------------------------------------------------------------


def test_durations_are_kept_until_a_file_changes(tmp_path):
    folder = write_corpus(tmp_path, "train")
    first = open_folder(tmp_path)
    (kept,) = (tmp_path / "cache" / "durations").iterdir()
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(row[0] for row in rows) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.flac")
    )
    # What is kept is what is used: a changed figure shows...
    kept.write_text("".join(json.dumps([*row[:3], 99.0]) + "\n" for row in rows))
    assert {u.duration for u in open_folder(tmp_path).utterances} == {99.0}
    # ... until a file is no longer the one that was read.
    changed = folder / "7" / "2" / "7-2-0000.flac"
    os.utime(changed, (1, 1))
    durations = {u.id: u.duration for u in open_folder(tmp_path).utterances}
    assert durations.pop("7-2-0000") == first.utterances[8].duration
    assert set(durations.values()) == {99.0}
    kept.write_text("damaged")
    assert open_folder(tmp_path).utterances == first.utterances


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    write_corpus(tmp_path, "train")
    (tmp_path / "file").write_text("in the way")
    source = open_folder(tmp_path, cache=tmp_path / "file" / "cache")
    assert len(source.utterances) == 12


def test_sources_import_neither_jax_nor_tensorflow():
    code = "import sys, speech_jax.data.sources; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert not {"jax", "tensorflow", "tensorflow_datasets"} & set(modules.decode().split())


# ---- Bad data ----------------------------------------------------------------------------------


def remove_transcript(folder):
    path = folder / "7/2/7-2.trans.txt"
    path.write_text(path.read_text().split("\n", 1)[1])


def repeat_transcript(folder):
    path = folder / "7/2/7-2.trans.txt"
    path.write_text(path.read_text() + "7-2-0001 AGAIN\n")


BAD_FOLDERS = {
    "transcript without audio; add the file 7-2-0000.flac": lambda folder: (
        folder / "7/2/7-2-0000.flac"
    ).unlink(),
    "7-2-0000.flac: audio without transcript; add its line": remove_transcript,
    "7-2-0000.flac: empty transcript": lambda folder: (folder / "7/2/7-2.trans.txt").write_text(
        "7-2-0000\n7-2-0001 TEXT\n"
    ),
    "7-2-0000.flac: the file is empty": lambda folder: (folder / "7/2/7-2-0000.flac").write_bytes(
        b""
    ),
    "7-2-0000.flac: not audio": lambda folder: (folder / "7/2/7-2-0000.flac").write_bytes(
        b"not audio" * 99
    ),
    "7-2-0000.wav: second audio file of '7-2-0000'": lambda folder: soundfile.write(
        folder / "7/2/7-2-0000.wav", np.ones(99), RATE
    ),
    "7-2.trans.txt:3: second transcript of '7-2-0001'": repeat_transcript,
    "7-2.trans.txt: not UTF-8": lambda folder: (folder / "7/2/7-2.trans.txt").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_a_bad_utterance_is_named_or_skipped(tmp_path, message):
    folder = write_corpus(tmp_path, "train")
    BAD_FOLDERS[message](folder)
    with pytest.raises(sources.SourceError, match=r"split 'train' of .*on_error='skip'") as error:
        open_folder(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    source = open_folder(tmp_path, on_error="skip")
    named = "; ".join(f"{name}: {why}" for name, why in source.skipped.items())
    assert message in named
    assert 10 <= len(source.utterances) <= 12
    assert all(utterance.text for utterance in source.utterances)
    decode_all(source, range(len(source.utterances)))


def test_a_truncated_wav_is_found_when_opening(tmp_path):
    folder = write_corpus(tmp_path, "train", "wav")
    path = folder / "7/2/7-2-0000.wav"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(sources.SourceError, match=r"7-2-0000\.wav: truncated"):
        open_folder(tmp_path)


def test_several_bad_utterances_are_counted(tmp_path):
    folder = write_corpus(tmp_path, "train")
    for path in sorted(folder.rglob("*.flac"))[:3]:
        path.unlink()
    with pytest.raises(sources.SourceError, match="2 more"):
        open_folder(tmp_path)
    assert len(open_folder(tmp_path, on_error="skip").skipped) == 3


def test_a_split_of_which_nothing_is_left_is_an_error(tmp_path):
    folder = write_corpus(tmp_path, "train")
    for path in folder.rglob("*.flac"):
        path.write_bytes(b"")
    with pytest.raises(sources.SourceError, match="nothing else is left"):
        open_folder(tmp_path, on_error="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'audio_filepath': 'a.wav'}", "malformed JSON"),
        ('{"audio_filepath": "a.wav"', "malformed JSON"),
        ('["a.wav"]', "a JSON list where an object"),
        ('{"text": "ONE"}', "no audio_filepath"),
        ('{"audio_filepath": ""}', "no audio_filepath"),
        ('{"audio_filepath": "a.wav", "duration": -1}', "duration is -1"),
        ('{"audio_filepath": "a.wav", "duration": NaN}', "duration is nan"),
        ('{"audio_filepath": "a.wav", "duration": "1"}', "duration is '1'"),
        ('{"audio_filepath": "a.wav", "text": ["ONE"]}', "text is \\['ONE'\\]"),
        ('{"audio_filepath": "good.wav", "offset": 1.5}', "offset 1.5 and duration .* lead"),
        ('{"audio_filepath": "good.wav", "offset": -1}', "offset is -1; it must be seconds, 0 or"),
        ('{"audio_filepath": "good.wav", "offset": "1"}', "offset is '1'"),
        (
            '{"audio_filepath": "good.wav", "offset": 0, "duration": 2}',
            "offset 0 and duration 2 lead",
        ),
        ('{"audio_filepath": "good.wav"}', "id 'good' is also that of .*dev\\.jsonl:1"),
        ('{"audio_filepath": "a.wav", "label": ["b"]}', r"label is \['b'\]"),
        ('{"audio_filepath": "\udcff"}', "not UTF-8"),
    ],
)
def test_a_bad_manifest_line_is_named_or_skipped(tmp_path, line, message):
    soundfile.write(tmp_path / "good.wav", np.ones(800), RATE)
    text = f'{{"audio_filepath": "good.wav"}}\n{line}\n'
    (tmp_path / "dev.jsonl").write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(sources.SourceError, match=rf"dev\.jsonl:2: {message}"):
        sources.open_source("manifest", root=tmp_path, split="dev")
    source = sources.open_source("manifest", root=tmp_path, split="dev", on_error="skip")
    assert [utterance.id for utterance in source.utterances] == ["good"]
    assert list(source.skipped) == [f"{tmp_path}/dev.jsonl:2"]


def test_a_path_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"audio_filepath": "a\\u0000b.wav"}')
    with pytest.raises(sources.SourceError, match=r"cannot be read .*null"):
        sources.open_source("manifest", root=tmp_path, split="dev")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"", "empty"), (b"x" * 99, "not audio")]
)
def test_a_bad_file_in_a_manifest_is_named_or_skipped(tmp_path, content, message):
    soundfile.write(tmp_path / "good.wav", np.ones(800), RATE)
    if content is not None:
        (tmp_path / "bad.wav").write_bytes(content)
    rows = [{"audio_filepath": "good.wav"}, {"audio_filepath": "bad.wav", "duration": 1}]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(sources.SourceError, match=rf"bad\.wav: .*{message}"):
        sources.open_source("manifest", root=tmp_path, split="dev")
    source = sources.open_source("manifest", root=tmp_path, split="dev", on_error="skip")
    assert list(source.skipped) == [f"{tmp_path}/bad.wav"]


def test_absent_data_is_an_error_that_says_what_there_is(tmp_path):
    write_corpus(tmp_path, "train-small")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "dev.jsonl").write_text("")

    def message(kind="librispeech", root=tmp_path, split="train", **kwargs):
        with pytest.raises(sources.SourceError) as error:
            sources.open_source(kind, root=root, split=split, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "it has train-small, and those that can be downloaded are dev-clean" in message()
    assert f"the data root {tmp_path}/no does not exist" in message(root=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert "'hollow' is empty" in message(split="hollow")
    assert "splits with data in" in message(split="hollow")
    assert "train-small" in message(split="hollow")
    assert "no manifest" in message("manifest")
    assert "has dev" in message("manifest")
    assert "dev.jsonl is empty" in message("manifest", split="dev")
    assert "does not exist" in message("manifest", root=tmp_path / "no")
    assert "no split" in message(split="")
    assert "needs root" in message(root="")
    assert f"known: {', '.join(sources.SOURCES)}" in message("tfrecord")
    assert "on_error is 'ignore'" in message(on_error="ignore")


def test_an_official_split_is_downloaded_or_told_how_to_get(tmp_path):
    # Names resolve to nothing behind this proxy: a machine without a network.
    code = """
import sys
from speech_jax.data import sources
try:
    sources.open_source("librispeech", root=sys.argv[1], split="dev-clean-2")
except sources.SourceError as error:
    print(error)
"""
    environment = os.environ | {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    root = tmp_path / "LibriSpeech"
    command = [sys.executable, "-c", code, root]
    shown = subprocess.run(command, capture_output=True, check=True, env=environment, text=True)
    assert "'dev-clean-2' is not in" in shown.stdout
    assert "no connection to www.openslr.org" in shown.stdout
    assert "https://www.openslr.org/resources/31/dev-clean-2.tar.gz by hand" in shown.stdout
    assert "configs/quickstart.py" in shown.stdout
    assert not root.exists()


def test_an_official_split_is_downloaded_unpacked_and_opened(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "made", "dev-clean-2")
    packed = tmp_path / "served" / "dev-clean-2.tar.gz"
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, "LibriSpeech/dev-clean-2")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=packed.parent)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{packed.name}"
        monkeypatch.setitem(archive.ARCHIVES, "dev-clean-2", archive.Archive(url, "0" * 32))
        with pytest.raises(sources.SourceError, match="has the checksum"):
            open_folder(tmp_path / "root", "dev-clean-2")
        assert not (tmp_path / "root").exists()
        md5 = hashlib.md5(packed.read_bytes()).hexdigest()
        monkeypatch.setitem(archive.ARCHIVES, "dev-clean-2", archive.Archive(url, md5))
        source = open_folder(tmp_path / "root", "dev-clean-2")
        server.shutdown()
        thread.join()
    assert source.utterances == open_folder(tmp_path / "made", "dev-clean-2").utterances
    names = sorted(path.name for path in (tmp_path / "root").iterdir())
    assert names == ["dev-clean-2", "dev-clean-2.tar.gz"]


def test_a_bad_archive_is_a_source_error_and_leaves_nothing(tmp_path):
    (tmp_path / "train.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(sources.SourceError, match=r"damaged or no \.tar\.gz"):
        open_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar.gz"]


def test_a_part_is_drawn_with_the_seed(tmp_path):
    write_corpus(tmp_path, "train")
    source = open_folder(tmp_path)
    total = sum(utterance.duration for utterance in source.utterances)
    part = sources.draw(source, total / 2, seed=0)
    lasting = sum(utterance.duration for utterance in part.utterances)
    assert total / 2 <= lasting < total
    assert [u.id for u in part.utterances] == sorted(u.id for u in part.utterances)
    for place, utterance in enumerate(part.utterances):
        assert utterance.id in str(part.open(place))
    assert part.utterances == sources.draw(source, total / 2, seed=0).utterances
    drawn = {sources.draw(source, 0.01, seed).utterances for seed in range(9)}
    assert len(drawn) > 1
    assert sources.draw(source, 2 * total, seed=0).utterances == tuple(source.utterances)


def test_utterances_with_a_tag_alone():
    utterances = [
        sources.Utterance(f"u{i}", 1.0, "A", {"speaker": speaker} if speaker else {})
        for i, speaker in enumerate(("a", "b", "", "a"))
    ]
    source = sources.FileSource(tuple(utterances), ("f0", "f1", "f2", "f3"), {})
    found = lambda tags: [one.id for one in sources.only(source, tags).utterances]
    assert found("speaker=a") == ["u0", "u3"]
    assert found("speaker!=a") == ["u1", "u2"]
    assert found(" speaker != a , speaker=b") == ["u1"]
    assert sources.only(source, "speaker=b").open(0) == "f1"
    for tags, message in {
        "speaker": "'speaker' is not a condition: write tag=value",
        "=a": "'=a' is not a condition",
        "spaeker=a": "no utterance has the tag 'spaeker'; tags are speaker",
        "speaker=c": "no utterance has speaker=c; there are a, b",
        "speaker=a,speaker=b": "leaves no utterance",
    }.items():
        with pytest.raises(sources.SourceError, match=message):
            sources.only(source, tags)


def test_a_split_named_twice_is_an_error(tmp_path):
    write_corpus(tmp_path, "train")
    source = open_folder(tmp_path)
    assert sources.concatenate([source]) is source
    with pytest.raises(sources.SourceError, match="'103-2-0000' is in more than one split"):
        sources.concatenate([source, source])


# ---- Segments, streams, Kaldi, Common Voice and Parquet ----------------------------------------


def test_segments_are_cut_exactly(tmp_path):
    rng = np.random.default_rng(0)
    call = rng.normal(0, 2000, 3 * RATE).astype(np.int16)
    soundfile.write(tmp_path / "call.flac", call, RATE)
    cuts = [(0, 0.5), (0.5, 1.0), (1.23456, 0.7), (2.5, None), (0, None)]
    with open(tmp_path / "train.jsonl", "w") as file:
        for number, (offset, seconds) in enumerate(cuts):
            row = {"audio_filepath": "call.flac", "offset": offset, "id": str(number)}
            file.write(json.dumps(row | ({"duration": seconds} if seconds else {})) + "\n")
    source = sources.open_source("manifest", root=tmp_path, split="train")
    for index, (offset, seconds) in enumerate(cuts):
        seconds = 3 - offset if seconds is None else seconds
        assert source.utterances[index].duration == seconds
        expected = call[round(offset * RATE) : round((offset + seconds) * RATE)]
        np.testing.assert_array_equal(audio.decode(source.open(index), RATE), expected)


def test_segments_without_ids_are_named_by_their_place(tmp_path):
    soundfile.write(tmp_path / "call.wav", np.ones(RATE), RATE)
    rows = [{"audio_filepath": "call.wav", "offset": 0.5 * i, "duration": 0.5} for i in (0, 1)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = sources.open_source("manifest", root=tmp_path, split="train")
    assert [u.id for u in source.utterances] == ["call@0.000-0.500", "call@0.500-1.000"]


def test_a_stated_duration_that_disagrees_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    soundfile.write(tmp_path / "a.wav", np.ones(RATE), RATE)
    (tmp_path / "train.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 5}')
    source = sources.open_source("manifest", root=tmp_path, split="train")
    assert source.utterances[0].duration == 1
    assert "a states 5 s and lasts 1.00 s" in caplog.text
    assert "offset" in caplog.text


def test_other_keys_are_tags_and_other_files_are_streams(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(RATE), RATE)
    row = {"audio_filepath": "a.wav", "lang": "de", "age": 5, "noisy": True, "none": None}
    rows = [row | {"id": "a", "video_filepath": "a.mp4"}, row | {"id": "b", "words": "ONE TWO"}]
    rows[1]["text"] = ""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = sources.open_source("manifest", root=tmp_path, split="train")
    tags = {"language": "de", "age": "5", "noisy": "true"}
    assert source.utterances[0].tags == tags | {"video_filepath": "a.mp4"}
    assert source.utterances[1].tags == tags | {"words": "ONE TWO"}
    assert source.open(0, "video") == str(tmp_path / "a.mp4")
    with pytest.raises(sources.SourceError, match="'b' has no stream 'video'; it has audio"):
        source.open(1, "video")
    with pytest.raises(sources.SourceError, match="'a' has no stream 'lips'; it has audio, video"):
        sources.select(source, [0]).open(0, "lips")


def test_transcripts_under_another_key_are_named(tmp_path, caplog, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.ones(RATE), RATE)
    row = {"audio_filepath": "a.wav", "sentence": "ONE"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    sources.open_source("manifest", root=tmp_path, split="train")
    assert "no line has a 'text'" in caplog.text
    assert "set data.arguments.text_key to 'sentence'" in caplog.text
    source = sources.open_source("manifest", root=tmp_path, split="train", text_key="sentence")
    assert source.utterances[0].text == "ONE"


def test_an_argument_that_a_source_does_not_take_is_named(tmp_path):
    write_corpus(tmp_path, "train")
    with pytest.raises(UserError, match=r"'downlod' \(did you mean 'download'\?\)"):
        open_folder(tmp_path, downlod=False)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_either_unicode_form_are_found(tmp_path, form):
    other = "NFD" if form == "NFC" else "NFC"
    name = "é-ü-1"
    chapter = tmp_path / "train" / "1" / unicodedata.normalize(form, "ö")
    chapter.mkdir(parents=True)
    file = chapter / f"{unicodedata.normalize(form, name)}.flac"
    soundfile.write(file, np.ones(800), RATE)
    line = f"{unicodedata.normalize(other, name)} ONE"
    (chapter / "a.trans.txt").write_text(line, "utf-8")
    source = open_folder(tmp_path)
    assert [u.id for u in source.utterances] == [unicodedata.normalize("NFC", name)]
    stated = unicodedata.normalize(other, os.path.relpath(file, tmp_path))
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": stated}), "utf-8")
    source = sources.open_source("manifest", root=tmp_path, split="m")
    assert source.open(0) == str(file)


def test_kaldi_segments_commands_and_archives(tmp_path):
    write_corpus(tmp_path / "corpus", "train")
    corpus = open_folder(tmp_path / "corpus")
    first, second = (utterance.id for utterance in corpus.utterances[:2])
    segments = [("x", first, 0, 0.1), ("y", first, 0.1, -1), ("z", "absent", 0, 1)]
    segments += [("w", second, 5, 6), ("v", second, 1, 0.5), ("u", "cat", 0, 1), ("t", "ark", 0, 1)]
    folder = tmp_path / "kaldi"
    write_kaldi(corpus, folder, segments)
    (folder / "text").write_text("".join(f"{name[0]} ONE\n" for name in segments))
    with open(folder / "wav.scp", "a") as scp:
        scp.write("cat sph2pipe a.sph |\nark raw.ark:17\n")
    source = sources.open_source("kaldi", root=tmp_path, split="kaldi", on_error="skip")
    whole = audio.decode(corpus.open(0), RATE)
    assert [utterance.id for utterance in source.utterances] == ["x", "y"]
    np.testing.assert_array_equal(audio.decode(source.open(0), RATE), whole[:1600])
    np.testing.assert_array_equal(audio.decode(source.open(1), RATE), whole[1600:])
    why = "; ".join(f"{name}: {reason}" for name, reason in source.skipped.items())
    for part in ("z: its recording 'absent'", "w: offset 5 and duration 1 lead beyond the end"):
        assert part in why
    for part in ("v: '", "cat: a command, which is not run", "ark: part of an archive"):
        assert part in why
    with pytest.raises(sources.SourceError, match=r"no Kaldi data folder .* has kaldi"):
        sources.open_source("kaldi", root=tmp_path, split="train")


def test_common_voice_tags_and_bad_lines(tmp_path):
    write_corpus(tmp_path, "train")
    write_common_voice(open_folder(tmp_path), tmp_path)
    table = tmp_path / "dev.tsv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1][:-1] + "2\tfifties"
    lines += ["1\tabsent.mp3\tONE\t\t", "1\ta.mp3", "1\ta.mp3\t\t\t"]
    table.write_text("\r\n".join(lines), "utf-8-sig")
    source = sources.open_source("common_voice", root=tmp_path, split="dev", on_error="skip")
    assert source.utterances[0].tags == {"speaker": "103", "up_votes": "2", "age": "fifties"}
    why = " ".join(source.skipped.values())
    for part in ("no such file", "2 values for 5 columns", "without path or sentence"):
        assert part in why
    table.write_text("a\tb\n")
    with pytest.raises(sources.SourceError, match=r"dev\.tsv is not a table of Common Voice"):
        sources.open_source("common_voice", root=tmp_path, split="dev")


def test_parquet_of_several_files_is_measured_once(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    write_corpus(tmp_path, "train")
    corpus = open_folder(tmp_path)
    (tmp_path / "hf" / "data").mkdir(parents=True)
    for shard in range(2):
        part = sources.select(corpus, range(6 * shard, 6 * shard + 6))
        path = tmp_path / "hf" / "data" / f"dev-0000{shard}-of-00002.parquet"
        write_parquet(part, path, locale="en", words=[1], noisy=False)

    def open_it():
        return sources.open_source("parquet", root=tmp_path / "hf", split="dev")

    source = open_it()
    assert [u.id for u in source.utterances] == [u.id for u in corpus.utterances]
    expected = {"speaker": "103", "language": "en", "noisy": "false"}
    assert source.utterances[0].tags == expected
    monkeypatch.setattr(audio, "duration", None)
    assert open_it() == source


def test_parquet_that_cannot_be_used_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    import pyarrow.parquet

    def message(rows=None, content=None, **kwargs) -> str:
        path = tmp_path / "train.parquet"
        if rows is not None:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(sources.SourceError) as caught:
            sources.open_source("parquet", root=tmp_path, split="train", **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no train.parquet" in message()
    assert "damaged or no Parquet" in message(content=b"PAR1 and no more")
    assert "no column 'audio' of audio files" in message([{"a": 1}])
    rows = [{"audio": {"bytes": b"RIFF", "path": "a.wav"}, "text": "A"}]
    assert "row 0: not audio" in message(rows)
    assert "no column 'words'" in message(rows, text_key="words")
    rows = [{"audio": {"bytes": None, "path": "a.wav"}, "text": "A"}]
    assert "row 0: holds no audio, only its path" in message(rows)


# ---- Pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1.5])
@pytest.mark.parametrize("duration", [0.5, 10, 10.01, 600, 12345.678])
def test_pieces_cover_a_recording_with_the_overlap(duration, overlap):
    cut = pieces.pieces("a.wav", duration, 10, overlap=overlap)
    assert cut[0].offset == 0
    assert cut[-1].offset + cut[-1].duration == pytest.approx(duration)
    assert all(0 < piece.duration <= 10 + 1e-9 for piece in cut)
    for one, other in itertools.pairwise(cut):
        assert one.offset + one.duration - other.offset == pytest.approx(overlap, abs=1e-9)
    fewer = (len(cut) - 1) * (10 - overlap) + overlap
    assert fewer < duration or len(cut) == 1
