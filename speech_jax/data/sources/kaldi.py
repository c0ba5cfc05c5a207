"""Kaldi data folders: wav.scp, text, and where there are any segments, utt2spk and utt2lang."""

import os
import pathlib
import re

from speech_jax.data.sources import base

_TAGS = {"utt2spk": "speaker", "utt2lang": "language", "utt2gender": "gender"}


def open_split(
    root: pathlib.Path, split: str, on_error: str, cache: pathlib.Path
) -> base.FileSource:
    """Opens the data folder root/split.

    Paths in wav.scp are relative to the folder, to `root` or to the working directory, whichever
    has the file. Commands (entries that end in |) are not run, and archives (ark:offset) are not
    opened: such recordings are named.
    """
    folder = root / os.path.expanduser(split)
    if not (folder / "wav.scp").is_file():
        known = sorted(path.parent.name for path in root.glob("*/wav.scp"))
        raise base.SourceError(
            f"there is no Kaldi data folder {folder} with a wav.scp; {root} has "
            f"{base.listed(known)}"
        )
    problems: dict[str, str] = {}
    recordings = _table(folder / "wav.scp", problems)
    texts = _table(folder / "text", problems)
    columns = {tag: _table(folder / name, problems) for name, tag in _TAGS.items()}
    cuts = _segments(folder / "segments", problems)
    if cuts is None:
        cuts = {name: (name, None, None) for name in recordings}
    rows = []
    for name, (recording, offset, duration) in cuts.items():
        where = f"{folder / 'wav.scp'}: {recording}"
        if recording not in recordings:
            problems[f"{folder / 'segments'}: {name}"] = (
                f"its recording {recording!r} is not in wav.scp; add it"
            )
        elif refused := _refusal(recordings[recording]):
            problems[where] = refused
        elif texts and name not in texts:
            problems[f"{folder / 'text'}: {name}"] = "no transcript; add its line"
        else:
            path = _path(recordings[recording], folder, root)
            tags = {tag: table[name] for tag, table in columns.items() if table.get(name)}
            where = where if offset is None else f"{folder / 'segments'}: {name}"
            rows.append(base.Row(where, name, path, texts.get(name, ""), tags, offset, duration))
    for name in texts.keys() - cuts.keys():
        problems[f"{folder / 'text'}: {name}"] = "transcript without audio; add it or delete it"
    kept = base.durations_file(cache, folder)
    return base.from_rows(f"Kaldi folder {folder}", rows, folder, kept, problems, on_error)


def _table(path: pathlib.Path, problems: dict[str, str]) -> dict[str, str]:
    """Returns the lines 'KEY VALUE' of a file; none where there is no file."""
    table: dict[str, str] = {}
    if path.is_file():
        for number, line in enumerate(base.read_text(path).split("\n"), 1):
            key, *value = line.split(maxsplit=1) or [""]
            if key in table:
                problems[f"{path}:{number}"] = f"second line of {key!r}; keep one"
            elif key:
                table[key] = "".join(value).strip()
    return table


def _segments(
    path: pathlib.Path, problems: dict[str, str]
) -> dict[str, tuple[str, float, float | None]] | None:
    """Returns utterance -> (recording, offset, duration); None where there is no such file."""
    if not path.is_file():
        return None
    found = {}
    for name, line in _table(path, problems).items():
        try:
            recording, begin, end = line.split()[:3]
            begin, end = float(begin), float(end)
            if not (0 <= begin < 1e12 and (end == -1 or begin < end < 1e12)):
                raise ValueError
        except ValueError:
            problems[f"{path}: {name}"] = (
                f"{line[:80]!r} is not RECORDING BEGIN END in seconds; correct it"
            )
            continue
        found[name] = (recording, begin, None if end == -1 else end - begin)
    return found


def _refusal(entry: str) -> str:
    if entry.endswith("|") or entry == "-":
        return "a command, which is not run; write its audio to a file and name that"
    if re.search(r"\.ark:\d+(\[.*\])?$", entry):
        return "part of an archive (ark); write its audio to a file and name that"
    return "" if entry else "no path; add that of its audio file"


def _path(entry: str, folder: pathlib.Path, root: pathlib.Path) -> str:
    entry = os.path.expanduser(entry)
    places = [base.present(os.path.join(place, entry)) for place in (folder, root, "")]
    return next((place for place in places if os.path.exists(place)), places[0])
