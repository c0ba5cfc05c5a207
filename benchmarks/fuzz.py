"""Mutates inputs of every kind, and looks what is made of them.

    python -m benchmarks.fuzz --inputs 10000 --seconds 3000 --seed 0

Each input is a good one with bytes flipped, cut or repeated, or with values of its JSON replaced.
What is made of it must be right, or a UserError of one line that names the thing. It is a fault if
it is another exception, takes longer than ten seconds or more than 2 GiB of memory, writes outside
its folder, starts a program, or loses audio, archive members, weights or labels in silence. For
what holds no checksum of its own, a flipped bit of a sample or a weight cannot be told from data.

The inputs are made in one process beside this one, which is ended and started anew where it hangs.
A fault is found again by its kind and number: `--only KIND --first NUMBER --inputs 1`.
"""

import argparse
import collections
import contextlib
import copy
import gzip
import io
import itertools
import json
import logging as std_logging
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import soundfile

from benchmarks.table import report
from speech_jax.errors import UserError
from speech_jax.setup import make_adversary

SECONDS, BYTES = 10.0, 2 << 30
DATA = pathlib.Path(__file__).parent.parent / "tests" / "data"
RATE = 16_000
ODD = (
    None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**63, 10**400, 1e-300, 1e308, math.nan,
    math.inf, -math.inf, -0.5, 0.5, "", "x", "../../x", "/etc/passwd", "\ud800", "a" * 70_000,
    "é\u0301", "1", [], {}, [[]], [1], ["x"], [None], {"x": 1}, [0] * 100, [1.5, "a"],
)  # fmt: skip
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")


class Wrong(Exception):
    """What was made of an input is not right; the message says how."""


