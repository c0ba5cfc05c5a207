"""Writes down what is said in recordings.

  python -m speech_jax.transcribe talk.flac --model=runs/quickstart
  python -m speech_jax.transcribe calls/ 'more/*.m4a' --model=runs/quickstart --format=srt --out=subtitles
  ffmpeg ... -f wav - | python -m speech_jax.transcribe - --model=runs/quickstart --format=json --words

A PATH is an audio file of any container, rate, length and number of channels; a folder, which stands
for the audio files in it and in its folders; a pattern such as 'calls/*.wav'; or -, for the bytes of
a file on standard input. The text goes to standard output in the order of the recordings, each as
soon as it is ready; with --out, to a file for each recording.
"""  # noqa: E501

import argparse
import contextlib
import glob
import io
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from speech_jax import files
from speech_jax.errors import UserError

_STATUS = """exit status: 0, all is transcribed; 1, something failed: it is named on standard error,
with the reason, and the rest is done; 2, the command line is wrong."""
# What follows is known elsewhere too; --help and a wrong flag answer at once, without libraries.
_FORMATS = ("text", "json", "srt", "vtt", "ctm", "textgrid", "tsv")
_DECODERS = ("greedy", "beam", "lexicon")
_CHUNK_SECONDS, _WIDTHS, _DEFAULT_WIDTH, _DEFAULT_LM_WEIGHT = (5, 300), (1, 1024), 16, 0.5


