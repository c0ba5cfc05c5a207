"""What report.html is made of: escaped text, tables and plots.

What is no `Html` is text and gets escaped, since ids and transcripts may hold anything.
"""

import base64
import datetime
import hashlib
import html
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Point = tuple[float, float]
# A table of more rows scrolls in a box of its own.
_TALL = 12
# Classes of the largest matrix of counts.
_LARGEST = 40


class Html(str):
    """Text that is HTML already."""


class Section(NamedTuple):
    """A part of the report under a heading of its own."""

    title: str
    body: Html


def markup(content: object) -> Html:
    """Anything as HTML: text escaped, numbers as people write them, a dash for None."""
    if isinstance(content, Html):
        return content
    if content is None:
        return number("–")
    if isinstance(content, int):
        return number(f"{content:,}")
    if isinstance(content, float):
        return number(f"{content:.4g}")
    # Half of a surrogate pair, which UTF-8 cannot hold, is shown by its number.
    return Html(html.escape(str(content).encode("utf-8", "backslashreplace").decode()))


def element(tag: str, /, *content: object, **attributes: object) -> Html:
    """An element of HTML; `_` at the end of an attribute's name is dropped, inside it is `-`.

    An attribute that is True has no value, one that is None or False is left out.
    """
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            written += f" {key}" if value is True else f' {key}="{_attribute(value)}"'
    if tag in ("img", "meta", "input"):
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(content)}</{tag}>")


def join(content: Iterable[object]) -> Html:
    """One piece after another."""
    return Html("".join(map(markup, content)))


def number(text: str) -> Html:
    """What stands to the right in the cell of a table."""
    return Html(f'<span class="number">{markup(text)}</span>')


def percent(share: float | None, digits: int = 2) -> Html:
    """A share in per cent."""
    return markup(None) if share is None else number(f"{100 * share:.{digits}f}%")


def _attribute(value: object) -> str:
    return markup(f"{value:g}" if isinstance(value, float) else str(value))


# ---- Tables ------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> Html:
    """A table with a row of heads, and a note below it."""
    rows = [[markup(cell) for cell in row] for row in rows]
    if not rows:
        return element("p", note or "There is none.")
    right = [cell.startswith('<span class="number">') for cell in rows[0]]
    head = (
        element("th", name, scope="col", class_="right" if of else None)
        for name, of in zip(heads, right, strict=True)
    )
    body = (element("tr", *(element("td", cell, dir="auto") for cell in row)) for row in rows)
    made = element(
        "table", element("thead", element("tr", *head)), element("tbody", *body)
    )  # fmt: skip
    kind = "scrolled tall" if len(rows) > _TALL else "scrolled"
    return join([scrolled(made, kind), element("p", note, class_="note") if note else ""])


def scrolled(content: Html, kind: str = "scrolled") -> Html:
    """Content that may be wider than the screen; the arrow keys move it."""
    return element("div", content, class_=kind, tabindex=0)


def side_by_side(*content: Html) -> Html:
    """Pieces beside each other where the screen is wide enough."""
    return element("div", *(element("div", one) for one in content if one), class_="beside")


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]], note: str = "") -> Html:
    """Counts [what it is, what was said] of classes, shaded by their share of the row.

    Of more classes than can be shown, it is of those that are confused most, and says so.
    """
    numbers = np.asarray(counts)
    totals = np.maximum(numbers.sum(1), 1)
    wrong = numbers - np.diag(np.diag(numbers))
    shown = np.sort(np.argsort(-wrong.sum(0) - wrong.sum(1), kind="stable")[:_LARGEST])
    if len(shown) < len(names):
        among = wrong[np.ix_(shown, shown)].sum()
        note += (
            f" The {len(shown)} classes of {len(names):,} that are confused most, with {among:,} "
            f"of {wrong.sum():,} confusions; a row's shade is its share of all of its class."
        )
    names = [names[place] for place in shown]
    head = [element("th", "is \\ said", scope="col"), *(_turned(name) for name in names)]
    rows = []
    for name, place in zip(names, shown, strict=True):
        cells = (
            element(
                "td",
                int(numbers[place, said]) or "",
                class_="right" if said == place else "wrong",
                style=f"--share: {numbers[place, said] / totals[place]:.3f}",
            )
            for said in shown
        )
        rows.append(element("tr", element("th", name, scope="row", dir="auto"), *cells))
    made = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *rows),
        class_="matrix",
    )
    return join([scrolled(made), element("p", note.strip(), class_="note") if note else ""])


def _turned(name: str) -> Html:
    return element("th", element("span", name, dir="auto"), scope="col")


# ---- Plots -------------------------------------------------------------------------------------


