"""report.html: what an evaluation found, on one page that needs nothing else.

It is made of results.json, predictions/ and metrics.jsonl of a workdir, and of the audio of the
utterances with most errors. What it shows of every task are its results, coverage, curves of the
training, and a table of all utterances; with an evaluator's `tallies`, also rates with intervals,
by length, speaker and tag, and the worst utterances; and what the evaluator's `sections` add.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from speech_jax import files
from speech_jax.data import audio
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import Utterance
from speech_jax.evaluators import Evaluator, intervals, layer_weights, page, sounds, words
from speech_jax.evaluators.intervals import FEW
from speech_jax.evaluators.page import Html, Section, element
from speech_jax.evaluators.sounds import Media
from speech_jax.workdir import Workdir

# Utterances of a split that can be heard and seen.
_WORST = 20
# Bytes of a page that sounds and pictures may take, and those that the table may take.
_MEDIA_BYTES = 7_000_000
_TABLE_BYTES = 10_000_000
# Rows of a table of speakers or of a tag's values, and of the utterances that were not heard.
_ROWS = 100
# More values of a tag than this are no groups but texts or names.
_VALUES = 50
_CLIPS = 5  # the last ones of those that were generated
_CURVE_POINTS = 300
_DOTS = 30  # a curve of fewer points has a dot for each


def write_report(
    workdir: Workdir,
    evaluator: Evaluator,
    corpora: Mapping[str, Corpus],
    results: Mapping[str, Any],
) -> bool:
    """Writes workdir.report of the splits in `corpora`, whose predictions are in the workdir.

    `results` are what results.json holds. Returns whether it was written: a report that fails is a
    warning, since the results are safe by now. Only the first process writes.
    """
    if jax.process_index():
        return False
    try:
        text = make(workdir, evaluator, corpora, results)
        with files.writing(workdir.report):
            files.write_atomically(workdir.report, text)
    except Exception as error:
        logging.warning(
            "%s was not written (%s: %s); the results are in %s",
            workdir.report, type(error).__name__, error, workdir.results,
        )  # fmt: skip
        return False
    return True


def make(
    workdir: Workdir,
    evaluator: Evaluator,
    corpora: Mapping[str, Corpus],
    results: Mapping[str, Any],
) -> str:
    """The page that `write_report` writes."""
    media = Media(_MEDIA_BYTES)
    splits = [
        _read(workdir, name, corpus, evaluator, results["splits"][name])
        for name, corpus in corpora.items()
    ]
    sections = [Section("Results", _summary(splits))]
    for split in splits:
        sections.append(Section(split.name, _of_split(split, evaluator, media)))
    sections.append(Section("All utterances", _all_utterances(splits)))
    if curves := _curves(workdir.metrics):
        sections.append(Section("Training", curves))
    if heard := _generated(workdir):
        sections.append(Section("Generated", heard))
    if shares := results.get("training", {}).get("layer_weights"):
        sections.append(Section("Layers", _layers(shares)))
    sections.append(Section("About this model", _about(results)))
    return page.document(workdir.folder.name, sections)


# ---- What a split holds ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split's results, and its utterances with their lines of predictions.jsonl.

    `tallies` are errors and what they are of by the name of a rate, float64 [2, n].
    """

    name: str
    results: Mapping[str, Any]
    corpus: Corpus
    lines: Sequence[Mapping[str, Any]]
    index: Sequence[int]
    tallies: Mapping[str, np.ndarray]

    @functools.cached_property
    def utterances(self) -> list[Utterance]:
        return [self.corpus.source.utterances[index] for index in self.index]

    @functools.cached_property
    def speakers(self) -> list[str] | None:
        """The speaker of each utterance, if all of them are known."""
        return intervals.speakers(self.utterances)

    @property
    def main(self) -> str | None:
        """The rate by which utterances are ordered."""
        return next(iter(self.tallies), None)

    def interval(self, rate: str, chosen: np.ndarray | None = None) -> page.Point | None:
        """Of a rate, for the utterances at `chosen`: over speakers, if there are several."""
        errors, sizes = self.tallies[rate]
        chosen = np.arange(len(errors)) if chosen is None else chosen
        groups = None
        if self.speakers:
            groups = [self.speakers[place] for place in chosen]
            groups = groups if len(set(groups)) > 1 else None
        return intervals.bootstrap(errors[chosen], sizes[chosen], groups)


