"""LibriSpeech's archives: where they are, and how to download and unpack them safely."""

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import os
import pathlib
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import rich.console
import rich.progress

from speech_jax.errors import UserError

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_STALLED = 5  # connections in a row that bring a download no further
_REFUSED = "nothing of it was unpacked; get the archive from its publisher"


class Archive(NamedTuple):
    """Where an archive is and the MD5 sum it must have."""

    url: str
    md5: str


def _openslr(resource: int, **md5: str) -> dict[str, Archive]:
    base = f"https://www.openslr.org/resources/{resource}"
    names = {key.replace("_", "-"): value for key, value in md5.items()}
    return {name: Archive(f"{base}/{name}.tar.gz", value) for name, value in names.items()}


# The sums are those of OpenSLR's own md5sum.txt in resources 12 (LibriSpeech) and 31 (mini).
ARCHIVES: dict[str, Archive] = _openslr(
    12,
    dev_clean="42e2234ba48799c1f50f24a7926300a1",
    dev_other="c8d0bcc9cca99d4f8b62fcc847357931",
    test_clean="32fa31d27d2e1cad72775fee3f4849a9",
    test_other="fb5a50374b501bb3bac4815ee91d3135",
    train_clean_100="2a93770f6d5c6c964bc36631d331a522",
    train_clean_360="c0e676e450a7ff2f54aeade5171606fa",
    train_other_500="d1a0fd59409feb2c614ce4d30c387708",
) | _openslr(
    31,
    dev_clean_2="6d7ab67ac6a1d2c993d050e16d61080d",
    train_clean_5="5df7d4e78065366204ca6845bb08f490",
)


class ArchiveError(UserError):
    """An archive that cannot be fetched or must not be unpacked; the message says the cure."""


