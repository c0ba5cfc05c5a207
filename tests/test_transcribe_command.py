"""python -m speech_jax.transcribe: whatever is bad is named, and the rest is done."""

import functools
import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import runs
from speech_jax import transcribe
from speech_jax.decoding import decoder
from speech_jax.deploy import acoustic, formats
from speech_jax.deploy import transcribe as deployed

RATE = 16_000


@pytest.fixture(scope="module")
def said(finished) -> dict[str, str]:
    """What evaluation heard in each utterance of dev."""
    lines = finished.workdir.predictions("dev").read_text().splitlines()
    return {line["id"]: line["hypothesis"] for line in map(json.loads, lines)}


@pytest.fixture
def folder(tmp_path, tones, said) -> pathlib.Path:
    """calls/ with two recordings and calls/more/ with one of the same name."""
    names = sorted(said)
    for name, place in zip(
        names, ("calls/a.flac", "calls/b.flac", "calls/more/a.flac"), strict=False
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tones / "dev" / "1" / "1" / f"{name}.flac", tmp_path / place)
    return tmp_path


@pytest.fixture(scope="module")
def open_once():
    return functools.cache(acoustic.open_acoustic)


@pytest.fixture
def command(finished, folder, capsys, monkeypatch, open_once):
    """Runs the command in `folder`; gives (status, standard output, standard error)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("speech_jax.deploy.acoustic.open_acoustic", open_once)

    def run(*arguments, model=finished.workdir.folder):
        try:
            status = transcribe.main([*map(str, arguments), f"--model={model}"])
        except SystemExit as left:
            status = left.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


# ---- What is transcribed -----------------------------------------------------------------------


def test_files_folders_and_patterns_in_order_each_once(command, said):
    texts = [said[name] for name in sorted(said)]
    a, b, c = (f"calls/{name}" for name in ("a.flac", "b.flac", "more/a.flac"))
    both = {a: texts[0], b: texts[1], c: texts[2]}
    lines = lambda *names: "".join(f"{name}: {both[name]}\n" for name in names)
    assert command(a) == (0, f"{texts[0]}\n", "")
    assert command("calls") == (0, lines(a, b, c), "")
    assert command(b, "calls", a) == (0, lines(b, a, c), "")
    assert command("calls/*.flac", "calls/**/a.flac") == (0, lines(a, b, c), "")


def test_standard_input(command, folder, said, monkeypatch):
    content = (folder / "calls" / "a.flac").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    status, out, _ = command("-", "--format=json", "--words")
    assert status == 0
    found = json.loads(out)
    assert (found["file"], found["text"]) == ("standard input", said[min(said)])
    assert [word["word"] for word in found["segments"][0]["words"]] == found["text"].split()


@pytest.mark.parametrize("format", ["text", "json", "srt", "vtt", "ctm", "textgrid", "tsv"])
def test_a_file_for_each_recording(format, command, folder):
    soundfile.write("calls/a.wav", np.ones(RATE, np.int16), RATE)
    status, out, err = command("calls", "calls/more", "--out=new/texts", f"--format={format}")
    assert (status, out, err) == (0, "", "")
    suffix = {"text": "txt", "textgrid": "TextGrid"}.get(format, format)
    written = sorted(
        str(path.relative_to("new/texts")) for path in pathlib.Path("new").rglob("*.*")
    )
    assert written == sorted(f"{name}.{suffix}" for name in ("a", "a.wav", "b", "more/a"))
    if format == "tsv":
        assert pathlib.Path("new/texts/b.tsv").read_text().startswith("file\tstart\tend\ttext\n")


def test_ctm_names_differ_where_recordings_do(command, folder):
    shutil.copy("calls/a.flac", "calls/a.wav")
    status, out, _ = command("calls", "--format=ctm")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()} == {"a", "a.wav", "b", "more/a"}


def test_settings_of_the_decoder_and_of_chunks(command):
    pathlib.Path("bad.arpa").write_text("not a language model")
    status, out, err = command("calls/a.flac", "--lm=bad.arpa")
    assert (status, out) == (1, "")
    assert err.startswith("error: --lm='bad.arpa'")
    status, out, _ = command("calls/a.flac", "--beam=4", "--nbest=3", "--format=json", "--chunk=5")
    assert status == 0
    (segment,) = json.loads(out)["segments"]
    assert 1 < len(segment["alternatives"]) <= 3
    assert segment["alternatives"][0]["text"] == segment["text"]


# ---- What is not -------------------------------------------------------------------------------


def samples(values, name="bad.wav"):
    return lambda folder: soundfile.write(folder / name, values, RATE)


def content(data, name="bad.wav"):
    return lambda folder: (folder / name).write_bytes(data)


def cut_short(folder):
    rng = np.random.default_rng(0)
    soundfile.write(folder / "whole.flac", rng.normal(0, 0.1, 90 * RATE), RATE)
    (folder / "bad.flac").write_bytes((folder / "whole.flac").read_bytes()[:1_500_000])


NAN = np.zeros(RATE, np.float32)
NAN[5] = np.nan

BAD = {
    "missing": (lambda folder: None, "bad.wav", "no such file or folder: correct the path"),
    "pattern": (lambda folder: None, "bad*.wav", "no file matches the pattern"),
    "folder": (lambda folder: (folder / "bad").mkdir(), "bad", "holds no audio files"),
    "empty": (content(b""), "bad.wav", "the file is empty"),
    "no samples": (samples(np.zeros(0, np.int16)), "bad.wav", "holds no samples"),
    "one sample": (samples(np.ones(1, np.int16)), "bad.wav", "too short for a word"),
    "silent": (samples(np.zeros(RATE, np.int16)), "bad.wav", "digital silence"),
    "no audio": (content(b"hello\n" * 100, "bad.mp3"), "bad.mp3", "not audio"),
    "unknown": (content(b"hello\n" * 100, "bad.xyz"), "bad.xyz", "not audio"),
    "truncated": (cut_short, "bad.flac", "truncated"),
    "not finite": (
        lambda folder: soundfile.write(folder / "bad.wav", NAN, RATE, "FLOAT"), "bad.wav", "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_bad_is_named_and_the_rest_is_done(kind, command, folder, said):
    make, path, message = BAD[kind]
    make(folder)
    status, _, err = command("calls/a.flac", path, "calls/b.flac", "--out=texts")
    assert status == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert path in errors[0]
    assert message in errors[0]
    for name, text in zip("ab", sorted(said), strict=False):
        assert pathlib.Path("texts", f"{name}.txt").read_text() == f"{said[text]}\n"
    assert sorted(file.name for file in pathlib.Path("texts").iterdir()) == ["a.txt", "b.txt"]
    assert "WARNING" not in err
    assert command(path)[:2] == (1, "")


def test_what_is_left_of_a_cut_pipe_and_of_a_full_disk(command, folder, finished):
    """The others are written; where none can be, one sentence says so."""
    pathlib.Path("texts").mkdir()
    pathlib.Path("texts/a.txt").mkdir()  # what cannot be replaced by a file
    status, _, err = command("calls/a.flac", "calls/b.flac", "--out=texts")
    assert (status, err.count("error: ")) == (1, 1)
    assert "cannot write" in err
    assert "texts/a.txt" in err
    assert pathlib.Path("texts/b.txt").read_text()
    pathlib.Path("blocked").write_text("")
    for place in ("blocked/texts", "blocked", "/proc/texts"):
        status, _, err = command("calls/a.flac", f"--out={place}")
        assert (status, err.count("error: ")) == (1, 1)
        assert f"{place} (" in err
        assert "make room" not in err
    if pathlib.Path("/dev/full").exists():
        line = f"{sys.executable} -m speech_jax.transcribe {folder}/calls"
        line += f" --model={finished.workdir.folder}"
        for end, status, message in (
            (">/dev/full", 1, "error: cannot write standard output"),
            ("| true", 1, ""),
        ):
            done = subprocess.run(
                ["bash", "-c", f"{line} {end}; exit ${{PIPESTATUS[0]}}"],
                cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == status
            assert done.stderr.count("\n") == bool(message)
            assert done.stderr.startswith(message)


def test_a_model_that_is_none_is_one_sentence(command, folder, finished):
    newer = folder / "newer"
    newer.mkdir()
    (newer / "bundle.json").write_text(json.dumps({"version": 99, "config": {}}))
    for model, message in (
        (newer, "of version 99"),
        ("nowhere", "nowhere does not exist: name a workdir"),
        ("calls", "no model"),
    ):
        status, out, err = command("calls/a.flac", model=model)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=docx", "calls"], "--format=docx must be one of text, json, srt"),
        (["--format=srt", "calls"], "--format=srt of 3 recordings needs --out=FOLDER"),
        (["--beam=many", "calls"], "--beam"),
        (["--beam=0", "calls"], "--beam=0 must be 1 to 1024"),
        (["--nbest=0", "--format=json", "calls"], "--nbest=0 must be"),
        (["--nbest=9", "--beam=8", "--format=json", "calls"], "8 hypotheses of --beam"),
        (["--nbest=17", "--format=json", "calls"], "16 hypotheses of --beam"),
        (["--nbest=2", "calls"], "--nbest does nothing with --format=text"),
        (["--chunk=0", "calls"], "--chunk=0 must be 5 to 300"),
        (["--chunk=nan", "calls"], "--chunk=nan must be"),
        (["--decoder=best", "calls"], "--decoder=best must be one of greedy, beam, lexicon"),
        (["--decoder=greedy", "--beam=4", "calls"], "--beam does nothing with --decoder=greedy"),
        (["--decoder=lexicon", "calls"], "--decoder=lexicon needs words"),
        (["--lm=no.arpa", "calls"], "--lm=no.arpa: there is no such file"),
        (["--lm-weight=1", "calls"], "--lm-weight does nothing without a language model"),
        (["--out=-", "calls"], "--out=- is not a folder"),
        ([], "PATH"),
    ],
)
def test_a_wrong_command_line_is_of_status_2(arguments, message, command):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_the_command_line_knows_what_the_libraries_know():
    assert tuple(formats.FORMATS) == transcribe._FORMATS
    assert tuple(decoder.DECODERS) == transcribe._DECODERS
    assert deployed.CHUNKS == transcribe._CHUNK_SECONDS
    assert decoder.Settings().width == transcribe._DEFAULT_WIDTH
    assert decoder.Settings().lm_weight == transcribe._DEFAULT_LM_WEIGHT
    low, high = transcribe._WIDTHS
    for width in (low - 1, high + 1):
        with pytest.raises(decoder.DecoderError):
            decoder.Settings(width=width)
    decoder.Settings(width=low)
    decoder.Settings(width=high)


def test_help_needs_no_libraries():
    code = (
        "import sys; from speech_jax import transcribe\ntry: transcribe.main(['--help'])\n"
        "except SystemExit: print({'jax', 'numpy', 'flax', 'rich'} & set(sys.modules))"
    )
    done = runs.run([sys.executable, "-c", code])
    assert done.stdout.endswith("set()\n")
    assert "a folder" in done.stdout
