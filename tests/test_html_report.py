"""report.html: the numbers of results.json, whatever the texts hold, and nothing from outside."""

import base64
import hashlib
import html.parser
import json
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_jax.data import text
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import Utterance
from speech_jax.data.sources.base import FileSource
from speech_jax.evaluators import page, report, words
from speech_jax.evaluators.errors import Errors, count_errors
from speech_jax.evaluators.intervals import bootstrap
from speech_jax.evaluators.masked import Masked
from speech_jax.workdir import Workdir

WORDS = ["ONE", "TWO", "THREE", "FOUR"]
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "half a pair \udc80 \ud83d",
    "<!-- \u202e\x00\u2028 & -->",
    "مرحبا بالعالم",
    "今天天气怎么样我们去公园吧好不好呢朋友们",
]


class Parsed(html.parser.HTMLParser):
    """Elements with their attributes, texts, and rows of tables; every element is closed."""

    def __init__(self, written: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(written)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *heads: str) -> list[dict[str, str]]:
        """The rows of the first table with these heads, by head."""
        found = next(rows for rows in self.tables if rows and set(heads) <= set(rows[0]))
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]

    @property
    def rows(self) -> list[list]:
        """Of the table that is searched."""
        return json.loads(self.texts["script"][0])["rows"]


class Made:
    """A workdir with an evaluation of texts, and the audio of each."""

    def __init__(self, folder, evaluator=None):
        self.workdir = Workdir(folder / "work")
        self.evaluator = evaluator or Errors(Transcript(text.CharacterTokenizer("A")))
        self.corpora: dict[str, Corpus] = {}
        self.results: dict = {"splits": {}}
        self.sound = folder / "sound.wav"
        soundfile.write(self.sound, np.sin(np.arange(16_000) / 20) / 3, 16_000)

    def add(self, split: str, lines: Sequence[Mapping], tags=lambda n: {}, **missing: str) -> None:
        """A split of lines of predictions.jsonl; `missing` are ids that were not heard, and why."""
        if isinstance(self.evaluator, Errors):
            results = _results(lines)
        else:
            results = self.evaluator.results()
        ids = [line["id"] for line in lines]
        utterances = [
            Utterance(name, 0.7 + n % 5, tags=tags(n)) for n, name in enumerate([*ids, *missing])
        ]
        source = FileSource(utterances, [str(self.sound)] * len(utterances), {})
        self.corpora[split] = Corpus(source, {}, np.arange(len(ids)), {}, missing)
        self.results["splits"][split] = results | {
            "utterances": len(lines),
            "left_out": len(missing),
        }
        path = self.workdir.predictions(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(self) -> str:
        return report.make(self.workdir, self.evaluator, self.corpora, self.results)


def _results(lines):
    total = sum((count_errors(x["reference"], x["hypothesis"]) for x in lines[1:]),
                count_errors(lines[0]["reference"], lines[0]["hypothesis"]))  # fmt: skip
    names = ("wer", "cer", "insertions", "deletions", "substitutions", "words")
    return {name: getattr(total, name) for name in names}


def _said(count: int, seed: int = 0) -> list[dict]:
    """Lines in which a word in ten is wrong."""
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        reference = rng.choices(WORDS, k=rng.randint(1, 8))
        kinds = rng.choices(["same", "other", "lost", "more"], [90, 5, 3, 2], k=len(reference))
        heard = []
        for word, kind in zip(reference, kinds, strict=True):
            heard += {"same": [word], "other": ["FIVE"], "lost": [], "more": [word, "SIX"]}[kind]
        spoken = [[word, 0.1 * n, 0.1 * n + 0.08, 0.9] for n, word in enumerate(heard)]
        lines.append(
            {
                "id": f"u{number:05d}",
                "reference": " ".join(reference),
                "hypothesis": " ".join(heard),
                "words": spoken,
            }
        )
    return lines


@pytest.fixture
def made(tmp_path) -> Made:
    return Made(tmp_path)


# ---- The page ----------------------------------------------------------------------------------


def test_its_numbers_are_those_of_the_results(made):
    for split, seed in (("dev", 0), ("test", 1)):
        tags = lambda n: {"speaker": f"s{n % 4}", "accent": "north" if n % 2 else "south"}
        made.add(split, _said(40, seed), tags, gone="unreadable: no header")
    parsed = Parsed(made.make())
    summary = parsed.table("split", "WER", "left out")
    for row, (split, results) in zip(summary, made.results["splits"].items(), strict=True):
        assert row["split"] == split
        assert row["WER"] == f"{100 * results['wer']:.2f}%"
        assert row["CER"] == f"{100 * results['cer']:.2f}%"
        for name in ("insertions", "deletions", "substitutions", "words", "utterances"):
            assert row[name] == str(results[name])
        assert row["left out"] == "1"
    results = made.results["splits"]["dev"]
    errors = sum(results[name] for name in ("insertions", "deletions", "substitutions"))
    for head in ("seconds", "speaker", "accent"):
        rows = parsed.table(head, "WER", "of")
        assert sum(int(row["of"]) for row in rows) == results["words"]
        assert sum(int(row["errors"]) for row in rows) == errors
        assert sum(int(row["utterances"]) for row in rows) == 40
    assert parsed.table("was not heard") == [
        {"was not heard": "gone", "why": "unreadable: no header"}
    ]
    assert len(parsed.rows) == 80
    assert sum(row[4] for row in parsed.rows if row[0] == 0) == errors
    confused = parsed.table("word", "heard as", "times")
    assert sum(int(row["times"]) for row in confused) == results["substitutions"]


def test_the_worst_can_be_heard_and_seen(made):
    lines = _said(60)
    made.add("dev", lines)
    parsed = Parsed(made.make())
    errors = {
        line["id"]: count_errors(line["reference"], line["hypothesis"]).word_errors
        for line in lines
    }
    shown = parsed.texts["h4"]
    assert len(shown) == 20
    assert min(errors[name] for name in shown) >= max(errors[n] for n in errors if n not in shown)
    sound, picture = (parsed.all(tag)[0]["src"] for tag in ("audio", "img"))
    assert sound.startswith("data:audio/mpeg;base64,")
    assert base64.b64decode(sound.partition(",")[2])[:2] in (b"\xff\xf3", b"ID")
    assert base64.b64decode(picture.partition(",")[2])[8:12] == b"WEBP"
    spoken = next(line for line in lines if line["id"] == shown[0])["words"]
    times = [float(of["data-at"]) for of in parsed.all("button") if "data-at" in of]
    assert times[: len(spoken)] == pytest.approx([word[1] for word in spoken])


def test_nothing_comes_from_outside(made):
    made.add("dev", _said(10))
    written = made.make()
    parsed = Parsed(written)
    for _, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    style = parsed.texts["style"][0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(of["content"] for of in parsed.all("meta") if "http-equiv" in of)
    assert policy.startswith("default-src 'none';")
    digest = hashlib.sha256(parsed.texts["script"][-1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_texts_are_texts_whatever_they_hold(made):
    tags = lambda n: {"speaker": HOSTILE[n % len(HOSTILE)], HOSTILE[0]: HOSTILE[n % 2]}
    lines = [
        {
            "id": f"{number} {hostile}",
            "reference": f"{hostile} A",
            "hypothesis": HOSTILE[number - 1],
            "words": [[HOSTILE[number - 1], 0.0, 0.5, None]],
        }
        for number, hostile in enumerate(HOSTILE)
    ]
    made.add(HOSTILE[1], lines, tags, **{HOSTILE[0]: HOSTILE[1]})
    made.results["config"] = made.results["versions"] = {HOSTILE[0]: HOSTILE[1]}
    made.workdir.metrics.write_text(
        "\n".join(json.dumps({"step": step, HOSTILE[0]: step}) for step in range(3)) + "\n{"
    )
    written = made.make()
    written.encode()
    parsed = Parsed(written)
    assert len(parsed.all("script")) == 2
    assert not [of for _, of in parsed.elements if any(name.startswith("on") for name in of)]
    assert all(of["src"].startswith("data:") for of in parsed.all("img"))
    assert {row[1] for row in parsed.rows} == {line["id"] for line in lines}
    assert len(parsed.all("article")) == len(lines)


def _line(reference, hypothesis, name="a"):
    return {"id": name, "reference": reference, "hypothesis": hypothesis}


@pytest.mark.parametrize(
    "lines",
    [
        [_line("A", "A")],
        [_line("A", "B")],
        [_line("", "A B")],
        [_line("A B", "")],
        [_line("", "")],
        [_line("A", "", "a"), _line("", "", "b"), _line("", "B", "c")],
        [{**_line("A", "A B"), "words": [["A", 0.1, 0.2, 0.9], ["B", 0.8, 3.0, None]]}],
    ],
)
def test_hardly_anything_to_say(made, lines):
    made.add("dev", lines)
    parsed = Parsed(made.make())
    wer = made.results["splits"]["dev"]["wer"]
    shown = parsed.table("split", "WER")[0]["WER"]
    assert shown == ("–" if wer is None else f"{100 * wer:.2f}%")
    wrong = [line for line in lines if line["reference"] != line["hypothesis"]]
    assert len(parsed.all("article")) == len(wrong)


def test_other_tasks_and_measures(tmp_path):
    masked = Masked()
    rows = [{"nats": 3.0, "correct": 1.0 + n, "masked": 4.0} for n in range(3)]
    lines = [{"id": str(n), **masked.add(None, {}, row)} for n, row in enumerate(rows)]
    made = Made(tmp_path, masked)
    made.add("dev", lines)
    parsed = Parsed(made.make())
    assert parsed.table("split", "error rate")[0]["error rate"] == "50.00%"
    assert "accuracy 0.25" in parsed.rows[0][6][0]
    assert parsed.texts["h4"] == ["0", "1", "2"]

    class Bare:  # what the contract asks for, and a section
        def results(self):
            return {"eer": 0.2, "classes": {"x": 1}}  # what has parts is for its own sections

        def sections(self, lines):
            names = ["x<", "y"]
            return [page.Section("Classes", page.matrix(names, [[len(lines), 0], [1, 0]]))]

    made = Made(tmp_path, Bare())
    made.add("dev", lines)
    made.results["training"] = {"layer_weights": [0.25, 0.75]}
    parsed = Parsed(made.make())
    row = {"split": "dev", "eer": "0.2", "utterances": "3", "left out": "0"}
    assert parsed.table("split", "eer") == [row]
    assert parsed.tables[1] == [["is \\ said", "x<", "y"], ["x<", "3", ""], ["y", "1", ""]]
    assert len(parsed.rows) == 3
    shares = parsed.table("layer", "share in the sum")
    assert [row["share in the sum"] for row in shares] == ["25.0%", "75.0%"]


def test_a_matrix_of_a_thousand_classes_is_of_the_most_confused():
    rng = np.random.default_rng(0)
    counts = np.diag(rng.integers(5, 9, 1_000))
    counts[7, 990], counts[400, 3] = 30, 20
    for place in rng.permutation(1_000)[:100]:
        counts[place, (place + 1) % 1_000] += 1
    made = page.matrix([f"class {number}" for number in range(1_000)], counts)
    assert len(made) < 200_000
    (table,) = Parsed(made).tables
    assert table[0][0] == "is \\ said"
    assert {"class 3", "class 7", "class 400", "class 990"} < set(table[0]) == {
        "is \\ said", *(row[0] for row in table[1:])
    }  # fmt: skip
    row = next(row for row in table if row[0] == "class 7")
    assert row[table[0].index("class 990")] == "30"
    confusions = counts.sum() - np.trace(counts)
    among = sum(int(n or 0) for row in table[1:] for n in row[1:])
    among -= sum(int(row[place]) for place, row in enumerate(table) if place)
    said = (
        f"The 40 classes of 1,000 that are confused most, with {among} of {confusions} confusions"
    )
    assert said in made


def test_audio_that_is_gone_or_long(made, monkeypatch):
    made.add("dev", _said(30))
    made.sound.write_bytes(b"RIFF")
    assert "Its audio cannot be shown" in made.make()
    soundfile.write(made.sound, np.zeros(16_000 * 70), 16_000)
    made.add("dev", [_line("A", "B")])
    assert "The first 60 s of 70 s." in made.make()


def test_its_size_has_a_bound(made, monkeypatch):
    made.add("dev", _said(10_000), lambda n: {"speaker": str(n // 100)})
    whole = made.make()
    assert len(whole.encode()) < 20e6
    assert len(Parsed(whole).rows) == 10_000
    monkeypatch.setattr(report, "_TABLE_BYTES", 50_000)
    monkeypatch.setattr(report, "_MEDIA_BYTES", 10_000)
    made.add("dev", _said(1000))
    written = made.make()
    assert len(written.encode()) < 150_000
    parsed = Parsed(written)
    assert f"There is room for {len(parsed.rows)} of 1,000." in written
    assert 0 < len(parsed.all("audio")) < 20
    assert len(parsed.all("article")) == 20
    errors = [row[4] for row in parsed.rows]
    assert errors == sorted(errors, reverse=True)  # what is left out are those without errors


def test_a_report_that_fails_is_a_warning(made, caplog):
    made.add("dev", _said(5))
    assert report.write_report(made.workdir, made.evaluator, made.corpora, made.results)
    assert made.workdir.report.read_bytes().startswith(b"<!doctype html>")
    assert not caplog.text
    made.workdir.predictions("dev").unlink()
    made.workdir.results.write_text("kept")
    assert not report.write_report(made.workdir, made.evaluator, made.corpora, made.results)
    assert "was not written" in caplog.text
    assert made.workdir.results.read_text() == "kept"


# ---- Intervals ---------------------------------------------------------------------------------


def test_intervals_cover_the_rate_as_often_as_they_say():
    """Over speakers, who differ: drawing their utterances apart would cover it far less often."""
    rng = np.random.default_rng(0)
    by_speaker = by_utterance = 0
    speakers = np.repeat(np.arange(40), 6)
    for _ in range(300):
        rates = rng.beta(2, 8, size=40)  # the mean is 0.2
        errors = rng.binomial(10, rates[speakers])
        sizes = np.full(len(errors), 10)
        low, high = bootstrap(errors, sizes, speakers, draws=400)
        by_speaker += low <= 0.2 <= high
        low, high = bootstrap(errors, sizes, draws=400)
        by_utterance += low <= 0.2 <= high
    assert 0.91 <= by_speaker / 300 <= 0.98
    assert by_utterance / 300 < 0.85


def test_intervals_that_there_are_none_of():
    assert bootstrap([1, 2], [5, 5], ["a", "a"]) is None
    assert bootstrap([1], [5]) is None
    assert bootstrap([1, 1], [0, 0]) is None
    assert bootstrap([0, 0], [5, 5]) is None
    low, high = bootstrap([1, 1, 1], [0, 5, 5])
    assert 0 < low < high


# ---- Words -------------------------------------------------------------------------------------

TEXTS = st.lists(st.sampled_from("abc"), max_size=8)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_an_alignment_is_of_both_texts_and_minimal(reference, hypothesis):
    pairs = words.align(reference, hypothesis)
    assert [word for word, _ in pairs if word is not None] == reference
    assert [word for _, word in pairs if word is not None] == hypothesis
    counts = count_errors(" ".join(reference), " ".join(hypothesis))
    kinds = [("i" if a is None else "d" if b is None else "s") for a, b in pairs if a != b]
    assert kinds.count("i") == counts.insertions
    assert kinds.count("d") == counts.deletions
    assert kinds.count("s") == counts.substitutions


def test_confidences_are_of_the_words_that_were_heard():
    line = _line("A B C", "A X C D") | {
        "words": [["A", 0, 1, 0.9], ["X", 1, 2, 0.2], ["C", 2, 3, 0.8], ["D", 3, 4, 0.3]]
    }
    expected = [(0.9, True), (0.2, False), (0.8, True), (0.3, False)]
    assert list(words.confidences(line)) == expected
    assert list(words.confidences(_line("A", "A"))) == []