# ---- Mutations -----------------------------------------------------------------------------------


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three random changes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        size = len(data)
        # Heads of files hold what the rest is read by.
        place = rng.randrange(min(size, 200) if rng.random() < 0.4 else size) if size else 0
        span = min(size, place + rng.choice([1, 2, 4, 16, 400, 5_000]))
        match rng.randrange(8):
            case 0 | 1 if size:
                data[place] ^= 1 << rng.randrange(8)
            case 2 if size:
                data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 3:
                del data[place:]
            case 4:
                del data[place:span]
            case 5:
                data[place:span] = bytes(span - place)
            case 6:
                data[place:place] = data[place:span]
            case _:
                data[place:place] = rng.randbytes(rng.choice([1, 4, 64]))
    return bytes(data)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """The value with one to three of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(value))
        if not places or rng.random() < 0.02:
            return rng.choice(ODD)
        parent, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[f"{key}x"] = parent.pop(key)
            case 2 if isinstance(parent[key], int | float):
                parent[key] = rng.choice([-1, 10, 0.5, 1000]) * parent[key]
            case 3:
                parent[key] = copy.deepcopy(rng.choice(rng.choice(places)[0:1]))  # of elsewhere
            case _:
                parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def mutate_file(path: pathlib.Path, rng: random.Random) -> None:
    """Changes a file, as JSON if it is some, or removes it."""
    if rng.random() < 0.03:
        path.unlink()
        return
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):  # what was mutated before
            content = json.dumps(mutated_json(json.loads(content), rng)).encode()
            if rng.random() < 0.02:
                content = b"[" * 100_000
            path.write_bytes(content)
            return
    path.write_bytes(mutated(content, rng))


# ---- Kinds: `make` prepares good inputs in a folder; `attempt` judges a mutated one in another ---


class Kind(NamedTuple):
    """How good inputs are made, and one of them is mutated and judged.

    A refusal must hold one of the texts in `named`: the file or folder that it is about.
    """

    make: Callable[[pathlib.Path], Any]
    attempt: Callable[[Any, pathlib.Path, random.Random], None]
    named: tuple[str, ...]


def _clip(seconds: float, seed: int = 0) -> np.ndarray:
    moments = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(moments))
    return 0.3 * np.sin(2 * np.pi * (300 + 400 * moments) * moments) + 0.01 * noise


def _make_audio(folder: pathlib.Path) -> list[tuple[str, bytes, int]]:
    del folder
    kinds = [
        ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"),
        ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "ALAC_16"),
        ("W64", "PCM_16"), ("RF64", "PCM_16"), ("NIST", "PCM_16"),
    ]  # fmt: skip
    from speech_jax.data import audio

    found = []
    for container, codec in kinds:
        file = io.BytesIO()
        rate = 8000 if codec == "GSM610" else RATE
        soundfile.write(file, _clip(3 * rate / RATE), rate, format=container, subtype=codec)
        samples = audio.decode(io.BytesIO(file.getvalue()), RATE)
        found.append((container, file.getvalue(), len(samples)))
    return found


def _try_audio(good: list, folder: pathlib.Path, rng: random.Random) -> None:
    from speech_jax.data import audio
    from speech_jax.data.decoders import SLACK

    container, content, length = rng.choice(good)
    path = folder / f"{container.lower()}{rng.randrange(10**9)}.audio"
    content = mutated(content, rng)
    path.write_bytes(content)
    with _heard() as warnings:
        samples = audio.decode(str(path), RATE)
        stated = audio.duration(str(path))
    # No checksum covers the rate that a header states: another one is another file.
    rate = soundfile.info(io.BytesIO(content)).samplerate if container == "FLAC" else RATE
    lost = (length - len(samples) * rate / RATE) / RATE
    # Those have checksums; in the others a header with another length is another file.
    if container in ("FLAC", "OGG") and lost > SLACK and not warnings:
        raise Wrong(f"{container}: {lost:.2f} s lost in silence")
    if abs(stated - len(samples) / RATE) > SLACK and not warnings:
        raise Wrong(f"{container}: {stated:.2f} s stated, {len(samples) / RATE:.2f} s decoded")


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings of the project while it is entered."""
    found: list[str] = []
    handler = std_logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = std_logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _make_manifest(folder: pathlib.Path) -> list[dict]:
    rows = []
    for number in range(5):
        path = folder / f"{number}.flac"
        soundfile.write(path, _clip(0.3, number), RATE)
        row = {"audio_filepath": str(path), "duration": 0.3, "text": f"word {number}"}
        rows.append(row | ({"offset": 0.1, "duration": 0.1} if number == 4 else {}))
    return rows


def _try_manifest(rows: list[dict], folder: pathlib.Path, rng: random.Random) -> None:
    from speech_jax.data import audio, sources

    lines = [json.dumps(row).encode() for row in rows]
    if rng.random() < 0.6:
        place = rng.randrange(5)
        value = mutated_json(rows[place], rng)
        lines[place] = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
    content = b"\n".join(lines) + b"\n"
    if rng.random() < 0.5:
        content = mutated(content, rng)
    (folder / "split.jsonl").write_bytes(content)
    how = rng.choice(["skip", "raise"])
    source = sources.open_source(
        "manifest", root=folder, split="split", on_error=how, cache=folder / "cache"
    )
    lines_there = sum(bool(line.strip()) for line in content.splitlines())
    if len(source.utterances) + len(source.skipped) < min(lines_there, 5) - 1 and how == "skip":
        raise Wrong(f"{len(source.utterances)} used and {len(source.skipped)} named of 5")
    for index, utterance in enumerate(source.utterances):
        samples = audio.decode(source.open(index), RATE)
        if abs(len(samples) / RATE - utterance.duration) > 0.05:
            raise Wrong(f"{utterance.duration} s stated, {len(samples) / RATE} s decoded")
        utterance.text.encode()


