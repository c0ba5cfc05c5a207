"""Common Voice: tables of clips (train.tsv, dev.tsv, validated.tsv) beside the folder clips/."""

import os
import pathlib

from speech_jax.data.sources import base, manifest

_TEXT, _PATH = "sentence", "path"


def open_split(
    root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path
) -> base.FileSource:
    """Opens root/split.tsv.

    client_id is the speaker and locale the language; other columns (age, gender, accents, votes)
    become tags of their own names.
    """
    table = manifest.find(root, split, "tsv")
    lines = base.read_text(table).split("\n")
    columns = lines[0].rstrip("\r").split("\t")
    if not {_TEXT, _PATH} <= set(columns):
        raise base.SourceError(
            f"{table} is not a table of Common Voice: its first line must name the "
            f"columns {_PATH!r} and {_TEXT!r}, between tabs"
        )
    problems: dict[str, str] = {}
    rows = []
    for number, line in enumerate(lines[1:], 2):
        where, values = f"{table}:{number}", line.rstrip("\r").split("\t")
        if not line.strip():
            continue
        if len(values) != len(columns):
            problems[where] = f"{len(values)} values for {len(columns)} columns; correct the line"
            continue
        row = dict(zip(columns, values, strict=True))
        name, text = row.pop(_PATH).strip(), row.pop(_TEXT).strip()
        if not name or not text:
            problems[where] = "without path or sentence; complete or delete it"
            continue
        path = base.present(os.path.join(table.parent, "clips", name))
        id_ = pathlib.PurePath(name).with_suffix("").as_posix()
        rows.append(base.Row(where, id_, path, text, base.tags(row)))
    if not rows and not problems:
        raise base.SourceError(f"{table} has no lines below its columns")
    kept = base.durations_file(cache, table)
    return base.from_rows(f"table {table}", rows, table.parent, kept, problems, on_error)