def _read(
    workdir: Workdir,
    name: str,
    corpus: Corpus,
    evaluator: Evaluator,
    results: Mapping[str, Any],
) -> _Split:
    text = workdir.predictions(name).read_bytes().decode()
    lines = [json.loads(line) for line in text.split("\n") if line]
    places = {utterance.id: index for index, utterance in enumerate(corpus.source.utterances)}
    found = [evaluator.tallies(line) for line in lines] if hasattr(evaluator, "tallies") else []
    tallies = {
        rate: np.asarray([one[rate] for one in found], np.float64).T for rate in (found or [{}])[0]
    }
    return _Split(name, results, corpus, lines, [places[line["id"]] for line in lines], tallies)


def _title(name: str) -> str:
    return name.upper() if name in ("wer", "cer") else name.replace("_", " ")


# ---- Results -----------------------------------------------------------------------------------


def _summary(splits: Sequence[_Split]) -> Html:
    """The figures of results.json with their intervals, a row for each split."""
    values = [item for split in splits for item in split.results.items()]
    names = dict.fromkeys(name for name, value in values if not isinstance(value, (dict, list)))
    heads, rows = ["split"], [[split.name] for split in splits]
    for name in names:
        share = any(name in split.tallies for split in splits)
        heads += [_title(name), "95% interval"] if share else [_title(name)]
        for split, row in zip(splits, rows, strict=True):
            value = split.results.get(name)
            if not share:
                row.append(value)
            else:
                row += [page.percent(value), page.number(page.said(split.interval(name)))]
    over = {"speakers" if split.speakers else "utterances" for split in splits}
    note = (
        f"Intervals are by the bootstrap over {' or '.join(sorted(over))} (Bisani and Ney 2004): "
        "how far the rate would move with others of the same kind."
    )
    tallied = any(split.tallies for split in splits)
    return page.join([_cards(splits), page.table(heads, rows, note if tallied else "")])


def _cards(splits: Sequence[_Split]) -> Html:
    cards = []
    for place, split in enumerate(splits):
        if split.main is None:
            continue
        interval = split.interval(split.main)
        of = f"{len(set(split.speakers))} speakers" if split.speakers else "utterances"
        cards.append(
            element(
                "a",
                element("b", split.name, dir="auto"),
                element("strong", page.percent(split.results[split.main])),
                element("span", f"{_title(split.main)}"),
                element("small", f"{page.said(interval)} over {of}" if interval else ""),
                href=f"#part{place + 1}",
                class_="card",
            )
        )
    return element("div", *cards, class_="cards")


def _of_split(split: _Split, evaluator: Evaluator, media: Media) -> Html:
    """All that is said of one split."""
    found = [Section("Coverage", _coverage(split))]
    if split.main:
        found.append(Section("By length", _by_length(split)))
        found += _by_tags(split)
    found += evaluator.sections(split.lines) if hasattr(evaluator, "sections") else []
    if split.main:
        found.append(Section("Utterances with most errors", _worst(split, media)))
    return page.join(
        element("section", element("h3", section.title), section.body) for section in found
    )


def _coverage(split: _Split) -> Html:
    """How much of the split the results are of, and why the rest is missing."""
    heard, missing = split.results["utterances"], split.results["left_out"]
    seconds = sum(utterance.duration for utterance in split.utterances)
    total = sum(utterance.duration for utterance in split.corpus.source.utterances)
    head = element(
        "p",
        f"{heard:,} of {heard + missing:,} utterances were heard: {_duration(seconds)} of "
        f"{_duration(total)} of audio"
        + (" that the split is known to have." if missing else ", all of the split."),
    )
    reasons = dict(split.corpus.left_out) | split.corpus.skipped
    unknown = missing - len(reasons)
    rows = [(name, why) for name, why in list(reasons.items())[:_ROWS]]
    if not rows:
        return head
    note = f"The first {_ROWS} of {len(reasons):,}." if len(reasons) > _ROWS else ""
    note += f" Of {unknown:,} more another process knows why." if unknown > 0 else ""
    return page.join([head, page.table(["was not heard", "why"], rows, note)])


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


# ---- Groups ------------------------------------------------------------------------------------


def _by_length(split: _Split) -> Html:
    """Rates of utterances from 2^k to 2^(k+1) seconds."""
    powers = [math.floor(math.log2(max(one.duration, 0.5))) for one in split.utterances]
    labels = {
        power: "below 1 s" if power < 0 else f"{2**power} to {2 ** (power + 1)} s"
        for power in sorted(set(powers))
    }
    return _groups(split, "seconds", [labels[power] for power in powers], list(labels.values()))


