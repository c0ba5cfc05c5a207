"""Every format of a transcription is read back: by FFmpeg, by its grammar, with the same words."""

import io
import itertools
import json
import re

import numpy as np
import pytest

from speech_jax.decoding.words import Word
from speech_jax.deploy.formats import FORMATS, cues
from speech_jax.deploy.transcribe import Segment, Transcription

# What people say, and what is hard on a format.
TEXTS = (
    "ONE",
    "IT IS A TRUTH UNIVERSALLY ACKNOWLEDGED THAT A SINGLE MAN IN POSSESSION OF A GOOD FORTUNE "
    "MUST BE IN WANT OF A WIFE AND WHAT IS MORE OF A HOUSE IN TOWN WITH A VIEW OF THE RIVER",
    'naïve 東京 <b>Q&A</b> "quoted" it\'s',
    "DONAUDAMPFSCHIFFFAHRTSELEKTRIZITÄTENHAUPTBETRIEBSWERKBAUUNTERBEAMTENGESELLSCHAFT",
)


def transcription(texts=TEXTS, seconds=None, seed=0) -> Transcription:
    rng, time, segments = np.random.default_rng(seed), 0.2, []
    for text in texts:
        words = []
        for word in text.split():
            start, time = time, time + float(rng.uniform(0.04, 0.6))
            words.append(Word(word, start, time, float(rng.uniform(0, 1))))
            time += float(rng.choice([0.0, 0.04, 0.3, 1.0], p=[0.4, 0.3, 0.25, 0.05]))
        alternatives = ((text, -1.5), (text + " TOO", -2.5))
        segments.append(Segment(words[0].start, time, text, tuple(words), alternatives))
        segments[-1] = Segment(words[0].start, words[-1].end, text, tuple(words), alternatives)
        time += 0.5
    whole = " ".join(segment.text for segment in segments)
    return Transcription(whole, seconds or time + 1.0, tuple(segments))


CASES = {
    "several": transcription(),
    "empty": Transcription("", 3.0),
    "long": transcription(TEXTS[:2] * 40, seed=1),
    "beyond": transcription(("ONE TWO",), seconds=0.3),
}
every_case = pytest.mark.parametrize("found", CASES.values(), ids=CASES)


def render(format, found, words=False, name="talks/a talk.flac"):
    return FORMATS[format].header + FORMATS[format].render(name, found, words)


def close(spans, other):
    np.testing.assert_allclose(
        [span[:2] for span in spans], [span[:2] for span in other], atol=0.006
    )


@every_case
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_subtitles_are_read_by_ffmpeg(format, words, found):
    av = pytest.importorskip("av")
    text = render(format, found, words)
    if not found.segments:
        assert text == {"srt": "", "vtt": "WEBVTT\n"}[format]
        return
    read = []
    # Probed by its extension, as a player does.
    with av.open(io.BytesIO(text.encode()), format={"srt": "srt", "vtt": "webvtt"}[format]) as file:
        for packet in file.demux():
            if packet.size:
                start = float(packet.pts * packet.time_base)
                end = start + float(packet.duration * packet.time_base)
                read.append((start, end, bytes(packet).decode()))
    wanted = found.words if words else cues(found)
    close(read, [(word.start, word.end) for word in found.words] if words else wanted)
    plain = " ".join(" ".join(text for *_, text in read).split())
    if format == "vtt":
        for mark, escaped in (("<", "&lt;"), (">", "&gt;"), ("&", "&amp;")):
            plain = plain.replace(escaped, mark)
    assert plain == found.text


@every_case
def test_subtitles_keep_their_grammar(found):
    clock = r"\d\d:[0-5]\d:[0-5]\d{0}\d\d\d"
    cue = rf"\d+\n{clock.format(',')} --> {clock.format(',')}\n(?:.+\n){{1,2}}"
    srt = render("srt", found)
    assert not srt or re.fullmatch(rf"{cue}(?:\n{cue})*".replace("{0}", ","), srt)
    cue = rf"{clock.format('.')} --> {clock.format('.')}\n(?:[^<>\n]+\n){{1,2}}"
    assert re.fullmatch(rf"WEBVTT\n(?:\n{cue})*".replace("{0}", "[.]"), render("vtt", found))