def download(url: str, target: str | os.PathLike, md5: str) -> None:
    """Downloads `url` to the file `target`, which appears only when it is whole and its sum right.

    What arrives goes to `target`.part; a cut connection, and a later call, go on from there.
    Of several processes that want the same file one downloads and the others wait for it.

    Raises:
      ArchiveError: without a network, on a wrong sum (the part is then removed), a full disk, or
        a server's refusal.
    """
    target = pathlib.Path(target)
    part = target.with_name(target.name + ".part")
    with _locked(part) as out, _progress() as progress:
        if target.exists():  # another process was faster
            part.unlink(missing_ok=True)
            return
        most = stalled = 0
        while broken := _receive(url, out, progress):
            size = out.seek(0, os.SEEK_END)
            stalled = 0 if size > most else stalled + 1
            most = max(most, size)
            if stalled == _STALLED:
                raise ArchiveError(
                    f"the connection to {_host(url)} keeps breaking ({broken}); run the command "
                    "again later to go on from there"
                )
        out.seek(0)
        found = hashlib.file_digest(out, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise ArchiveError(
                f"{url} has the checksum {found} in place of {md5}; the download is removed, so "
                "start it again, and if that does not help the server's copy is damaged"
            )
        os.replace(part, target)


def extract(file: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Unpacks the split named as `folder` out of a .tar.gz; `folder` appears only when whole.

    The archive may hold NAME/SPEAKER/..., LibriSpeech/NAME/SPEAKER/... (the official ones) or
    SPEAKER/... itself. Of several processes that want the same folder one unpacks it and the others
    wait for it.

    Raises:
      ArchiveError: for a damaged archive or one that goes on behind its end, one without the split,
        more than there is room for, and for members that are absolute, climb with '..', or are
        anything but files and folders. Nothing is left then.
    """
    file, folder = pathlib.Path(file), pathlib.Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():  # another process was faster
                return
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as top:
                _unpack(file, top)
                top = pathlib.Path(top)
                places = (top / folder.name, *top.glob(f"*/{folder.name}"), top)
                split = next(
                    (place for place in places if any(place.glob("*/*/*.trans.txt"))), None
                )
                if split is None:
                    raise ArchiveError(
                        f"{file} holds no transcripts {folder.name}/SPEAKER/CHAPTER/*.trans.txt; "
                        "check that it is the archive of that split"
                    )
                os.chmod(split, 0o755)
                split.rename(folder)
    except ArchiveError:
        raise
    except tarfile.FilterError as error:
        raise ArchiveError(f"{file}: {error}; {_REFUSED}") from error
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise ArchiveError(_damaged(file, error)) from error
        raise ArchiveError(
            f"cannot unpack {file} beside {folder} ({error.strerror or error}); make room or check "
            "the rights, and run again"
        ) from error
    except Exception as error:  # tarfile and zlib throw many, of numbers and names as well
        raise ArchiveError(_damaged(file, error)) from error


class _Member(tarfile.TarInfo):
    """Ends an archive at its zero blocks alone; tarfile ends it at any block that is no header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no header at byte {archive.offset:,}: {error}") from error


def _unpack(file: pathlib.Path, folder: str) -> None:
    """Unpacks every member below `folder`, refusing the archive at the first that is unsafe."""
    free = shutil.disk_usage(folder).free
    with (
        _progress() as progress,
        progress.open(file, "rb", description=f"Unpacking {file.name}") as stream,
        gzip.open(stream) as unzipped,
        tarfile.open(fileobj=unzipped, mode="r:", tarinfo=_Member) as archive,
    ):
        for member in archive:
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise ArchiveError(
                    f"{file}: member {member.name!r} is a link, device or sparse; {_REFUSED}"
                )
            if member.name.startswith("/"):
                raise ArchiveError(
                    f"{file}: member {member.name!r} points outside the folder; {_REFUSED}"
                )
            free -= member.size
            if free < 0:
                raise ArchiveError(_no_space(folder, f"{file} needs more"))
            archive.extract(member, folder, set_attrs=False, filter="data")
        while rest := unzipped.read(_BLOCK):  # gzip compares its checksum at the very end
            if any(rest):
                raise tarfile.ReadError("another archive, or something else, follows its end")


def _damaged(file: pathlib.Path, error: Exception) -> str:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{file} is damaged or no .tar.gz ({why}); delete it and get it again"


def _receive(url: str, out: BinaryIO, progress: rich.progress.Progress) -> str:
    """Appends to `out` what is missing of `url`: '' when it is whole, else why it broke off."""
    start = out.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"User-Agent": "speech_jax"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return ""  # nothing is missing; the checksum judges
        raise ArchiveError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:  # no network, refused, timed out
        reason = getattr(error, "reason", error)
        raise ArchiveError(f"no connection to {_host(url)} ({reason})") from error
    with response:
        if start and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            out.truncate(start := 0)  # this server cannot resume
        missing = int(response.headers.get("Content-Length", 0))
        free = shutil.disk_usage(os.path.dirname(out.name)).free
        if missing > free:
            raise ArchiveError(_no_space(out.name, f"{missing - free:,} bytes more are needed"))
        name = f"Downloading {url.rpartition('/')[2]}"
        task = progress.add_task(name, total=start + missing, completed=start)
        try:
            while block := response.read(_BLOCK):
                missing -= len(block)
                progress.advance(task, len(block))
                unwritten = memoryview(block)
                try:
                    while unwritten:  # an unbuffered file may take a part, as a full disk does
                        unwritten = unwritten[out.write(unwritten) :]
                except OSError as error:
                    raise ArchiveError(_no_space(out.name, error.strerror)) from error
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        finally:
            progress.remove_task(task)
    return "it closed early" if missing > 0 else ""


@contextlib.contextmanager
def _locked(part: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens `part` for appending and reading, alone among processes; removes it if it is empty."""
    while True:
        try:
            file = open(part, "ab+", buffering=0)  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ArchiveError(f"cannot write {part} ({error.strerror})") from error
        with file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have renamed or removed the file that was waited for.
            if not _is_at(file, part):
                continue
            try:
                yield file
            finally:
                if _is_at(file, part) and os.fstat(file.fileno()).st_size == 0:
                    part.unlink(missing_ok=True)
            return


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _progress() -> rich.progress.Progress:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    return rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


def _no_space(file: str, reason: str) -> str:
    return f"cannot write {file} ({reason}); make room or choose another root, and run again"
