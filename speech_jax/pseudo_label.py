"""Labels recordings with what a trained model hears in them, as data to train on (Lee 2013).

  python -m speech_jax.pseudo_label talks/ 'more/*.m4a' --model=runs/first --out=data/heard.jsonl
  python -m speech_jax.main --config=configs/librispeech.py --workdir=runs/second \\
      --config.data.root=/data/LibriSpeech \\
      --config.data.train_splits=train-clean-5,data/heard.jsonl

A PATH is an audio file of any container, rate, length and number of channels; a folder, which stands
for the audio files in it and in its folders; or a pattern such as 'calls/*.wav'. What is heard with
enough confidence is written to --out, a manifest: beside other splits, it is a training split.

Before: confidences are probabilities, and a language model helps, where the model was tuned
(--mode=tune of speech_jax.main, with config.decoder.lm). After: a first round is worth it where much
more speech is unlabelled than labelled; the model that learns from it can label again.

All that was heard is kept in OUT.heard, and OUT has of all of it what is sure enough: a command with
other recordings adds theirs. Only files that are new or have changed are heard; with another
--confidence nothing is heard again. In config.data.train_splits a manifest is a path below
config.data.root, or else one from the current folder, as OUT is. To label again with a better model,
name another OUT.
"""  # noqa: E501

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from speech_jax import files, recordings
from speech_jax.errors import UserError

_STATUS = """exit status: 0, all was heard; 1, something failed: it is named on standard error, with
the reason, and the rest is done; 2, the command line is wrong."""
# Seconds that a segment has beyond its first and its last word.
_MARGIN = 0.2


class Label(NamedTuple):
    """A part of a recording, in seconds, and what was heard there.

    `end` is None for a whole recording. `confidence` is the mean of its words'.
    """

    start: float
    end: float | None
    text: str
    confidence: float


