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

All that was heard is kept in OUT.heard. The same command goes on where it was, hears only what is
new, and with another --confidence nothing is heard again.
"""  # noqa: E501

import argparse
import json
import os
import pathlib
import signal
import sys
from collections.abc import Iterator
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
    """A recording of so many seconds, and its parts with words."""

    file: str
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
    by = {"model": os.path.realpath(os.path.expanduser(chosen.model)), "longest": chosen.longest}
    by["decoder"] = dict(acoustic.decoder)
    journal = Journal(out.with_name(f"{out.name}.heard"), by)
    names = [os.path.realpath(one.file) for one in inputs]
    new = [name for name in names if name not in journal.heard]
    with recordings.progress(len(new), "Listening") as (progress, _), journal:
        found = Model(acoustic).transcribe_all(new, progress)
        for name, transcription in zip(new, found, strict=True):
            if isinstance(transcription, UserError):
                recordings.fail(failures, str(transcription))
            elif transcription.trouble:
                recordings.fail(failures, f"{name}: {transcription.trouble}")
            else:
                labels = tuple(_labels(transcription, chosen.longest))
                journal.add(Heard(name, transcription.seconds, labels))
    heard = [journal.heard[name] for name in names if name in journal.heard]
    kept = [*_rows(heard, chosen.confidence)]
    with files.writing(out):
        lines = [json.dumps(row, ensure_ascii=False) for row in kept]
        files.write_atomically(out, "".join(f"{line}\n" for line in lines))
    hours = sum(row["duration"] for row in kept) / 3600
    whole = sum(one.seconds for one in heard) / 3600
    recordings.say(
        f"{out}: {len(kept)} of {sum(len(one.labels) for one in heard)} parts with words, "
        f"{hours:.2f} of {whole:.2f} hours\n"
    )


def _labels(transcription: Any, longest: float) -> Iterator[Label]:
    """A recording as one label, or where it is longer than that, one for each segment."""
    words = transcription.words
    if words and transcription.seconds <= longest:
        yield Label(0.0, None, transcription.text, _mean(words))
        return
    segments = transcription.segments
    ends = [0.0, *(segment.end for segment in segments)]
    starts = [*(segment.start for segment in segments[1:]), transcription.seconds]
    for segment, before, after in zip(segments, ends, starts, strict=False):
        # Half of a pause at most, for the other half is the neighbour's.
        first = max(segment.start - _MARGIN, (before + segment.start) / 2 if before else 0.0)
        last = min(segment.end + _MARGIN, (segment.end + after) / 2)
        yield Label(round(first, 3), round(last, 3), segment.text, _mean(segment.words))


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
            if not lines or json.loads(lines[0]) != json.loads(json.dumps(by)):
                raise UserError(
                    f"{path} is what another model heard, or the same one with other settings: "
                    "name another --out, or delete it"
                )
            for line in lines[1:]:
                try:
                    file, seconds, labels = json.loads(line)
                except ValueError:  # the end of a command that was killed
                    break
                self.heard[file] = Heard(file, seconds, tuple(Label(*label) for label in labels))
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


if __name__ == "__main__":
    signal.signal(signal.SIGINT, recordings.leave)
    sys.exit(main())