@every_case
def test_cues_are_of_sensible_length_and_do_not_overlap(found):
    spans = cues(found)
    assert " ".join(span.text for span in spans) == found.text
    for one, other in itertools.pairwise(spans):
        assert one.end <= other.start
    for span in spans:
        assert span.start < span.end <= max(found.seconds, found.words[-1].end)
        alone = " " not in span.text
        assert alone or len(span.text) <= 84
        assert alone or span.end - span.start <= 6.0
    few = [span for span in spans if len(span.text) < 15 and span.end - span.start < 1]
    assert len(few) <= 1 + len(spans) // 5, "cues are cut to pieces"


@every_case
def test_ctm_is_what_sclite_reads(found):
    lines = render("ctm", found, name="a talk").splitlines()
    for line, word in zip(lines, found.words, strict=True):
        name, channel, start, duration, text, confidence = line.split(" ")
        assert (name, channel, text) == ("a_talk", "1", word.text)
        assert float(start) == pytest.approx(word.start, abs=0.006)
        assert float(duration) == pytest.approx(word.end - word.start, abs=0.011)
        assert 0 <= float(confidence) <= 1


@every_case
@pytest.mark.parametrize("words", [False, True])
def test_textgrid_is_what_praat_reads(words, found):
    """Tiers whose intervals follow each other from the start to the end of the recording."""
    lines = iter(render("textgrid", found, words).splitlines())
    assert [next(lines) for _ in range(3)] == [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
    ]

    def value(name, text=False):
        key, _, given = next(lines).strip().partition(" = ")
        assert key == name
        return given[1:-1].replace('""', '"') if text else float(given)

    assert value("xmin") == 0
    end = value("xmax")
    assert next(lines) == "tiers? <exists>"
    tiers = int(value("size"))
    assert tiers == 1 + words
    assert next(lines) == "item []:"
    for number in range(tiers):
        assert next(lines).strip() == f"item [{number + 1}]:"
        assert value("class", True) == "IntervalTier"
        assert value("name", True) == ("segments", "words")[number]
        assert (value("xmin"), value("xmax")) == (0, end)
        place, texts = 0.0, []
        for interval in range(int(value("intervals: size"))):
            assert next(lines).strip() == f"intervals [{interval + 1}]:"
            assert value("xmin") == place
            start, place = place, value("xmax")
            assert start < place
            texts.append(value("text", True))
        assert place == end
        assert " ".join(filter(None, texts)) == found.text
    assert list(lines) == []


@every_case
def test_tables_and_json_hold_all(found):
    for words in (False, True):
        rows = [line.split("\t") for line in render("tsv", found, words).splitlines()]
        assert rows[0] == ["file", "start", "end", "text"]
        assert {row[0] for row in rows[1:]} <= {"talks/a talk.flac"}
        assert " ".join(row[3] for row in rows[1:]) == found.text
        text = render("json", found, words)
        assert text.count("\n") == 1
        read = json.loads(text)
        assert (read["file"], read["text"]) == ("talks/a talk.flac", found.text)
        assert [segment["text"] for segment in read["segments"]] == [s.text for s in found.segments]
        heard = [word for segment in read["segments"] for word in segment.get("words", ())]
        assert len(heard) == (len(found.words) if words else 0)
        for one, word in zip(heard, found.words, strict=False):
            assert (
                list(one.values()) == pytest.approx(list(word), abs=1e-3)
                or one["word"] == word.text
            )
    assert render("text", found) == f"{found.text}\n"
    lines = [line.split("\t") for line in render("text", found, True).splitlines()]
    assert [line[2] for line in lines] == [word.text for word in found.words]


def test_alternatives_of_a_recording_are_those_of_its_segments_put_together():
    best = transcription(("A", "B")).alternatives
    assert best == (("A B", -3.0), ("A B TOO", -4.0))
    assert Transcription("", 1.0).alternatives == (("", 0.0),)