class Heard(NamedTuple):
    """A recording of so many seconds, and its parts with words.

    `stamp` is the file's size in bytes and when it was last written: another one there is heard.
    """

    file: str
    stamp: tuple[int, int]
    seconds: float
    labels: tuple[Label, ...]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.confidence <= 1:
        parser.error(f"--confidence={chosen.confidence:g} must be from 0 to 1")
    if not 0 < chosen.longest < float("inf"):
        parser.error(f"--longest={chosen.longest:g} must be seconds, more than 0")
    if not chosen.out.endswith(".jsonl"):
        parser.error(f"--out={chosen.out} must end in .jsonl, for it is a manifest")
    if "-" in chosen.paths:
        parser.error("standard input cannot be trained on: give a file")
    return recordings.each(chosen.paths, lambda *given: _label(chosen, *given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.pseudo_label",
        description=__doc__,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a file, a folder or a pattern")
    add(
        "--model",
        required=True,
        help="a recognizer: a workdir, a saved model, an exported file or a folder of Hugging Face",
    )
    add("--out", required=True, metavar="FILE", help="the manifest to write, such as heard.jsonl")
    add(
        "--confidence",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="the least mean confidence of the words of what is kept, 0 to 1; default: 0.8",
    )
    add(
        "--longest",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="longer recordings are kept as segments, cut at pauses and, where these are far "
        "apart, between words; default: 20; a training leaves out what is longer than its "
        "config.data.max_seconds",
    )
    return parser


def _label(chosen: argparse.Namespace, inputs: list[recordings.Input], failures: list[str]) -> None:
    # Only now, so that --help and a wrong flag answer at once.
    from speech_jax.deploy.acoustic import open_acoustic
    from speech_jax.deploy.transcribe import Model

    out = files.expand(chosen.out).absolute()
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    acoustic = open_acoustic(chosen.model)
    model = Model(acoustic)
    by = {"model": _digest(acoustic, chosen.model), "longest": chosen.longest}
    by["decoder"] = _decoder(acoustic)
    stamps = {}
    for one in inputs:
        name = os.path.realpath(one.file)
        try:
            name.encode()
        except UnicodeEncodeError:
            recordings.fail(failures, f"{name!r}: its name is not UTF-8; rename the file")
        else:
            stamps[name] = _stamp(name)
    with Journal(out.with_name(f"{out.name}.heard"), by) as journal:
        _check(out, journal)
        known = lambda name: name in journal.heard and journal.heard[name].stamp == stamps[name]
        new = [name for name in stamps if not known(name)]
        with recordings.progress(len(new), "Listening") as (progress, _):
            found = model.transcribe_all(new, progress)
            for name, transcription in zip(new, found, strict=True):
                if isinstance(transcription, UserError):
                    recordings.fail(failures, str(transcription))
                elif transcription.trouble:
                    recordings.fail(failures, f"{name}: {transcription.trouble}")
                else:
                    labels = tuple(_labels(transcription, chosen.longest))
                    journal.add(Heard(name, stamps[name], transcription.seconds, labels))
        heard = [one for one in journal.heard.values() if _stamp(one.file) == one.stamp]
        changed = len(journal.heard) - len(heard)
        kept = [*_rows(heard, chosen.confidence)]
        lines = [json.dumps(row, ensure_ascii=False) for row in kept]
        content = "".join(f"{line}\n" for line in lines).encode()
        journal.writes(content)
        with files.writing(out):
            files.write_atomically(out, content)
    if changed:
        recordings.fail(
            failures,
            f"{changed} recordings that were heard are gone or have changed, and are not in {out}: "
            "bring them back, or name them to have them heard again",
        )
    recordings.say(f"{out}: {_summary(heard, kept)}\n")


def _check(out: pathlib.Path, journal: "Journal") -> None:
    """UserError where the manifest is not the journal's: it would be lost."""
    if not out.exists():
        return
    with files.writing(out):
        content = out.read_bytes()
    if not journal.has_written(content):
        raise UserError(
            f"{out} is not as this command wrote it: move it away, or name another --out"
        )


def _summary(heard: list[Heard], kept: list[dict[str, Any]]) -> str:
    sure = sorted(label.confidence for one in heard for label in one.labels)
    minutes = sum(row["duration"] for row in kept) / 60
    whole = sum(one.seconds for one in heard) / 60
    said = f"kept {len(kept)} of {len(sure)} parts with words, {minutes:.1f} of {whole:.1f} minutes"
    if sure and not kept:
        middle = sure[len(sure) // 2]
        said += (
            f"; their confidences are {sure[0]:.2f} to {sure[-1]:.2f}, half of them above "
            f"{middle:.2f}: lower --confidence"
        )
    return said


def _stamp(name: str) -> tuple[int, int]:
    """The size of a file and when it was written; zeros where there is none."""
    try:
        found = os.stat(name)
    except OSError:  # whoever hears it says why
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _digest(acoustic: Any, path: str) -> str:
    """What a model has learned, in a few letters: its weights, or the exported file."""
    import jax

    found = hashlib.sha256()
    if opened := getattr(acoustic, "bundle", None):
        for leaf in jax.tree.leaves((opened.params, opened.state)):
            found.update(leaf.tobytes())
    else:
        found.update(files.expand(path).read_bytes())
    return found.hexdigest()[:16]


def _decoder(acoustic: Any) -> dict[str, Any]:
    """The settings that a model decodes with, and the content of the files among them."""
    from speech_jax.decoding.decoder import Settings

    used = Settings.of(acoustic.decoder).used()
    named = {key: used[key] for key in ("lm", "lexicon") if used.get(key)}
    content = {key: hashlib.sha256(files.expand(path).read_bytes()) for key, path in named.items()}
    return used | {key: one.hexdigest()[:16] for key, one in content.items()}


def _labels(transcription: Any, longest: float) -> Iterator[Label]:
    """A recording as one label, or where it is longer than that, one for each segment.

    A segment that is longer, too, is cut between its words.
    """
    words = transcription.words
    if words and transcription.seconds <= longest:
        yield Label(0.0, None, transcription.text, _mean(words))
        return
    parts = [part for segment in transcription.segments for part in _parts(segment.words, longest)]
    ends = [0.0, *(part[-1].end for part in parts)]
    starts = [*(part[0].start for part in parts[1:]), transcription.seconds]
    for part, before, after in zip(parts, ends, starts, strict=False):
        start, end = part[0].start, part[-1].end
        # Half of a pause at most, for the other half is the neighbour's.
        first = max(start - _MARGIN, (before + start) / 2 if before else 0.0)
        last = min(end + _MARGIN, (end + after) / 2)
        text = " ".join(word.text for word in part)
        yield Label(round(first, 3), round(last, 3), text, _mean(part))


def _parts(words: Sequence[Any], longest: float) -> Iterator[list[Any]]:
    """Words in a row of `longest` seconds at most with their margins, as many as fit."""
    part: list[Any] = []
    for word in words:
        if part and word.end - part[0].start + 2 * _MARGIN > longest:
            yield part
            part = []
        part.append(word)
    if part:
        yield part


def _mean(words: Any) -> float:
    return round(sum(word.confidence for word in words) / len(words), 4)


def _rows(heard: list[Heard], least: float) -> Iterator[dict[str, Any]]:
    """The lines of the manifest."""
    for one in heard:
        for label in one.labels:
            if label.confidence < least:
                continue
            place = {"duration": round(one.seconds, 3)}
            if label.end is not None:
                place = {"offset": label.start, "duration": round(label.end - label.start, 3)}
            said = {"text": label.text, "confidence": label.confidence}
            yield {"audio_filepath": one.file, **place, **said}


class Journal:
    """What was heard so far, by file: a line for each recording, written as it is heard.

    While it is entered, no other command can be in it.

    Attributes:
      heard: by the path of the recording.
    """

    def __init__(self, path: pathlib.Path, by: dict[str, Any]):
        """`by` says who hears, and how."""
        self.heard: dict[str, Heard] = {}
        self._path, self._by, self._file = path, json.loads(json.dumps(by)), None
        self._written: set[str] = set()  # digests of manifests

    def __enter__(self) -> "Journal":
        """Reads what is there.

        Raises:
          UserError: another command has it, or another model, or another way of hearing, has
            written it.
        """
        with files.writing(self._path):
            self._file = self._path.open("a+", encoding="utf-8", errors="replace")
        try:
            if not files.lock(self._file):
                raise UserError(
                    f"another command writes {self._path}: wait for its end, or name another --out"
                )
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(OSError) if kind else files.writing(self._path):
            self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        first, *rest = map(_parsed, content.split("\n"))
        foreign = False
        for line in rest:
            if isinstance(line, dict):
                self._written.add(str(line.get("wrote")))
            elif one := _heard(line):
                self.heard[one.file] = one
            else:  # None: a command was killed while it wrote the line
                foreign |= line is not None
        if foreign and not self.heard:
            raise UserError(
                f"{self._path} has lines that this command cannot read: move it away, or name "
                "another --out"
            )
        if self.heard and first != self._by:
            other = first if isinstance(first, dict) else {}
            what = [key for key, value in self._by.items() if other.get(key) != value]
            raise UserError(
                f"{self._path} was heard with another {' and another '.join(what)}: name another "
                "--out, or delete that file and the manifest beside it"
            )
        if not self.heard:
            with files.writing(self._path):
                self._file.truncate(0)
            self._write(self._by, *({"wrote": digest} for digest in self._written))
        elif not content.endswith("\n"):
            self._file.write("\n")

    def _write(self, *lines: Any) -> None:
        with files.writing(self._path):
            self._file.write("".join(f"{json.dumps(line)}\n" for line in lines))
            self._file.flush()

    def add(self, heard: Heard) -> None:
        """Keeps a recording."""
        self._write(heard)
        self.heard[heard.file] = heard

    def writes(self, manifest: bytes) -> None:
        """Keeps that this manifest is made of it."""
        digest = hashlib.sha256(manifest).hexdigest()
        if digest not in self._written:
            self._write({"wrote": digest})

    def has_written(self, manifest: bytes) -> bool:
        """Whether a manifest was made of it."""
        return hashlib.sha256(manifest).hexdigest() in self._written


def _heard(line: Any) -> Heard | None:
    """The recording of a line of the journal; None where it is none."""
    try:
        file, (size, written), seconds, labels = line
        labels = tuple(
            Label(float(start), end if end is None else float(end), str(text), float(sure))
            for start, end, text, sure in labels
        )
        return Heard(str(file), (int(size), int(written)), float(seconds), labels)
    except (TypeError, ValueError):
        return None


def _parsed(line: str) -> Any:
    """What a line of JSON says; None where it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, recordings.leave)
    sys.exit(main())