def _by_tags(split: _Split) -> Iterator[Section]:
    """By speaker, and by every tag of the corpus that has a value for several utterances each."""
    if split.speakers:
        yield Section("By speaker", _groups(split, "speaker", split.speakers))
    names = {name for utterance in split.utterances for name in utterance.tags}
    for name in sorted(names - {"speaker"}):
        values = [str(utterance.tags.get(name, "")) or "–" for utterance in split.utterances]
        if 1 < len(set(values)) <= min(_VALUES, len(values) / 2):
            yield Section(f"By {name}", _groups(split, name, values))


def _groups(
    split: _Split, head: str, labels: Sequence[str], order: Sequence[str] | None = None
) -> Html:
    """A row for each group of utterances: in the order given, or with the highest rate first."""
    errors, sizes = split.tallies[split.main]
    members: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        members.setdefault(label, []).append(place)
    rates = {}
    for label, places in members.items():
        size = sizes[places].sum()
        rates[label] = errors[places].sum() / size if size else None
    order = order or sorted(members, key=lambda label: (-(rates[label] or 0.0), label))
    note = f"The {_ROWS} highest of {len(order):,}." if len(order) > _ROWS else ""
    order = order[:_ROWS]
    chosen = {label: np.asarray(members[label]) for label in order}
    spans = {label: split.interval(split.main, places) for label, places in chosen.items()}
    # The scale is of groups that an interval says something of; wider ones go over its edge.
    many = [label for label in order if len(members[label]) >= FEW] or order
    ends = [(spans[label] or (0.0, 0.0))[1] for label in many]
    top = max([*ends, *(rates[label] or 0.0 for label in many)], default=0.0)
    counted = split.speakers and head != "speaker"
    rows = []
    for label, places in chosen.items():
        row: list[object] = [label, len(places)]
        said = page.number(page.said(spans[label]))
        if counted:
            speakers = len({split.speakers[place] for place in places})
            row.append(speakers)
            if speakers < FEW and spans[label]:
                said = element("span", said, class_="few", title="of few speakers")
                note = note or f"The interval of fewer than {FEW} speakers says little: it is grey."
        row += [_count(errors[places].sum()), _count(sizes[places].sum())]
        row += [page.percent(rates[label]), page.whisker(rates[label], spans[label], top), said]
        rows.append(row)
    heads = [head, "utterances", *(["speakers"] if counted else []), "errors", "of"]
    return page.table([*heads, _title(split.main), "", "95% interval"], rows, note)