def _make_archive(folder: pathlib.Path) -> tuple[bytes, dict[str, bytes]]:
    del folder
    inside: dict[str, bytes] = {}
    for chapter in range(3):
        words = ""
        for number in range(4):
            file = io.BytesIO()
            soundfile.write(file, _clip(0.05, number), RATE, format="FLAC")
            inside[f"1/{chapter}/1-{chapter}-{number}.flac"] = file.getvalue()
            words += f"1-{chapter}-{number} WORD\n"
        inside[f"1/{chapter}/1-{chapter}.trans.txt"] = words.encode()
    return _tar({f"LibriSpeech/split/{k}": v for k, v in inside.items()}), inside


def _tar(members: dict[str, bytes], strange: tarfile.TarInfo | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            one = tarfile.TarInfo(name)
            one.size = len(content)
            archive.addfile(one, io.BytesIO(content))
        if strange:
            archive.addfile(strange, io.BytesIO(bytes(strange.size)))
    return stream.getvalue()


def _try_archive(good: tuple, folder: pathlib.Path, rng: random.Random) -> None:
    from speech_jax.data.sources import archive

    tar, inside = good
    file = folder / "split.tar.gz"
    note = rng.choice(["tar", "tar", "gz", "member"])
    if note == "tar":  # what gzip vouches for may have been made wrong
        tar = bytearray(tar)
        headers = [i for i in range(0, len(tar), 512) if tar[i + 257 : i + 262] == b"ustar"]
        place = rng.choice(headers) + rng.choice([0, 100, 124, 136, 148, 156, 157, 257, 345])
        if rng.random() < 0.7:
            tar[place + rng.randrange(8)] = rng.choice(b"\x00\x01/.79AZ\x80\xff")
            if rng.random() < 0.5:  # with a sum that is right again
                head = place - (place % 512)
                tar[head + 148 : head + 156] = b" " * 8
                tar[head + 148 : head + 156] = b"%06o\0 " % sum(tar[head : head + 512])
                note = "tar, sum right"
        else:
            tar = mutated(bytes(tar), rng)
        file.write_bytes(gzip.compress(bytes(tar), 1))
    elif note == "member":
        strange = tarfile.TarInfo(
            rng.choice(["../x", "/tmp/fuzz-outside", "a/../../x", "LibriSpeech/split/1/x", "x\0y"])
        )
        strange.type = rng.choice([b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"S", b"Z", b"x"])
        strange.linkname = rng.choice(["", "/etc/passwd", "../../x", "1"])
        strange.size = rng.choice([0, 10]) if strange.type == b"0" else 0
        members = {f"LibriSpeech/split/{k}": v for k, v in inside.items()}
        file.write_bytes(gzip.compress(_tar(members, strange), 1))
    else:
        file.write_bytes(mutated(gzip.compress(tar, 1), rng))
    target = folder / "unpacked" / "split"
    archive.extract(file, target)
    found = {str(p.relative_to(target)): p for p in target.rglob("*") if p.is_file()}
    lost = inside.keys() - found.keys()
    # A header that says another name, with a sum that is right, is another archive.
    if lost and note != "tar, sum right":
        raise Wrong(f"{len(lost)} members are lost in silence ({note})")
    if any(path.is_symlink() for path in target.rglob("*")):
        raise Wrong("a link was made")
    if note == "gz" and any(found[name].read_bytes() != inside[name] for name in inside):
        raise Wrong("a member is another, and the archive has a sum")


def _make_checkpoints(folder: pathlib.Path) -> dict[str, Any]:
    import jax.numpy as jnp

    from speech_jax.training.checkpoint import Checkpoints
    from speech_jax.training.stopping import Watched

    states = {}
    with Checkpoints(folder, keep=3, watched=Watched("dev", "wer", "min")) as checkpoints:
        for step in (1, 2, 3):
            state = {"params": {"a": jnp.full((50, 3), step / 3), "b": jnp.arange(7) * step}}
            states[step] = {f"params/{k}": np.asarray(v) for k, v in state["params"].items()}
            checkpoints.save(
                step, state, data={"next_batch": step}, stopper={"best": 0.5, "count": 0},
                config={"seed": 0}, metrics={"wer": [0.0, 0.5, 0.2, 0.9][step]},
            )  # fmt: skip
    return {"folder": folder, "states": states}


def _try_checkpoints(good: dict, folder: pathlib.Path, rng: random.Random) -> None:
    import jax

    from speech_jax.training import checkpoint
    from speech_jax.training.stopping import Watched

    here = shutil.copytree(good["folder"], folder / "checkpoints")
    for _ in range(rng.choice([1, 1, 2, 6])):
        files = sorted(path for path in here.rglob("*") if path.is_file())
        mutate_file(rng.choice(files), rng)
    states = good["states"]
    if rng.random() < 0.5:
        arrays = checkpoint.load_best(here, ("params",))
    else:
        tree = {"params": {k.partition("/")[2]: v for k, v in states[1].items()}}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        with checkpoint.Checkpoints(here, watched=Watched("dev", "wer", "min")) as checkpoints:
            restored = checkpoints.restore(abstract)
        if restored is None:
            raise Wrong("a run with checkpoints begins anew in silence")
        if restored.data != {"next_batch": restored.step}:
            raise Wrong(f"a data position of {restored.data} after update {restored.step}")
        arrays = {f"params/{k}": np.asarray(v) for k, v in restored.state["params"].items()}
    if not any(
        all(np.array_equal(arrays[k], v) for k, v in one.items()) for one in states.values()
    ):
        raise Wrong("weights that nobody saved")


def _make_models(folder: pathlib.Path) -> list[pathlib.Path]:
    from speech_jax import bundle

    found = []
    for name in ("wav2vec2_base", "wav2vec2_large", "wav2vec2_pretraining", "old_model_folder"):
        found.append(shutil.copytree(DATA / name, folder / name))
        (found[-1] / "expected.npz").unlink(missing_ok=True)
    bundle.save(bundle.open(found[0]), folder / "saved")
    return [*found, folder / "saved"]


def _try_model(good: list[pathlib.Path], folder: pathlib.Path, rng: random.Random) -> None:
    from speech_jax import bundle

    here = shutil.copytree(rng.choice(good), folder / "model")
    files = sorted(path for path in here.rglob("*") if path.is_file())
    if rng.random() < 0.05:
        for path in (*here.glob("*.safetensors"), here / "bundle.json", here / "model.json"):
            path.unlink(missing_ok=True)
        with zipfile.ZipFile(here / "pytorch_model.bin", "w") as file:
            file.writestr("x/version", "3")
            file.writestr("x/data.pkl", pickle.dumps(_Evil()))
    else:
        mutate_file(rng.choice(files), rng)
    model = bundle.open(here)
    if "labels" in model.parts:
        model.task()
        model.parts["labels"].tokenizer.decode(range(model.parts["labels"].count))


class _Evil:
    """What runs a program where it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def _make_settings(folder: pathlib.Path) -> list[str]:
    del folder
    return settings_keys()


def settings_keys() -> list[str]:
    """Every key of the default configuration: 'train.steps'."""
    from speech_jax import config

    return sorted(_flat(json.loads(config.default().to_json())))


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _try_setting(keys: list[str], folder: pathlib.Path, rng: random.Random) -> None:
    from speech_jax import config, experiment
    from speech_jax.data.parts.audio import Audio
    from speech_jax.training import optim

    del folder
    key = rng.choice(keys)
    value = rng.choice([*ODD, 0.3, 3, (1.0,), (0.9, 1.0), ("x", 1), 1e9, -3.0, 10**12])
    settings = config.default()
    *sections, last = key.split(".")
    place = settings
    for section in sections:
        place = place[section]
    try:
        try:
            with settings.unlocked(), settings.ignore_type():
                place[last] = value
        except (TypeError, ValueError, OverflowError) as error:  # as the command line's: main.py
            raise UserError(f"config.{key}: {error}") from error
        config.check(settings)
        parts = {"audio": Audio(), "labels": _Labels()}
        experiment.make_task(settings, parts)
        make_adversary(settings)
        optim.make_schedule(
            steps=settings.train.steps, defaults=config.default().schedule, **settings.schedule
        )
    except UserError as error:
        if last not in str(error) and not any(one in str(error) for one in sections):
            raise Wrong(f"config.{key}={value!r} is refused without its name: {error}") from error
        raise


class _Labels:
    count = 32


def _make_workdir(folder: pathlib.Path) -> pathlib.Path:
    from speech_jax import experiment
    from speech_jax.data.batch import Bucket
    from speech_jax.workdir import Workdir

    here = shutil.copytree(DATA / "old_workdir", folder / "work")
    workdir = Workdir(here)
    workdir.record(workdir.recorded())
    for part in experiment.restore_parts(workdir.recorded(), here).values():
        part.save(here)  # with digests, which the old ones have not
    workdir.record_plan([Bucket(8, (("samples", 32_000), ("labels", 8)))], "x", 48)
    workdir.write_results({"dev": {"wer": 0.5}}, training={"steps": 4})
    return here


def _try_workdir(good: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> None:
    from speech_jax import experiment
    from speech_jax.data import text
    from speech_jax.training.report import Writer
    from speech_jax.workdir import Workdir

    here = shutil.copytree(good, folder / "work")
    tokenizer = text.load_tokenizer(here / "tokenizer.json")
    names = ("config.json", "plan.json", "results.json", "metrics.jsonl", "tokenizer.json",
             "features.json")  # fmt: skip
    name = rng.choice(names)
    mutate_file(here / name, rng)
    workdir = Workdir(here)
    recorded = workdir.recorded()
    workdir.check(recorded)
    workdir.recorded_plan()
    workdir.write_results({"test": {"wer": 0.1}})
    Writer(workdir.metrics, workdir.tensorboard, 2).close()
    parts = experiment.restore_parts(recorded, here)
    experiment.make_task(recorded, parts)
    # One without a digest is as one of before digests: what has changed cannot be told.
    sealed = b"sha256" in (here / "tokenizer.json").read_bytes()
    if sealed and "labels" in parts and parts["labels"].tokenizer != tokenizer:
        raise Wrong("another tokenizer, in silence")


KINDS = {
    "audio": Kind(_make_audio, _try_audio, (".audio",)),
    "manifest": Kind(_make_manifest, _try_manifest, ("/split.jsonl", "/good manifest/")),
    "archive": Kind(_make_archive, _try_archive, ("/split.tar.gz",)),
    "checkpoints": Kind(_make_checkpoints, _try_checkpoints, ("/input/checkpoints",)),
    "model folder": Kind(_make_models, _try_model, ("/input/model",)),
    "settings": Kind(_make_settings, _try_setting, ("",)),  # it looks for its key itself
    "workdir": Kind(_make_workdir, _try_workdir, ("/input/work",)),
}


# ---- One input -----------------------------------------------------------------------------------


class Judge:
    """Tries inputs in a folder of its own, and watches what else happens."""

    def __init__(self, room: pathlib.Path, seed: int):
        self._room, self._seed, self._good = room, seed, {}
        self._events: list[str] = []
        self._watching = False
        sys.addaudithook(self._audit)

    def attempt(self, name: str, number: int) -> dict[str, Any]:
        """{'outcome': right, refused or a fault, 'why', 'seconds', 'bytes'} of an input."""
        kind = KINDS[name]
        folder = self._room / "input"
        if name not in self._good:
            place = self._room / f"good {name}"
            place.mkdir()
            self._good[name] = kind.make(place)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rng = random.Random(f"{self._seed} {name} {number}")
        self._events.clear()
        started, self._watching = time.monotonic(), True
        try:
            kind.attempt(self._good[name], folder, rng)
            outcome, why = "right", ""
        except UserError as error:
            outcome, why = "refused", str(error)
            if "\n" in why or not why:
                outcome = "not one line"
            elif not any(one in why for one in kind.named):
                outcome = "nothing named"
        except Wrong as error:
            outcome, why = "wrong", str(error)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "exception"
            why = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        self._watching = False
        seconds = time.monotonic() - started
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._events:
            outcome, why = "outside or a program", "; ".join(self._events)
        elif seconds > SECONDS:
            outcome, why = "slow", f"{seconds:.1f} s"
        elif size > BYTES:
            outcome, why = "memory", f"{size / 2**30:.1f} GiB; {why}"
        return {"outcome": outcome, "why": why[:600], "seconds": seconds, "bytes": size}

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self._watching:
            return
        if event in PROGRAMS:
            self._events.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.fspath(arguments[0]), arguments[2] or 0
            path = path.decode(errors="replace") if isinstance(path, bytes) else path
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            real = os.path.realpath(path)
            if writes and not real.startswith((str(self._room), "/dev/")):
                self._events.append(f"wrote {path}")


# ---- All of them ---------------------------------------------------------------------------------


def _work(pipe: Connection, room: pathlib.Path, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    log = os.open(room / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    judge = Judge(room, seed)
    while True:
        pipe.send(judge.attempt(*pipe.recv()))


class _Worker:
    """The process that tries; one that hangs is ended, and the next input has a new one."""

    def __init__(self, room: pathlib.Path, seed: int):
        self._room, self._seed, self._number = room, seed, 0
        self._process = None

    def attempt(self, name: str, number: int) -> dict[str, Any]:
        if self._process is None:
            self._number += 1
            self._own = self._room / str(self._number)
            self._own.mkdir()
            self._pipe, theirs = multiprocessing.Pipe()
            make = multiprocessing.get_context("spawn").Process
            self._process = make(target=_work, args=(theirs, self._own, self._seed), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((name, number))
            # The first input of a kind waits for imports and for what is made once.
            if self._pipe.poll(120):
                found = self._pipe.recv()
                if found["bytes"] > BYTES:
                    self.close()
                return found
            found = {"outcome": "slow", "why": "ended after 120 s"}
        except (EOFError, BrokenPipeError):
            self._process.join(5)
            said = (self._own / "log").read_text(errors="replace")[-500:]
            found = {"outcome": "died", "why": f"status {self._process.exitcode}: {said}"}
        self.close()
        return found | {"seconds": 0.0, "bytes": 0}

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.join()
            self._process = None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stops then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    names = [args.only] if args.only else list(KINDS)
    end = time.monotonic() + args.seconds
    found: dict[str, list] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="fuzz.") as room:
        worker = _Worker(pathlib.Path(room).resolve(), args.seed)
        for count in range(args.inputs):
            if time.monotonic() > end:
                break
            name, number = names[count % len(names)], args.first + count // len(names)
            one = worker.attempt(name, number)
            found[name].append(one)
            if one["outcome"] not in ("right", "refused"):
                print(
                    f"{name} {number}: {one['outcome']}: {one['why']}", file=sys.stderr, flush=True
                )
        worker.close()
    rows = table(found)
    report(rows, file=args.json, device=f"CPU, {os.cpu_count()} cores")
    if rows[-1]["faults"]:
        sys.exit("error: not all inputs are right or refused in one line")


def table(found: dict[str, list[dict]]) -> list[dict]:
    """Rows of a table by kind."""
    rows = []
    for name, some in [*found.items(), ("all", list(itertools.chain(*found.values())))]:
        counts = collections.Counter(one["outcome"] for one in some)
        good = counts["right"] + counts["refused"]
        rows.append(
            {
                "kind": name,
                "inputs": len(some),
                "right": counts["right"],
                "one line": counts["refused"],
                "faults": len(some) - good,
                "worst s": max((one["seconds"] for one in some), default=0.0),
                "GiB": max((one["bytes"] for one in some), default=0) / 2**30,
            }
        )
    return rows


if __name__ == "__main__":
    main()
