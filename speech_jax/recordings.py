"""What the commands that hear recordings share: their paths, the bar, and standard output."""

import contextlib
import glob
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from speech_jax.errors import UserError


class Input(NamedTuple):
    """A recording, and where in an output folder its result goes, without a suffix.

    No two recordings have the same place.
    """

    file: str
    place: pathlib.PurePath

    @property
    def name(self) -> str:
        """What it is called where people read of it."""
        return "standard input" if self.file == "-" else self.file


def each(
    paths: list[str],
    work: Callable[[list[Input], list[str]], None],
    said: Callable[[str], str] = lambda message: message,
) -> int:
    """Has `work` done on the recordings that paths name; returns the exit status.

    Args:
      work: is given the recordings, and a list of failures, which it adds to by `fail`.
      said: the message of an error as users of the command know its words.
    """
    failures: list[str] = []
    found = list(inputs(paths, failures))
    if found:
        try:
            work(found, failures)
        except UserError as error:  # of the model, or of the place that all is written to
            fail(failures, said(str(error)))
        except BrokenPipeError:  # nobody reads on
            forget_output()
            return 1
    return int(bool(failures))


def inputs(paths: list[str], failures: list[str]) -> Iterator[Input]:
    """The recordings that paths name, each once; a path that names none is a failure."""
    seen, taken = set(), set()
    for path in paths:
        found = _found(path)
        if isinstance(found, str):
            fail(failures, found)
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


def opened(file: str) -> str | io.BytesIO:
    """A file as audio is read from: standard input is read whole, for it cannot seek."""
    if file != "-":
        return file
    stream = io.BytesIO(sys.stdin.buffer.read())
    stream.name = "standard input"
    return stream


@contextlib.contextmanager
def progress(
    total: int, doing: str
) -> Iterator[tuple[Callable[[float, float], None], Callable[[str], None]]]:
    """A bar on standard error, if that is a terminal.

    Gives what tells it how far things are, and what writes to standard output beside it.
    """
    if not sys.stderr.isatty():
        yield lambda files, seconds: None, say
        return
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn(doing),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(
            "{task.fields[done]} of {task.total} files, {task.fields[minutes]}"
        ),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(*columns, console=console, transient=True, redirect_stdout=False)
    write = say
    if sys.stdout.isatty():  # above the bar, and long lines as they are
        write = lambda text: console.out(text, end="", highlight=False)
    with bar:
        task = bar.add_task("", total=total, done=0, minutes="")
        tell = lambda files, seconds: bar.update(
            task, completed=files, done=int(files), minutes=f"{seconds / 60:.1f} minutes of audio"
        )
        yield tell, write


def say(text: str) -> None:
    """Writes to standard output at once; a UserError where that cannot be written."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_output()
        raise UserError(
            f"cannot write standard output ({error.strerror or error}): make room, then run the "
            "same command again"
        ) from error


def forget_output() -> None:
    """Has what is still to be written go nowhere: the interpreter writes it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(failures: list[str], message: str) -> None:
    """Says that something failed, and keeps it among the failures."""
    failures.append(message)
    print(f"error: {message}", file=sys.stderr, flush=True)


def leave(*_: object) -> None:
    """Ends the process at once; what was written is whole."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}interrupted\n".encode())
    os._exit(130)
