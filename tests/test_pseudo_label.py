"""python -m speech_jax.pseudo_label: what a model is sure of becomes a training split."""

import fcntl
import json
import os
import shutil

import pytest

from speech_jax import config as defaults
from speech_jax import experiment, pseudo_label
from speech_jax.data import sources
from speech_jax.decoding.words import Word
from speech_jax.deploy import transcribe
from speech_jax.errors import UserError


@pytest.fixture
def calls(tmp_path, tones):
    (tmp_path / "calls").mkdir()
    for file in sorted((tones / "dev" / "1" / "1").glob("*.flac"))[:3]:
        shutil.copy(file, tmp_path / "calls")
    (tmp_path / "calls" / "broken.wav").write_bytes(b"no sound")
    return tmp_path / "calls"


@pytest.fixture
def command(finished, calls, capsys, monkeypatch):
    """Runs the command on calls; gives (status, what it heard, standard error)."""
    heard = []
    hear = transcribe.Model.transcribe_all

    def listen(self, files, *rest):
        files = list(files)
        heard.append(len(files))
        return hear(self, files, *rest)

    monkeypatch.setattr(transcribe.Model, "transcribe_all", listen)

    def run(*flags):
        model = f"--model={finished.workdir.folder}"
        heard.clear()
        try:
            status = pseudo_label.main([model, *flags, str(calls)])
        except SystemExit as left:
            status = left.code
        return status, sum(heard), capsys.readouterr().err

    return run


def test_what_is_heard_is_a_split_beside_others(command, calls, finished, tones, monkeypatch):
    out = calls.parent / "heard.jsonl"
    status, heard, error = command(f"--out={out}", "--confidence=0")
    assert (status, heard) == (1, 4)
    assert "broken.wav" in error
    lines = finished.workdir.predictions("dev").read_text().splitlines()
    said = {line["id"]: line["hypothesis"] for line in map(json.loads, lines)}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        name = row["audio_filepath"].rpartition("/")[2].removesuffix(".flac")
        assert row["text"] == said[name]
        assert 0 <= row["confidence"] <= 1
    assert len(rows) == 3

    config = defaults.default()
    config.data.update({"root": str(tones), "source": "librispeech"})
    config.data.arguments.download = False
    train = sources.open_source("librispeech", root=str(tones), split="train")
    monkeypatch.chdir(out.parent.parent)
    for name in (out, f"{out.parent.name}/{out.name}"):  # from the current folder, as --out is
        both = experiment.open_splits(config, f"train,{name}")
        assert len(both.utterances) == len(train.utterances) + 3
        added = both.utterances[len(train.utterances)]
        assert added.text == rows[0]["text"]
        assert added.duration == pytest.approx(rows[0]["duration"], abs=1e-3)
    config.data.update({"root": "", "source": "synthetic"})  # a root that a manifest does not need
    assert len(experiment.open_splits(config, str(out)).utterances) == 3
    config.data.root = str(tones)
    with pytest.raises(
        UserError, match=r"there is no manifest .*/gone\.jsonl and no .*/gone\.jsonl"
    ):
        experiment.open_splits(config, "gone.jsonl")


def test_it_goes_on_where_it_was(command, calls, finished):
    out = calls.parent / "heard.jsonl"
    assert command(f"--out={out}", "--confidence=0")[1] == 4
    whole, journal = out.read_text(), calls.parent / "heard.jsonl.heard"
    (calls / "broken.wav").unlink()
    # As a command that was killed leaves it.
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    out.unlink()
    assert command(f"--out={out}", "--confidence=0")[:2] == (0, 1)
    assert out.read_text() == whole
    # Of another confidence, nothing is heard again.
    least = max(json.loads(line)["confidence"] for line in whole.splitlines())
    assert command(f"--out={out}", f"--confidence={least}")[:2] == (0, 0)
    kept = [json.loads(line)["confidence"] for line in out.read_text().splitlines()]
    assert kept
    assert set(kept) == {least}
    # A file that is another one by now is heard again, and it alone.
    first = next(iter(calls.iterdir()))
    first.write_bytes(first.read_bytes())
    assert command(f"--out={out}", f"--confidence={least}")[:2] == (0, 1)
    status, _, error = command(f"--out={out}", "--longest=5")
    assert status == 1
    assert "was heard with another longest: name another --out" in error
    assert len(out.read_text().splitlines()) == len(kept)
    # Two commands at once, and a manifest that somebody has changed since.
    with journal.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, heard, error = command(f"--out={out}")
        assert (status, heard) == (1, 0)
        assert "another command writes" in error
    out.write_text(out.read_text().replace("A", "B"))
    changed = out.read_text()
    status, heard, error = command(f"--out={out}")
    assert (status, heard) == (1, 0)
    assert "is not as this command wrote it" in error
    assert out.read_text() == changed


