"""A run's folder: the names of its files, one run at a time in it, and what may change in between.

All processes of a run call the methods together; the first one writes.
"""

import contextlib
import datetime
import glob
import hashlib
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
from absl import logging
from ml_collections import ConfigDict

from speech_jax import config as settings
from speech_jax import files, tasks
from speech_jax.data.batch import Bucket
from speech_jax.decoding.decoder import Settings
from speech_jax.errors import UserError
from speech_jax.training import sharding

# What may change between the runs that share a workdir: where things are and how fast they go,
# never what is computed. Another mesh must fit the recorded plan.
FREE = (
    "data.root", "data.cache", "data.threads", "data.eval_splits", "data.test_splits",
    "data.eval_buckets", "data.eval_max_seconds", "robustness", "decoder", "train.log_every",
    "train.compare", "checkpoint", "mesh",
)  # fmt: skip

# Values that switch something off: a setting that has one, and that is gone since, is not missed.
_OFF = (None, False, 0, "", "none", [], {})


class WorkdirError(UserError):
    """A workdir that this run cannot use; the message says which one would do."""


class RecordedPlan(NamedTuple):
    """The batch shapes of a run's first start, and the training data that they were made for."""

    buckets: tuple[Bucket, ...]
    fingerprint: str
    utterances: int


