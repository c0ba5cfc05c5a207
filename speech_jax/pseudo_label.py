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

All that was heard is kept in OUT.heard. The same command goes on where it was and hears only files
that are new or have changed; with another --confidence nothing is heard again. A manifest is found
from the current folder, as OUT is, or below config.data.root.
"""  # noqa: E501

import argparse
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
    add("--model", required=True, help="a recognizer: a workdir or a saved model")
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
        help="longer recordings are kept as segments between pauses; default: 20, as "
        "config.data.max_seconds",
    )
    return parser


def _label(chosen: argparse.Namespace, inputs: list[recordings.Input], failures: list[str]) -> None:
    # Only now, so that --help and a wrong flag answer at once.
    from speech_jax.deploy.acoustic import open_acoustic
    from speech_jax.deploy.transcribe import Model

    out = files.expand(chosen.out)
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    acoustic = open_acoustic(chosen.model)
    model = Model(acoustic)
    by = {"model": _digest(acoustic, chosen.model), "longest": chosen.longest}
    by["decoder"] = _decoder(acoustic)
    journal = Journal(out.with_name(f"{out.name}.heard"), by)
    names = [os.path.realpath(one.file) for one in inputs]
    stamps = {name: _stamp(name) for name in names}
    known = lambda name: name in journal.heard and journal.heard[name].stamp == stamps[name]
    new = [name for name in names if not known(name)]
    with recordings.progress(len(new), "Listening") as (progress, _), journal:
        found = model.transcribe_all(new, progress)
        for name, transcription in zip(new, found, strict=True):
            if isinstance(transcription, UserError):
                recordings.fail(failures, str(transcription))
            elif transcription.trouble:
                recordings.fail(failures, f"{name}: {transcription.trouble}")
            else:
                labels = tuple(_labels(transcription, chosen.longest))
                journal.add(Heard(name, stamps[name], transcription.seconds, labels))
    heard = [journal.heard[name] for name in names if known(name)]
    kept = [*_rows(heard, chosen.confidence)]
    with files.writing(out):
        lines = [json.dumps(row, ensure_ascii=False) for row in kept]
        files.write_atomically(out, "".join(f"{line}\n" for line in lines))
    hours = sum(row["duration"] for row in kept) / 3600
    whole = sum(one.seconds for one in heard) / 3600
    parts = sum(len(one.labels) for one in heard)
    recordings.say(
        f"{out.absolute()}: {len(kept)} of {parts} parts with words, {hours:.2f} of {whole:.2f} "
        "hours\n"
    )


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

    Attributes:
      heard: by the path of the recording.
    """

    def __init__(self, path: pathlib.Path, by: dict[str, Any]):
        """Reads the journal at `path`, if there is one; `by` says who hears, and how.

        Raises:
          UserError: another model, or another way of hearing, has written it.
        """
        self.heard: dict[str, Heard] = {}
        self._path, self._lines = path, None
        if path.exists():
            lines = path.read_text().splitlines()
            if not lines or _parsed(lines[0]) != json.loads(json.dumps(by)):
                raise UserError(
                    f"{path} is what another model heard, or the same one when it had learned "
                    "other things or decoded otherwise: name another --out, or delete it"
                )
            for line in map(_parsed, lines[1:]):
                if line is None:  # the end of a command that was killed
                    break
                file, stamp, seconds, labels = line
                labels = tuple(Label(*label) for label in labels)
                self.heard[file] = Heard(file, tuple(stamp), seconds, labels)
        whole = [by, *self.heard.values()]
        with files.writing(path):
            files.write_atomically(path, "".join(f"{json.dumps(one)}\n" for one in whole))

    def __enter__(self) -> "Journal":
        with files.writing(self._path):
            self._lines = self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def add(self, heard: Heard) -> None:
        """Keeps a recording."""
        with files.writing(self._path):
            self._lines.write(f"{json.dumps(heard)}\n")
            self._lines.flush()
        self.heard[heard.file] = heard


def _parsed(line: str) -> Any:
    """What a line of JSON says; None where it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, recordings.leave)
    sys.exit(main())