def whisker(share: float | None, interval: Point | None, top: float) -> Html:
    """A rate as a dot and its interval as a line, on a scale from 0 to `top`."""
    if share is None:
        return Html("")
    place = lambda value: round(4 + 152 * min(value / top, 1.0), 1) if top else 4
    says = f"{100 * share:.2f}%" + (f", {said(interval)}" if interval else "")
    line = element("line", x1=4, x2=156, y1=8, y2=8, class_="track")
    if interval:
        low, high = map(place, interval)
        line += element("line", x1=low, x2=high, y1=8, y2=8, class_="interval")
    dot = element("circle", cx=place(share), cy=8, r=4)
    return element(
        "svg", element("title", says), Html(line), dot, viewBox="0 0 160 16", class_="whisker",
        role="img",
    )  # fmt: skip


def said(interval: Point | None) -> str:
    """An interval of shares in per cent."""
    return "–" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}%"


def plot(
    title: str,
    points: Sequence[Point],
    *,
    across: tuple[float, float] | None = None,
    up: tuple[float, float] | None = None,
    labels: tuple[str, str] = ("", ""),
    marked: bool = False,
    diagonal: bool = False,
) -> Html:
    """A line through points, with axes of their range or `across` and `up`.

    Args:
      labels: of the axes across and up.
      marked: whether each point is a dot that says its numbers.
      diagonal: whether the line of equal values is drawn too.
    """
    across = across or _range([x for x, _ in points])
    up = up or _range([y for _, y in points])
    x_of = lambda x: round(52 + 260 * (x - across[0]) / (across[1] - across[0]), 1)
    y_of = lambda y: round(140 - 128 * (y - up[0]) / (up[1] - up[0]), 1)
    drawn = []
    for tick in _ticks(*up):
        y = y_of(tick)
        drawn.append(element("line", x1=52, x2=312, y1=y, y2=y, class_="grid"))
        drawn.append(element("text", f"{tick:.4g}", x=47, y=y + 3.5, text_anchor="end"))
    for tick in _ticks(*across):
        drawn.append(
            element("text", f"{tick:,.6g}", x=x_of(tick), y=154, text_anchor="middle")
        )  # fmt: skip
    if diagonal:
        ends = {"x1": x_of(up[0]), "y1": y_of(up[0]), "x2": x_of(up[1]), "y2": y_of(up[1])}
        drawn.append(element("line", **ends, class_="diagonal"))
    path = " ".join(f"{x_of(x)},{y_of(y)}" for x, y in points)
    drawn.append(element("polyline", points=path))
    for x, y in points if marked else points[-1:]:
        tip = element("title", f"{x:.4g}: {y:.4g}")
        drawn.append(element("circle", tip, cx=x_of(x), cy=y_of(y), r=3))
    drawn.append(element("text", labels[0], x=312, y=168, text_anchor="end", class_="label"))
    drawn.append(element("text", labels[1], x=52, y=8, class_="label"))
    picture = element("svg", *drawn, viewBox="0 0 324 172", role="img", aria_label=title)
    return element("figure", element("figcaption", title), picture)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    return (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between two."""
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(size * by for by in (1, 2, 5, 10, 20) if (high - low) / (size * by) <= 5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def definitions(values: Mapping[str, object]) -> Html:
    """Names with their values."""
    pairs = (
        element("div", element("dt", name), element("dd", value, dir="auto"))
        for name, value in values.items()
    )
    return element("dl", *pairs)


# ---- The page ----------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """JSON that ends no script element and that UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode()


def searched(heads: Sequence[str], data: str) -> Html:
    """A table that report.js fills with `data`, JSON by `json_text`, and searches and sorts."""
    search = element("input", type="search", id="search", dir="auto")
    wrong = element("input", type="checkbox", id="wrong")
    controls = element(
        "div",
        element("label", "Search ", search),
        element("label", wrong, " only with errors"),
        element("span", id="count", aria_live="polite"),
        class_="controls",
    )
    columns = (element("th", element("button", head, type="button"), scope="col") for head in heads)
    head, body = element("thead", element("tr", *columns)), element("tbody")
    filled = element("table", head, body, id="utterances")
    return join(
        [
            element("noscript", "The table needs JavaScript."),
            controls,
            scrolled(filled),
            element("button", "Show more", type="button", id="more"),
            element("script", Html(data), type="application/json", id="rows"),
        ]
    )


def document(name: str, sections: Sequence[Section]) -> str:
    """The whole  Its policy lets it load nothing, and run no other script than its own."""
    style, script = _file("report.css"), _file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = (
        element("a", section.title, href=f"#part{place}", dir="auto")
        for place, section in enumerate(sections)
    )
    parts = (
        element(
            "section", element("h2", section.title, dir="auto"), section.body, id=f"part{place}"
        )
        for place, section in enumerate(sections)
    )
    now = datetime.datetime.now().astimezone()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=Html(policy)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{name}: report"),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element(
            "header",
            element("h1", name, dir="auto"),
            element("p", f"Evaluated {now:%Y-%m-%d %H:%M %Z}", class_="note"),
            element("nav", *links, aria_label="Parts of the report"),
        ),
        element("main", *parts),
        element("script", Html(script)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