class Workdir:
    """The folder of a run, which need not be there yet; its files are properties."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = files.expand(folder)
        if files.is_remote(self.folder) and glob.has_magic(str(folder)):
            raise WorkdirError(f"{folder}: the storage's client takes [, ] * and ? for patterns")
        self.config = self.folder / "config.json"
        self.plan = self.folder / "plan.json"
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder / "metrics.jsonl"
        self.tensorboard = self.folder / "tensorboard"
        self.results = self.folder / "results.json"
        self.report = self.folder / "report.html"
        self.robustness = self.folder / "robustness.json"
        self.decoder = self.folder / "decoder.json"  # its settings, as --mode=tune found them
        self.left_out = self.folder / "left_out.json"  # why utterances are not used, by split
        self.layer_weights = self.folder / "layer_weights.png"
        self.lock = self.folder / "lock"

    def before(self, what: str) -> "Workdir":
        """Where the start of the run is measured: 'untouched', or with the 'head' fitted alone."""
        return Workdir(self.folder / "before" / what)

    def predictions(self, split: str) -> pathlib.Path:
        """The predictions for a split, which may be named by a path."""
        return self.folder / "predictions" / f"{_file_name(split)}.jsonl"

    def generated(self, step: int) -> pathlib.Path:
        """What the model sounded like after an update (evaluators/generated.py)."""
        return self.folder / "generated" / f"{step}.wav"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The only run in the workdir; the lock ends with the process, however that ends.

        Raises:
          WorkdirError: another run has it, or nothing can be written there.
        """
        with contextlib.ExitStack() as held:
            sharding.from_first(lambda: held.enter_context(self._lock()))
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()} since {now}"
        if files.is_remote(self.folder):
            with self._writes(self.lock), _Heartbeat(self.lock, owner):
                yield
            return
        with self._writes(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("a+", encoding="utf-8")
        with file:
            if not files.lock(file):
                file.seek(0)
                raise _in_use(self.folder, file.read(200))
            with contextlib.suppress(OSError):  # a full disk is reported where it matters
                file.truncate(0)
                file.write(f"{owner}\n")
                file.flush()
            yield

    def prepare(self, splits: Iterable[str]) -> None:
        """Makes the folders and tries every file that will be written, `splits`' predictions too.

        Where no run was recorded, the plan of a start that failed is removed: it may be of other
        settings.

        Raises:
          WorkdirError: one of them cannot be written.
        """
        sharding.from_first(lambda: self._prepare(splits))

    def _prepare(self, splits: Iterable[str]) -> None:
        written = (self.config, self.plan, self.metrics, self.results, self.robustness)
        for path in (*written, *map(self.predictions, splits)):
            with self._writes(path):
                _try(path)
        for folder in (self.checkpoints, self.tensorboard):
            with self._writes(folder):
                folder.mkdir(exist_ok=True)
        if not self.config.exists():
            self.plan.unlink(missing_ok=True)

    def record(self, config: ConfigDict) -> None:
        """Makes the workdir one of this configuration: from now on there is something to resume."""
        sharding.from_first(lambda: self._write(self.config, files.plain(config)))

    def recorded(self) -> ConfigDict:
        """What the workdir was trained with; settings that are newer than it have their defaults.

        Raises:
          WorkdirError: it was not trained in.
          UserError: its record is damaged.
        """
        try:
            config = settings.completed(self._record(), str(self.config))
        except FileNotFoundError:
            raise WorkdirError(
                f"{self.folder} holds no config.json: name a workdir, or train there first"
            ) from None
        if config.task.name not in tasks.TASKS:
            raise WorkdirError(
                f"{self.config} is of a task that is unknown here, {config.task.name!r}: bring it "
                "back, or install a newer speech_jax"
            )
        try:
            Settings.of(config.decoder)
        except UserError as error:
            raise WorkdirError(f"{self.config}: {error}") from error
        return config

    def check(self, config: ConfigDict) -> None:
        """Checks that what is recorded, if anything is, can go on with `config`.

        A setting that the record lacks counts as its default. One that is unknown by now is left
        out if it was off, and is a difference if it was not.

        Raises:
          WorkdirError: it cannot, naming the first setting that differs.
          UserError: the record is damaged.
        """
        try:
            recorded = self._record()
            known = settings.completed(recorded, str(self.config))
        except FileNotFoundError:
            if self._saved():
                raise WorkdirError(
                    f"{self.folder} holds checkpoints and no config.json: bring it back (the file "
                    'record/metadata of each checkpoint has it as "config"), or use another '
                    "--workdir"
                ) from None
            return
        except UserError as error:
            if self._saved():
                raise WorkdirError(f"{error}, or use another --workdir") from error
            _set_aside(self.config, error)
            return
        asked = settings.completed(files.plain(config), "--config")
        _compare(self.folder, recorded, files.plain(known), files.plain(asked))

    def record_plan(self, buckets: Iterable[Bucket], fingerprint: str, utterances: int) -> None:
        """Writes the plan of a run's first start; later ones leave it as it is."""
        plan = {
            "batches": [{"rows": one.rows, "sizes": dict(one.sizes)} for one in buckets],
            "fingerprint": fingerprint,
            "utterances": utterances,
        }
        sharding.from_first(lambda: self.plan.exists() or self._write(self.plan, plan))

    def recorded_plan(self) -> RecordedPlan | None:
        """The plan of a run's first start; None where there is none.

        Raises:
          WorkdirError: it is damaged, and there are checkpoints that were made by it.
        """
        try:
            plan = files.read_json(self.plan)
        except FileNotFoundError:
            return None
        except UserError as error:
            return self._without_plan(error)
        try:
            buckets = tuple(
                Bucket(int(one["rows"]), tuple((k, int(n)) for k, n in one["sizes"].items()))
                for one in plan["batches"]
            )
            if not buckets or min(one.rows for one in buckets) < 1:
                raise ValueError("no rows")
            return RecordedPlan(buckets, str(plan["fingerprint"]), int(plan["utterances"]))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            return self._without_plan(f"{self.plan} holds no plan ({error!r})")

    def _without_plan(self, why: object) -> None:
        """Sets a damaged plan aside, unless a run would go on without it in another order."""
        if self._saved():
            raise WorkdirError(f"{why}: the order of the data is lost; bring it back from a copy")
        _set_aside(self.plan, why)

    def write_results(self, splits: Mapping[str, Mapping[str, Any]], **others: Any) -> dict:
        """Merges into results.json: splits are added, other entries replaced; returns all of it.

        Raises:
          WorkdirError: it cannot be written.
        """
        results = _read_or_set_aside(self.results) or {}
        if not isinstance(results.setdefault("splits", {}), dict):
            _set_aside(self.results, f"{self.results} holds no results")
            results = {"splits": {}}
        results["splits"].update(splits)
        results.update(others)
        if jax.process_index() == 0:
            self._write(self.results, results)
        return results

    def _write(self, path: pathlib.Path, value: Mapping[str, Any]) -> None:
        with self._writes(path):
            files.write_atomically(path, files.dump_json(value))

    def write_left_out(self, reasons: Mapping[str, Mapping[str, str]]) -> None:
        """Lists the utterances that are not used, by split and id with the reason, if any are.

        Raises:
          WorkdirError: it cannot be written.
        """
        listed = {split: dict(of) for split, of in reasons.items() if of}
        if jax.process_index() == 0 and (listed or self.left_out.exists()):
            self._write(self.left_out, listed)

    def _record(self) -> dict[str, Any]:
        """The record as it is, under the names of today; FileNotFoundError where there is none."""
        return settings.renamed(files.read_json(self.config))

    def _saved(self) -> bool:
        """Whether there is a checkpoint."""
        with contextlib.suppress(OSError):
            return any(path.name.isdigit() for path in self.checkpoints.iterdir())
        return False

    @contextlib.contextmanager
    def _writes(self, path: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a name that the file system cannot have, too
            if isinstance(error, UserError):
                raise
            why = getattr(error, "strerror", None) or error
            raise WorkdirError(
                f"cannot write {path} ({why}): make room or give the rights to write, or use "
                "another --workdir"
            ) from error


def _in_use(folder: pathlib.Path, owner: str) -> WorkdirError:
    owner = owner.partition("\n")[0] or "another run"
    return WorkdirError(
        f"{folder} is in use by {owner}: wait for it, stop it, or use another --workdir"
    )


class _Heartbeat:
    """A lock in a bucket: an object that its owner writes anew all the time, and removes.

    One that stands still for a while was left by a run that died. Two runs that start within a
    second of each other are not kept apart.
    """

    SECONDS = 10.0  # between two beats; one that is three beats late is dead

    def __init__(self, path: pathlib.Path, owner: str):
        self._path, self._owner, self._beats = path, owner, 0
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._go, daemon=True)

    def __enter__(self) -> Self:
        before = self._read()
        if before:
            owner = before.partition("\n")[0]
            logging.warning("%s: looking whether %s is still there", self._path, owner)
            for _ in range(round(3 * self.SECONDS)):
                time.sleep(1)
                if self._read() not in (before, ""):
                    raise _in_use(self._path.parent, before)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the next run finds it still
            self._path.unlink()

    def _read(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._path.read_bytes().decode("utf-8", "replace")
        return ""

    def _beat(self) -> None:
        self._beats += 1
        self._path.write_bytes(f"{self._owner}\n{self._beats}\n".encode())

    def _go(self) -> None:
        while not self._leaving.wait(self.SECONDS):
            with contextlib.suppress(Exception):  # a bucket that is away for a moment
                self._beat()


def _file_name(split: str) -> str:
    """A split's name as that of a file, one to one: no path, nothing hidden, not too long."""
    name = re.sub(
        "^[.~]|[/\\\\%\x00-\x1f\x7f\ud800-\udfff]",
        lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass")),
        split,
    )
    if len(name.encode()) > 200:  # of the 255 bytes that file systems allow
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name.encode()[-150:].decode(errors='ignore')}-{digest}"
    return name


def _try(path: pathlib.Path) -> None:
    """Raises OSError or ValueError where a file of this name cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder", str(path))
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(b"tried")
    finally:
        scratch.unlink(missing_ok=True)


def _compare(
    folder: pathlib.Path,
    recorded: Mapping[str, Any],
    known: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> None:
    """Raises WorkdirError for the first setting by which two configurations differ.

    `known` is what was `recorded`, as far as it is known here, with defaults for the rest.
    """
    defaults = _flat(files.plain(settings.default()))
    known, asked = defaults | _flat(known), defaults | _flat(asked)
    for key, value in _flat(recorded).items():
        if key not in known and value not in _OFF and not _free(key):
            raise WorkdirError(
                f"{folder} was trained with config.{key}={value!r}, which is unknown here: go on "
                "with the version of speech_jax that it was trained with, or use another --workdir"
            )
    # Another name explains the other differences of its section.
    for key in sorted(known.keys() | asked.keys(), key=lambda k: (not k.endswith(".name"), k)):
        was, now = known.get(key), asked.get(key)
        moved = key == "data.noise_root" and was and now  # where it is, not whether there is noise
        if was != now and not moved and not _free(key):
            raise WorkdirError(
                f"{folder} was trained with config.{key}={was!r}, not {now!r}: use the same value, "
                f"or another --workdir (where config.init.folder={folder} starts from its encoder)"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _free(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in FREE)


def _read_or_set_aside(path: pathlib.Path) -> dict[str, Any] | None:
    """The JSON in `path`; None where there is none, or a damaged one, which is kept aside."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except UserError as error:
        _set_aside(path, error)
        return None


def _set_aside(path: pathlib.Path, why: object) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # where nothing can be written, it is passed over
            path.replace(aside)
    logging.warning("%s; it is kept as %s and not used", why, aside)
