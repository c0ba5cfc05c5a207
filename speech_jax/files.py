"""Small text files: written whole or not at all; where they are damaged, one sentence says so."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from absl import logging

from speech_jax.errors import UserError


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes bytes, or text in UTF-8, to `path`, which is never seen half-written.

    It makes the folder of `path`.

    The file gets the rights that the process's umask gives. Raises OSError, and UnicodeError for
    text that UTF-8 cannot hold; whatever stood at `path` is then as it was.
    """
    if isinstance(content, str):
        content = content.encode()
    if is_remote(path):
        path.write_bytes(content)  # an object of a bucket appears whole or not at all
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


_ROOM, _RIGHTS = "make room, then run it again", "give the rights to write, or name another place"
_PLACE = "name another place"
_CURES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _PLACE,
    errno.ENOENT: _PLACE,  # no folder can be made there
    errno.ENOTDIR: _PLACE,
    errno.EEXIST: _PLACE,
    errno.EISDIR: _PLACE,
    errno.ENAMETOOLONG: _PLACE,
}


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Makes an OSError of what is written within a UserError about `path`."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno, "make room or give the rights to write, then run it again")
        raise UserError(f"cannot write {path} ({error.strerror or error}): {cure}") from error


def lock(file: IO[str]) -> bool:
    """Locks an open file until it is closed; False where another process has it.

    A file system without locks gives a warning, and nothing is locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.warning(
            "%s cannot be locked (%s): see that no other command writes there",
            file.name,
            error.strerror,
        )
    return True


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as plain JSON values: tuples are lists, references resolved."""
    return json.loads(config.to_json())


def dump_json(value: Any) -> str:
    """JSON as our files hold it: indented, Unicode as it is, a line end at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_sealed(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object with its SHA-256, so that damage shows; raises as `write_atomically`."""
    write_atomically(path, dump_json({**value, "sha256": _digest(value)}))


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """What `write_sealed` wrote; an object without its SHA-256, of before, is taken as it is.

    Raises as `read_json`, and UserError for what has changed since it was written.
    """
    value = read_json(path)
    digest = value.pop("sha256", None)
    if digest is not None and digest != _digest(value):
        raise UserError(
            f"{path} has changed since it was written (its SHA-256 is another): bring it back"
        )
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read, is not JSON, or is JSON of another type than an object.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is damaged or is not JSON ({error}): bring it back or remove it"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__} where an object belongs: bring it back or "
            "remove it"
        )
    return value


def parse_json(data: bytes) -> Any:
    """The value in the bytes of a JSON file; ValueError, of one line, for anything else."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also what is no UTF-8, or thousands deep
        raise ValueError(" ".join(str(error).split())[:200]) from error


def expand(path: str | os.PathLike) -> pathlib.Path:
    """A path that a user gives, absolute: ~ and ~name are home folders, gs:// is a bucket.

    What comes back for a bucket is an epath.Path, with the methods of a pathlib.Path.
    """
    if "://" in os.fspath(path):
        return _in_bucket(os.fspath(path))
    try:
        return pathlib.Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder") from error


def is_remote(path: pathlib.Path) -> bool:
    """Whether a path is of a bucket: no file system, so that nothing can be appended or locked."""
    return "://" in os.fspath(path)


def _in_bucket(path: str) -> Any:
    import fsspec
    from etils import epath

    kind = path.partition("://")[0]
    # Others write there too (tensorstore, the other hosts): what was listed once does not last.
    fsspec.config.conf.setdefault(kind, {})["use_listings_cache"] = False
    try:
        epath.Path(path).exists()
    except (ImportError, ValueError) as error:
        extra = ": pip install 'speech_jax[gcs]'" if kind == "gs" else ""
        raise UserError(f"{path} cannot be used here ({error}){extra}") from error
    except Exception as error:  # of the storage's client: no credentials, no bucket, no network
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be reached ({type(error).__name__}: {why})") from error
    return epath.Path(path)