def test_what_another_wrote_is_not_lost(command, calls):
    out = calls.parent / "mine.jsonl"
    out.write_text("somebody's own\n")
    status, heard, error = command(f"--out={out}")
    assert (status, heard) == (1, 0)
    assert "is not as this command wrote it" in error
    assert out.read_text() == "somebody's own\n"
    out.unlink()
    # A journal in which nothing was heard is in nobody's way, nor are lines that are none.
    journal = calls.parent / "mine.jsonl.heard"
    journal.write_bytes(b'{"model": "another"}\n["a", [1, 2], 1, [[1, 2]]]\n')
    status, heard, error = command(f"--out={out}", "--confidence=0")
    assert (status, heard) == (1, 0)
    assert "lines that this command cannot read: move it away" in error
    journal.write_bytes(b'{"model": "another"}\n\xff\xfe\n')
    status, heard, _ = command(f"--out={out}", "--confidence=0")
    assert (status, heard) == (1, 4)
    assert len(out.read_text().splitlines()) == 3
    # What is gone is said.
    max(calls.glob("*.flac")).unlink()
    status, _, error = command(f"--out={out}", "--confidence=0")
    assert "1 recordings that were heard are gone or have changed" in error
    assert len(out.read_text().splitlines()) == 2


def test_recordings_are_added(command, calls):
    out, elsewhere = calls.parent / "heard.jsonl", calls.parent / "elsewhere"
    (calls / "broken.wav").unlink()
    one, *others = sorted(calls.iterdir())
    elsewhere.mkdir()
    for other in others:
        other.rename(elsewhere / other.name)
    assert command(f"--out={out}", "--confidence=0")[:2] == (0, 1)
    for other in elsewhere.iterdir():
        other.rename(calls / other.name)
    one.rename(elsewhere / one.name)
    assert command(f"--out={out}", "--confidence=0")[:2] == (1, 2)  # the first one is gone
    (elsewhere / one.name).rename(one)
    assert command(f"--out={out}", "--confidence=0")[:2] == (0, 0)
    assert len(out.read_text().splitlines()) == 3


def test_a_name_that_is_not_utf_8_is_named(command, calls):
    (calls / "broken.wav").unlink()
    first = min(calls.iterdir())
    first.rename(os.fsdecode(os.fsencode(calls) + b"/\xff.flac"))
    out = calls.parent / "heard.jsonl"
    status, heard, error = command(f"--out={out}", "--confidence=1")
    assert (status, heard) == (1, 2)
    assert "its name is not UTF-8; rename the file" in error


def test_long_recordings_become_segments_that_share_their_pauses():
    words = lambda start, end, sure: (Word("A", start, end, sure), Word("B", start, end, 1.0))
    segments = tuple(
        transcribe.Segment(start, end, "A B", words(start, end, sure), ())
        for start, end, sure in ((0.1, 9.0, 0.5), (9.2, 20.0, 0.9), (25.0, 29.9, 0.7))
    )
    long = transcribe.Transcription("A B A B A B", 30.0, segments)
    labels = list(pseudo_label._labels(long, 20.0))
    assert [label[:2] for label in labels] == [(0.0, 9.1), (9.1, 20.2), (24.8, 29.95)]
    assert [label.confidence for label in labels] == [0.75, 0.95, 0.85]
    heard = [pseudo_label.Heard("f", (1, 1), 30.0, tuple(labels))]
    rows = list(pseudo_label._rows(heard, 0.8))
    assert [(row["offset"], row["duration"]) for row in rows] == [(9.1, 11.1), (24.8, 5.15)]
    (whole,) = pseudo_label._labels(long, 30.0)
    assert whole == (0.0, None, "A B A B A B", pytest.approx(0.85))
    # A segment that is longer still is cut between its words.
    spoken = tuple(Word("A", 2.0 * i, 2.0 * i + 1.5, 0.9) for i in range(30))
    whole = transcribe.Segment(0.0, 59.5, "A " * 30, spoken, ())
    labels = list(pseudo_label._labels(transcribe.Transcription(whole.text, 60.0, (whole,)), 10.0))
    assert sum(len(label.text.split()) for label in labels) == 30
    assert all(4 < label.end - label.start <= 10 for label in labels)
    silent = transcribe.Transcription("", 3.0)
    assert not list(pseudo_label._labels(silent, 20.0))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--out=a.txt",), "must end in .jsonl"),
        (("--out=a.jsonl", "--confidence=2"), "from 0 to 1"),
        (("--out=a.jsonl", "--longest=0"), "more than 0"),
        (("--out=a.jsonl", "-"), "standard input"),
    ],
)
def test_a_wrong_command_line_says_why(command, flags, said):
    status, heard, error = command(*flags)
    assert (status, heard) == (2, 0)
    assert said in error
