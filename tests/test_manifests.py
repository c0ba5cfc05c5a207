"""Manifests as editors, spreadsheets and toolkits write them: used as they mean, or named."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from speech_jax.data import sources

RATE = 16000
PLAIN = [
    {"audio_filepath": "wavs/a.wav", "text": "ONE TWO", "duration": 0.5},
    {"audio_filepath": "wavs/b.wav", "text": "THREE"},
]
USED = [("wavs/a", 0.5, "ONE TWO"), ("wavs/b", 0.5, "THREE")]


def lines(rows=PLAIN, end="\n", last=True, **kwargs) -> str:
    text = end.join(json.dumps(row, **kwargs) for row in rows)
    return text + (end if last else "")


def one(**keys) -> bytes:
    return json.dumps(PLAIN[0] | keys).encode()


# What is written -> (content, the (id, seconds, text) of what is used). Encodings and line ends
# change nothing.
TABLE: dict[str, tuple[bytes, list]] = {
    f"{name}, ends {end!r}, last {last}, {pad!r}, ascii {ascii_}": (
        mark + pad.encode() + lines(end=end + pad, last=last, ensure_ascii=ascii_).encode(),
        USED,
    )
    for (name, mark), end, last, pad, ascii_ in itertools.product(
        (("plain", b""), ("BOM", b"\xef\xbb\xbf")),
        ("\n", "\r\n", "\r", "\n\n"),
        (True, False),
        ("", "  "),
        (True, False),
    )
}
_A = ("wavs/a", 0.5)
TABLE |= {
    f"text {text[:20]!r}": (one(text=text), [(*_A, text.strip())])
    for text in (
        *("ONE\tTWO", "ONE\nTWO", " ONE ", "", "\u0645\u0631\u062d\u0628\u0627", "\U0001f600"),
        *("ONE\u2028TWO", "ON\u200bE", "na\u00efve"),
        *("nai\u0308ve", "\u0928\u092e\u0938\u094d\u0924"),
        *("WORD " * 20_000, "null", "\\u0041", "O\x00NE"),
    )
}  # fmt: skip
TABLE |= {
    f"path {path!r}": (one(audio_filepath=path), [(path.removesuffix(".wav"), 0.5, "ONE TWO")])
    for path in (
        "h\u00f6her \u00fc/c d.wav",
        "ho\u0308her u\u0308/c d.wav",
        "wavs/../wavs/a.wav",
    )
}
TABLE |= {
    "raw tab": (b'{"audio_filepath": "wavs/a.wav", "text": "A\tB"}', [(*_A, "A\tB")]),
    "null text": (one(text=None), [(*_A, "")]),
    "no text": (b'{"audio_filepath": "wavs/a.wav"}', [(*_A, "")]),
    "numbers as ids": (one(id=0), [("0", 0.5, "ONE TWO")]),
    "empty id": (one(id=""), [(*_A, "ONE TWO")]),
    "a stated duration too long": (one(duration=1e9), [(*_A, "ONE TWO")]),
    "a stated duration too short": (one(duration=0.1), [(*_A, "ONE TWO")]),
    "an integer duration": (one(duration=1), [(*_A, "ONE TWO")]),
    "channel": (one(channel=1), [(*_A, "ONE TWO")]),
    "nested": (one(alignment=[{"word": "ONE"}]), [(*_A, "ONE TWO")]),
    "a key twice": (
        b'{"audio_filepath": "x", "text": "A", "audio_filepath": "wavs/a.wav"}',
        [(*_A, "A")],
    ),
    "segment at 0": (one(offset=0, duration=0.2), [("wavs/a@0.000-0.200", 0.2, "ONE TWO")]),
    "segment": (one(offset=0.25, duration=0.2), [("wavs/a@0.250-0.450", 0.2, "ONE TWO")]),
    "segment to the end": (
        one(offset=0.25, duration=None),
        [("wavs/a@0.250", 0.25, "ONE TWO")],
    ),
    "null offset": (one(offset=None), [(*_A, "ONE TWO")]),
    "a little beyond": (one(offset=0.1, duration=0.41), [("wavs/a@0.100-0.510", 0.4, "ONE TWO")]),
}
# What cannot be used -> (content, what the error says of it).
BAD: dict[str, tuple[bytes, str]] = {
    "UTF-16": (lines().encode("utf-16"), "not UTF-8|malformed"),
    "UTF-32": (lines().encode("utf-32"), "not UTF-8|malformed"),
    "latin-1": ('{"audio_filepath": "wavs/a.wav", "text": "f\u00fcr"}'.encode("latin-1"),
     "not UTF-8"),
    "an array": (json.dumps(PLAIN, indent=1).encode(), "malformed"),
    "pretty-printed": (json.dumps(PLAIN[0], indent=2).encode(), "malformed"),
    "CSV": (b"wav_filename,transcript\nwavs/a.wav,one\n", "malformed"),
    "trailing comma": (b'{"audio_filepath": "wavs/a.wav",}', "malformed"),
    "single quotes": (b"{'audio_filepath': 'wavs/a.wav'}", "malformed"),
    "cut": (lines().encode()[:40], "malformed"),
    "nulls": (bytes(100), "malformed"),
    "a string": (b'"wavs/a.wav"', "a JSON str"),
    "a number": (b"5", "a JSON int"),
    "empty": (b"", "is empty"),
    "blank": (b"\n \r\n\t\n", "is empty"),
    "a mark alone": (b"\xef\xbb\xbf", "is empty"),
    "lhotse": (b'{"id": "c", "start": 0, "recording": {"sources": []}}', "no audio_filepath"),
    "deep": (b'{"audio_filepath": "wavs/a.wav", "x": ' + b"[" * 9000 + b"]" * 9000 + b"}",
     "too deep"),
    "5,000 digits": (b'{"audio_filepath": "wavs/a.wav", "duration": ' + b"9" * 5000 + b"}", "long"),
    "400 digits": (b'{"audio_filepath": "wavs/a.wav", "duration": ' + b"9" * 400 + b"}", "is 999"),
    "surrogate in text": (b'{"audio_filepath": "wavs/a.wav", "text": "A \\ud83d"}',
     r"\\ud83d, char"),
    "surrogate in id": (b'{"audio_filepath": "wavs/a.wav", "id": "\\udc00"}', "id has half of a"),
    "surrogate in a tag": (b'{"audio_filepath": "wavs/a.wav", "x": "\\udc00"}', "x has half of a"),
    "surrogate in a path": (b'{"audio_filepath": "wavs/\\udc00.wav", "id": "c"}', "not UTF-8"),
    "the same twice": (lines([PLAIN[0], PLAIN[0]]).encode(), "id 'wavs/a' is also that of"),
    "Windows path": (one(audio_filepath="wavs\\a.wav"), "no such file"),
    "URL": (one(audio_filepath="https://example.org/a.wav"), "no such file"),
    "null in a path": (one(audio_filepath="wavs/\0a.wav"), "null"),
    "a folder": (one(audio_filepath="wavs"), "no such file"),
    **{f"{key} {value!r}": (one(**{key: value}), f"{key} is ") for key, value in (
        ("text", 42), ("text", {"en": "ONE"}), ("text", ["ONE"]), ("text", True), ("id", 1.5),
        ("id", ["a"]), ("duration", "0.4"), ("duration", -1), ("duration", 0), ("duration", True),
        ("duration", float("nan")), ("duration", float("inf")), ("duration", []), ("offset", -0.1),
        ("offset", "0"), ("offset", float("nan")), ("offset", 1e300), ("offset", {}),
        ("speaker", ["a"]), ("label", {"a": 1}),
    )},
    "offset beyond the end": (one(offset=0.6, duration=0.1), "lead beyond the end"),
    "duration beyond the end": (one(offset=0.1, duration=1), "lead beyond the end"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("manifests")
    for name in ("wavs/a.wav", "wavs/b.wav", "h\u00f6her \u00fc/c d.wav"):
        (root / name).parent.mkdir(exist_ok=True)
        soundfile.write(root / name, np.ones(RATE // 2) / 9, RATE)
    return root


def open_manifest(folder, content: bytes, **kwargs) -> sources.Source:
    (folder / "m.jsonl").write_bytes(content)
    return sources.open_source("manifest", root=folder, split="m", cache=folder / "cache", **kwargs)


def test_the_tables_are_as_large_as_they_should_be():
    assert len(TABLE) + len(BAD) >= 100


def test_manifests_are_used_as_they_mean(folder):
    wrong = {}
    for name, (content, expected) in TABLE.items():
        source = open_manifest(folder, content)
        found = [(u.id, round(u.duration, 6), u.text) for u in source.utterances]
        if found != expected:
            wrong[name] = found
    assert not wrong


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_in_a_line(folder, name):
    content, message = BAD[name]
    with pytest.raises(sources.SourceError, match=message) as caught:
        open_manifest(folder, content)
    assert "\n" not in str(caught.value)
    # It costs no other line: a good one before it, and one behind it.
    if "empty" in message or name.startswith("UTF"):
        return
    good = [json.dumps(PLAIN[1] | {"id": str(number)}).encode() for number in range(2)]
    source = open_manifest(folder, b"\n".join([good[0], content, good[1]]), on_error="skip")
    assert {"0", "1"} <= {utterance.id for utterance in source.utterances}
    assert source.skipped


def test_files_that_differ_in_their_suffix_alone_are_two(tmp_path):
    rows = []
    for name in ("a.wav", "a.flac", "b.wav"):
        soundfile.write(tmp_path / name, np.zeros(1600), 16_000)
        rows.append({"audio_filepath": name, "text": name})
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = sources.open_source("manifest", root=str(tmp_path), split="m", on_error="raise")
    assert sorted(one.id for one in source.utterances) == ["a.flac", "a.wav", "b"]


@pytest.mark.parametrize("name", [["a.wav"], {"a": 1}, ".", "/", "", 5])
def test_a_path_that_is_none_is_a_line_of_its_own(name, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), RATE)
    rows = [{"audio_filepath": name, "text": "A"}, {"audio_filepath": "a.wav", "text": "A"}]
    (tmp_path / "m.jsonl").write_text(lines(rows))
    source = sources.open_source("manifest", root=str(tmp_path), split="m", on_error="skip")
    assert [one.id for one in source.utterances] == ["a"]
    assert len(source.skipped) == 1