class Input(NamedTuple):
    """A recording, and where in the output folder its transcription goes, without a suffix.

    No two recordings have the same place.
    """

    file: str
    place: pathlib.PurePath


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if wrong := _wrong(chosen):
        parser.error(wrong)
    failures: list[str] = []
    inputs = list(_inputs(chosen.paths, failures))
    if inputs:
        try:
            _transcribe(chosen, inputs, failures, parser.error)
        except UserError as error:  # of the model, or of the place that all is written to
            message = str(error)
            if chosen.lm is not None:  # a user of flags knows no sections
                message = message.replace("config.decoder.lm=", "--lm=")
            _fail(failures, message)
        except BrokenPipeError:  # nobody reads on
            _forget_output()
            return 1
    return int(bool(failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.transcribe",
        description=__doc__,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a file, a folder, a pattern or -")
    add(
        "--model",
        required=True,
        help="a workdir, a saved model, a Hugging Face folder, or an exported file (.sjx, .onnx)",
    )
    add(
        "--format",
        default="text",
        metavar="FORMAT",
        help="text (a line a recording), json (an object a line), srt or vtt (subtitles), ctm (for "
        "sclite), textgrid (for Praat), tsv (a table); default: text. Several recordings as srt, "
        "vtt or textgrid need --out",
    )
    add(
        "--words",
        action="store_true",
        help="every word with its times; text, json and ctm have its confidence too (ctm always "
        "lists words)",
    )
    add("--out", metavar="FOLDER", help="write a file for each recording there")
    add(
        "--decoder",
        metavar="NAME",
        help="greedy, beam, or lexicon (the words of --lm alone); default: that of the model, or "
        "beam where --beam, --nbest, --lm or --lm-weight is given",
    )
    low, high = _WIDTHS
    add(
        "--beam",
        type=int,
        metavar="WIDTH",
        help=f"hypotheses that beam search keeps, {low} to {high}; default: that of the model, or "
        f"{_DEFAULT_WIDTH}",
    )
    add(
        "--nbest",
        type=int,
        metavar="N",
        help="alternatives of each segment, for --format=json, at most WIDTH; default: that of "
        "the model, or 1",
    )
    add(
        "--lm",
        metavar="FILE",
        help="a language model, .arpa or .arpa.gz, of the model's labels, or of words (built with "
        "--unit words) for --decoder=lexicon; see python -m speech_jax.decoding.lm",
    )
    add(
        "--lm-weight",
        type=float,
        metavar="WEIGHT",
        help="of the language model's scores; default: that of the model, or "
        f"{_DEFAULT_LM_WEIGHT:g}",
    )
    low, high = _CHUNK_SECONDS
    add(
        "--chunk",
        type=float,
        metavar="SECONDS",
        help=f"the most audio that the model is given at once, {low} to {high}; less takes less "
        "memory; default: the longest utterance of its training, within 10 and 30",
    )
    return parser  # fmt: skip


def _wrong(chosen: argparse.Namespace) -> str:
    """Why a command line is refused, whatever the model is; empty where it is not."""
    of_search = {"--lm": chosen.lm, "--lm-weight": chosen.lm_weight, "--beam": chosen.beam}
    for flag, value in (of_search | {"--nbest": chosen.nbest}).items():
        if chosen.decoder == "greedy" and value is not None:
            return f"{flag} does nothing with --decoder=greedy: leave one of them out"
    ranges = {
        "beam": (chosen.beam, _WIDTHS),
        "nbest": (chosen.nbest, _WIDTHS),
        "chunk": (chosen.chunk, _CHUNK_SECONDS),
        "lm-weight": (chosen.lm_weight, (-100, 100)),
    }
    for flag, (value, (low, high)) in ranges.items():
        if value is not None and not low <= value <= high:
            return f"--{flag}={value:g} must be {low} to {high}"
    for flag, value, known in (
        ("format", chosen.format, _FORMATS),
        ("decoder", chosen.decoder or "greedy", _DECODERS),
    ):
        if value not in known:
            return f"--{flag}={value} must be one of {', '.join(known)}"
    lm = chosen.lm
    if lm is not None and "://" not in lm and not os.path.isfile(os.path.expanduser(lm)):
        return f"--lm={lm}: there is no such file"
    if chosen.nbest is not None and chosen.format != "json":
        return f"--nbest does nothing with --format={chosen.format}: only json has alternatives"
    if chosen.out == "-":
        return "--out=- is not a folder: without --out, all goes to standard output"
    return ""


def _wrong_for(chosen: argparse.Namespace, own: Mapping[str, Any]) -> str:
    """Why a command line is refused for a model whose decoder has these settings, or empty."""
    if chosen.lm_weight is not None and not (chosen.lm or own.get("lm")):
        return "--lm-weight does nothing without a language model: name one with --lm"
    if chosen.decoder == "lexicon" and not (chosen.lm or own.get("lm") or own.get("lexicon")):
        return "--decoder=lexicon needs words: name an ARPA file of words with --lm"
    width = chosen.beam or own.get("width") or _DEFAULT_WIDTH
    if (chosen.nbest or 1) > width:
        return f"--nbest={chosen.nbest} is more than the {width} hypotheses of --beam: raise --beam"
    return ""


def _decoder(chosen: argparse.Namespace) -> dict[str, object]:
    """The settings of the decoder that flags ask for."""
    given = {
        "width": chosen.beam,
        "nbest": chosen.nbest,
        "lm": chosen.lm,
        "lm_weight": chosen.lm_weight,
    }
    given = {key: value for key, value in given.items() if value is not None}
    name = chosen.decoder or ("beam" if given else None)
    return {"name": name, **given} if name else {}


# ---- What there is to transcribe ---------------------------------------------------------------


def _inputs(paths: list[str], failures: list[str]) -> Iterator[Input]:
    """The recordings that paths name, each once; a path that names none is a failure."""
    seen, taken = set(), set()
    for path in paths:
        found = _found(path)
        if isinstance(found, str):
            _fail(failures, found)
            continue
        for file, place in found:
            if (real := os.path.realpath(file)) in seen:
                continue
            seen.add(real)
            yield Input(file, _free(place, taken))


def _found(path: str) -> list[tuple[str, pathlib.PurePath]] | str:
    """(file, place among the outputs) of what a path names, or why it names nothing."""
    if path == "-":
        return [("-", pathlib.PurePath("standard_input"))]
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        found = [(str(file), file.relative_to(expanded)) for file in _audio_below(expanded)]
        return found or f"{path}: the folder holds no audio files: name another one, or a file"
    matches = [expanded]
    if not os.path.exists(expanded):
        if not glob.has_magic(path):
            return f"{path}: no such file or folder: correct the path"
        matches = [
            name for name in sorted(glob.glob(expanded, recursive=True)) if os.path.isfile(name)
        ]
    found = [(name, pathlib.PurePath(os.path.basename(name))) for name in matches]
    return found or f"{path}: no file matches the pattern: correct it"


def _audio_below(folder: str) -> Iterator[pathlib.Path]:
    from speech_jax.data.decoders import EXTENSIONS

    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower().removeprefix(".")
            if suffix in EXTENSIONS and not name.startswith("."):
                yield pathlib.Path(parent, name)


def _free(place: pathlib.PurePath, taken: set[pathlib.PurePath]) -> pathlib.PurePath:
    """A place that no other recording has: a.wav and a.flac are in one folder, or two folders."""
    free, number = place.with_suffix("") if place.suffix else place, 1
    while free in taken:
        free = place if number == 1 else place.with_name(f"{place.name}-{number}")
        number += 1
    taken.add(free)
    return free


# ---- The work ----------------------------------------------------------------------------------


def _transcribe(
    chosen: argparse.Namespace,
    inputs: list[Input],
    failures: list[str],
    refuse: Callable[[str], None],
) -> None:
    # Only now, so that --help and a wrong flag answer at once.
    from speech_jax import compiled
    from speech_jax.data import sources
    from speech_jax.deploy import formats
    from speech_jax.deploy.transcribe import Model, open_acoustic

    compiled.keep(sources.default_cache())
    format = formats.FORMATS[chosen.format]
    if len(inputs) > 1 and not chosen.out and not format.joins:
        refuse(f"--format={chosen.format} of {len(inputs)} recordings needs --out=FOLDER")
    acoustic = open_acoustic(chosen.model)
    if wrong := _wrong_for(chosen, acoustic.decoder):
        refuse(wrong)
    model = Model(acoustic, chunk_seconds=chosen.chunk, decoder=_decoder(chosen))
    folder = None
    if chosen.out:
        folder = files.expand(chosen.out)
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    if not folder:
        _print(format.header)
    with _progress(len(inputs)) as (progress, write):
        found = model.transcribe_all((_opened(one.file) for one in inputs), progress)
        for one, transcription in zip(inputs, found, strict=True):
            name = "standard input" if one.file == "-" else one.file
            if isinstance(transcription, UserError):
                _fail(failures, str(transcription))
                continue
            if transcription.trouble:  # nothing was heard: an empty text would look like a result
                _fail(failures, f"{name}: {transcription.trouble}")
                continue
            called = one.place.as_posix() if format.by_place else name
            rendered = format.render(called, transcription, chosen.words)
            if folder:
                path = folder / one.place.with_name(f"{one.place.name}.{format.suffix}")
                try:
                    with files.writing(path):
                        files.write_atomically(path, format.header + rendered)
                except UserError as error:
                    _fail(failures, str(error))
            elif chosen.format == "text" and len(inputs) > 1:
                write("".join(f"{name}: {line}\n" for line in rendered.splitlines()))
            else:
                write(rendered)


def _opened(file: str) -> str | io.BytesIO:
    """A file as audio is read from: standard input is read whole, for it cannot seek."""
    if file != "-":
        return file
    stream = io.BytesIO(sys.stdin.buffer.read())
    stream.name = "standard input"
    return stream


@contextlib.contextmanager
def _progress(
    total: int,
) -> Iterator[tuple[Callable[[float, float], None], Callable[[str], None]]]:
    """A bar on standard error, if that is a terminal.

    Gives what tells it how far things are, and what writes to standard output beside it.
    """
    if not sys.stderr.isatty():
        yield lambda files, seconds: None, _print
        return
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn("Transcribing"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(
            "{task.fields[done]} of {task.total} files, {task.fields[minutes]}"
        ),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(*columns, console=console, transient=True, redirect_stdout=False)
    write = _print
    if sys.stdout.isatty():  # above the bar, and long lines as they are
        write = lambda text: console.out(text, end="", highlight=False)
    with bar:
        task = bar.add_task("", total=total, done=0, minutes="")
        tell = lambda files, seconds: bar.update(
            task, completed=files, done=int(files), minutes=f"{seconds / 60:.1f} minutes of audio"
        )
        yield tell, write


def _print(text: str) -> None:
    """Writes to standard output at once; a UserError where that cannot be written."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_output()
        raise UserError(
            f"cannot write standard output ({error.strerror or error}): make room, then run the "
            "same command again"
        ) from error


def _forget_output() -> None:
    """Has what is still to be written go nowhere: the interpreter writes it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(failures: list[str], message: str) -> None:
    failures.append(message)
    print(f"error: {message}", file=sys.stderr, flush=True)


def _leave(*_: object) -> None:
    """Ends the process at once; what was written is whole."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}interrupted\n".encode())
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    sys.exit(main())
