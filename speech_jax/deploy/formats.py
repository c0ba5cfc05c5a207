"""Transcriptions as files of the formats that people and other programs read.

text      a line a recording
json      an object a recording, on one line
srt, vtt  subtitles, SubRip and WebVTT (https://www.w3.org/TR/webvtt1)
ctm       a line a word, as NIST's sclite reads it: recording (its name without the suffix, and
          its folders below the one that was named), channel, start, duration, word, confidence
textgrid  tiers of segments and words for Praat
tsv       a table with a header: file, start, end, text
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from speech_jax.decoding.words import Word
from speech_jax.deploy.transcribe import Segment, Transcription

# A cue is two lines of so many characters at most, lasts so many seconds at most, and at least, if
# the next one leaves that long.
_LINE, _LONGEST_CUE, _SHORTEST_CUE = 42, 6.0, 1.0
# A pause of so many seconds within a segment ends a cue.
_CUE_PAUSE = 0.8


class Span(NamedTuple):
    """A text with its seconds in the recording; `confidence` only for a word."""

    start: float
    end: float
    text: str
    confidence: float | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """How a transcription is written.

    Attributes:
      suffix: of its files.
      render: (name of the recording, transcription, whether words are wanted) to text.
      by_place: whether the name is the recording's place among the outputs, which has no suffix.
      header: what comes once, before all recordings.
      joins: whether several recordings can stand behind each other.
    """

    suffix: str
    render: Callable[[str, Transcription, bool], str]
    header: str = ""
    joins: bool = True
    by_place: bool = False


# ---- Text and tables ---------------------------------------------------------------------------


def _text(name: str, found: Transcription, words: bool) -> str:
    if not words:
        return f"{found.text}\n"
    return "".join(
        f"{word.start:.2f}\t{word.end:.2f}\t{word.text}\t{word.confidence:.2f}\n"
        for word in found.words
    )


def _json(name: str, found: Transcription, words: bool) -> str:
    described = {"file": name, "seconds": round(found.seconds, 3), "text": found.text}
    described["segments"] = [_described(segment, words) for segment in found.segments]
    return json.dumps(described, ensure_ascii=False) + "\n"


def _described(segment: Segment, words: bool) -> dict:
    described = {
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "alternatives": [
            {"text": text, "score": round(score, 3)} for text, score in segment.alternatives
        ],
    }
    if words:
        described["words"] = [
            {
                "word": word.text,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "confidence": round(word.confidence, 3),
            }
            for word in segment.words
        ]
    return described


def _ctm(name: str, found: Transcription, words: bool) -> str:
    name = re.sub(r"\s+", "_", name)
    return "".join(
        f"{name} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.2f}\n"
        for word in found.words
    )


def _tsv(name: str, found: Transcription, words: bool) -> str:
    name = re.sub(r"\s", " ", name)
    return "".join(
        f"{name}\t{span.start:.2f}\t{span.end:.2f}\t{span.text}\n" for span in _spans(found, words)
    )


def _spans(found: Transcription, words: bool) -> list[Span]:
    if words:
        return [Span(word.start, word.end, word.text, word.confidence) for word in found.words]
    return [Span(segment.start, segment.end, segment.text) for segment in found.segments]


# ---- Subtitles ---------------------------------------------------------------------------------


def cues(found: Transcription) -> list[Span]:
    """Subtitles of sensible length, cut at pauses; in order, and none overlaps the next."""
    cut = [cue for segment in found.segments for cue in _split(segment.words)]
    starts = [words[0].start for words in cut] + [found.seconds]
    spans = []
    for words, following in zip(cut, starts[1:], strict=True):
        start, end = words[0].start, words[-1].end
        end = max(end, min(start + _SHORTEST_CUE, following))
        spans.append(Span(start, end, " ".join(word.text for word in words)))
    return spans


def _split(words: Sequence[Word]) -> Iterator[Sequence[Word]]:
    """Halves words until they fit a cue: at a long pause, near the middle where there is none."""
    texts = [word.text for word in words]
    length = len(" ".join(texts))
    gaps = [after.start - before.end for before, after in itertools.pairwise(words)]
    seconds = words[-1].end - words[0].start
    if not gaps or (length <= 2 * _LINE and seconds <= _LONGEST_CUE and max(gaps) < _CUE_PAUSE):
        yield words
        return
    lengths = itertools.accumulate(len(text) + 1 for text in texts)
    # A cut at the end of all counts as much as half a second less of a pause than in the middle.
    value = [gap - abs(left / length - 0.5) for gap, left in zip(gaps, lengths, strict=False)]
    place = value.index(max(value)) + 1
    yield from _split(words[:place])
    yield from _split(words[place:])


def _lines(text: str) -> str:
    """A cue's text on one line, or on two of about the same length."""
    spaces = [match.start() for match in re.finditer(" ", text)]
    if len(text) <= _LINE or not spaces:
        return text
    middle = min(spaces, key=lambda place: abs(place - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def _srt(name: str, found: Transcription, words: bool) -> str:
    spans = _spans(found, True) if words else cues(found)
    return "\n".join(
        f"{number}\n{_clock(span.start, ',')} --> {_clock(span.end, ',')}\n{_lines(span.text)}\n"
        for number, span in enumerate(spans, 1)
    )


def _vtt(name: str, found: Transcription, words: bool) -> str:
    spans = _spans(found, True) if words else cues(found)
    marks = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    blocks = [
        f"{_clock(span.start, '.')} --> {_clock(span.end, '.')}\n"
        + re.sub("[&<>]", lambda found: marks[found[0]], _lines(span.text))
        + "\n"
        for span in spans
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _clock(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(1000 * seconds), 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{milliseconds:03}"


# ---- Praat -------------------------------------------------------------------------------------


def _textgrid(name: str, found: Transcription, words: bool) -> str:
    tiers = [("segments", _spans(found, False))]
    if words:
        tiers.append(("words", _spans(found, True)))
    end = max([found.seconds, *(span.end for _, spans in tiers for span in spans)])
    lines = [
        'File type = "ooTextFile"', 'Object class = "TextGrid"', "",
        "xmin = 0", f"xmax = {end:.3f}", "tiers? <exists>", f"size = {len(tiers)}", "item []:",
    ]  # fmt: skip
    for number, (title, spans) in enumerate(tiers, 1):
        intervals = _intervals(spans, end)
        lines += [
            f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{title}"',
            "        xmin = 0", f"        xmax = {end:.3f}",
            f"        intervals: size = {len(intervals)}",
        ]  # fmt: skip
        for place, (start, stop, text) in enumerate(intervals, 1):
            quoted = text.replace('"', '""')
            lines += [
                f"        intervals [{place}]:", f"            xmin = {start:.3f}",
                f"            xmax = {stop:.3f}", f'            text = "{quoted}"',
            ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _intervals(spans: Sequence[Span], end: float) -> list[tuple[float, float, str]]:
    """Intervals from 0 to the end without a gap: what lies between spans has an empty text."""
    intervals, last = [], 0.0
    for span in spans:
        start, stop = round(span.start, 3), round(span.end, 3)
        if start > last:
            intervals.append((last, start, ""))
        intervals.append((start, stop, span.text))
        last = stop
    if end > last or not intervals:
        intervals.append((last, end, ""))
    return intervals


FORMATS = {
    "text": Format("txt", _text),
    "json": Format("json", _json),
    "srt": Format("srt", _srt, joins=False),
    "vtt": Format("vtt", _vtt, joins=False),
    "ctm": Format("ctm", _ctm, by_place=True),
    "textgrid": Format("TextGrid", _textgrid, joins=False),
    "tsv": Format("tsv", _tsv, header="file\tstart\tend\ttext\n"),
}