def _count(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


# ---- Utterances --------------------------------------------------------------------------------


def _ranked(split: _Split) -> list[int]:
    """The lines of a split, those with most errors first and then by their rate."""
    if split.main is None:
        return list(range(len(split.lines)))
    errors, sizes = split.tallies[split.main]
    return np.lexsort((-errors / np.maximum(sizes, 1), -errors)).tolist()


def _worst(split: _Split, media: Media) -> Html:
    errors, _ = split.tallies[split.main]
    chosen = [place for place in _ranked(split)[:_WORST] if errors[place] > 0]
    if not chosen:
        return element("p", "No utterance has an error.")
    share = errors[chosen].sum() / errors.sum()
    intro = f"These {len(chosen)} utterances make {100 * share:.0f}% of all errors."
    cards = (_utterance(split, place, media) for place in chosen)
    legend = words.LEGEND if any("hypothesis" in split.lines[place] for place in chosen) else ""
    return page.join([element("p", intro, class_="note"), legend, *cards])


def _utterance(split: _Split, place: int, media: Media) -> Html:
    utterance, line = split.utterances[place], split.lines[place]
    errors, size = (_count(value) for value in split.tallies[split.main][:, place])
    facts = [
        f"{errors:,} {'error' if errors == 1 else 'errors'} of {size:,}",
        f"{utterance.duration:.2f} s",
    ]
    facts += [f"{name} {value}" for name, value in utterance.tags.items() if len(str(value)) < 60]
    facts = " · ".join(facts)
    compared = "reference" in line and "hypothesis" in line
    return element(
        "article",
        element("h4", utterance.id, dir="auto"),
        element("p", facts, class_="note", dir="auto"),
        words.drawn(words.of_line(line)) if compared else page.definitions(_details(line)),
        media.of(split.corpus, split.index[place], line),
    )


def _details(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says in numbers and short texts."""
    hidden = ("id", "words", "score")
    return {
        name.replace("_", " "): value
        for name, value in line.items()
        if name not in hidden and (value is None or isinstance(value, (str, int, float)))
    }


def _all_utterances(splits: Sequence[_Split]) -> Html:
    """The table that report.js fills, and its rows as JSON, as many as there is room for."""
    ranked = [
        (split, number, place) for number, split in enumerate(splits) for place in _ranked(split)
    ]
    if all(split.main for split in splits):
        ranked.sort(key=lambda one: -one[0].tallies[one[0].main][0, one[2]])
    rows: list[str] = []
    size = 0
    for split, number, place in ranked:
        row = page.json_text(_row(split, number, place))
        size += len(row.encode()) + 1
        if size > _TABLE_BYTES:
            break
        rows.append(row)
    names = [split.name for split in splits]
    data = f'{{"splits": {page.json_text(names)}, "rows": [{",".join(rows)}]}}'
    heads = ["split", "utterance", "speaker", "seconds", "errors", "of", "text"]
    note = f"There is room for {len(rows):,} of {len(ranked):,}." if len(rows) < len(ranked) else ""
    return page.join([page.searched(heads, data), element("p", note, class_="note")])


def _row(split: _Split, number: int, place: int) -> list[Any]:
    """[split, id, speaker, seconds, errors, of, text]; text is equal runs and pairs that differ."""
    utterance, line = split.utterances[place], split.lines[place]
    counts = split.tallies[split.main][:, place] if split.main else (None, None)
    text: list[Any] = []
    if "reference" not in line or "hypothesis" not in line:
        text = [
            " · ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in _details(line).items()
            )
        ]
    elif line["reference"] == line["hypothesis"]:
        text = [line["reference"]]
    else:
        for reference, hypothesis in words.of_line(line):
            if reference != hypothesis:
                text.append([reference or "", hypothesis or ""])
            elif text and isinstance(text[-1], str):
                text[-1] += f" {reference}"
            else:
                text.append(reference)
    return [
        number,
        utterance.id,
        str(utterance.tags.get("speaker", "")),
        round(utterance.duration, 2),
        *(None if count is None else _count(round(count, 2)) for count in counts),
        text,
    ]


# ---- The run -----------------------------------------------------------------------------------


def _curves(metrics: pathlib.Path) -> Html | None:
    """A plot of everything in metrics.jsonl that changes; the scores of the splits come first."""
    try:
        text = metrics.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    series: dict[str, list[page.Point]] = {}
    for line in text.split("\n"):
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue  # a run that was killed left half a line
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((step, value))
    shown = {name: of for name, of in series.items() if len({value for _, value in of}) > 1}
    plots = [
        page.plot(
            name.replace("_", " "),
            _thinned(shown[name]),
            labels=("updates", ""),
            marked=len(shown[name]) <= _DOTS,
        )
        for name in sorted(shown, key=lambda name: "/" not in name)
    ]
    return element("div", *plots, class_="plots") if plots else None


def _thinned(points: Sequence[page.Point]) -> Sequence[page.Point]:
    """At most so many points, each the mean of its neighbours."""
    if len(points) <= _CURVE_POINTS:
        return points
    pieces = np.array_split(np.asarray(points, np.float64), _CURVE_POINTS)
    return [(float(x), float(y)) for x, y in (piece.mean(0) for piece in pieces)]


def _generated(workdir: Workdir) -> Html | None:
    """Players of what the model made at its last evaluations (evaluators/generated.py)."""
    folder = workdir.generated(0).parent
    steps = sorted(int(path.stem) for path in folder.glob("*.wav") if path.stem.isdigit())
    rows = [
        [f"update {step:,}", sounds.player(audio.decode(workdir.generated(step), sounds.RATE))]
        for step in steps[-_CLIPS:]
    ]
    return page.table(["after", "a held-out utterance"], rows) if rows else None


def _layers(shares: Sequence[float]) -> Html:
    """The share of each layer in the sum that the head gets (evaluators/layer_weights.py)."""
    top = max(shares)
    rows = [
        [name, page.percent(share, 1), page.whisker(share, None, top)]
        for name, share in zip(layer_weights.names(shares), shares, strict=True)
    ]
    return page.table(["layer", "share in the sum", ""], rows)


def _about(results: Mapping[str, Any]) -> Html:
    facts = {
        name.replace("_", " "): value
        for section in ("training", "versions")
        for name, value in results.get(section, {}).items()
        if name != "layer_weights"  # a section of its own
    }
    config = json.dumps(results.get("config", {}), indent=2, ensure_ascii=False)
    return page.join(
        [
            page.definitions(facts),
            element("details", element("summary", "Configuration"), element("pre", config)),
        ]
    )
