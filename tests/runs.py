"""A run small enough to be made many times in a test session."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from speech_jax import config as defaults
from speech_jax import experiment, models
from speech_jax.setup import Setup, make_setup
from speech_jax.training import saved, sharding
from speech_jax.training.step import TrainState
from speech_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent


class Finished(NamedTuple):
    """A run that came to its end."""

    config: Any
    workdir: Workdir
    results: Mapping[str, Any]


def tiny_config(root, **train):
    """Settings of a run of seconds on the tones of conftest.py."""
    config = defaults.default()
    config.data.root = str(root)
    config.data.cache = str(pathlib.Path(root).parent / "cache")
    config.data.train_splits = "train"
    config.data.eval_splits = "dev"
    config.data.batch_seconds = 8.0
    config.data.max_seconds = 2.0
    config.data.buckets = 1
    config.data.eval_buckets = 1
    config.text.normalizer = "english"
    config.features.mels = 16
    config.features.normalize = "global"  # of its own, an utterance of one tone has no contrast
    config.model = models.settings(
        "conformer",
        "tiny",
        width=16,
        num_layers=1,
        heads=2,
        kernel=5,
        dropout=0.0,
        subsampling_channels=4,
    )
    config.schedule = {"name": "constant", "peak": 1e-2, "warmup": 5}
    config.train.update({"steps": 6, "eval_every": 3, "log_every": 2} | train)
    config.checkpoint.every = 2
    config.spec_augment.update({"time_masks": 0, "frequency_masks": 0})
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def learning_config(root):
    """Settings with which the tones are learned."""
    config = tiny_config(root, steps=120, eval_every=60, log_every=20, ema_decay=0.8)
    config.data.test_splits = "train"
    config.checkpoint.every = 60
    return config


RECIPE = """
import sys
sys.path.insert(0, {tests!r})
import runs
def get_config():
    return runs.tiny_config({root!r}, **{train!r})
"""


def command(folder: pathlib.Path, root, *flags: str, **train) -> list[str]:
    """The command line that trains `tiny_config` in folder/work."""
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(tests=str(ROOT / "tests"), root=str(root), train=train))
    arguments = [f"--config={recipe}", f"--workdir={folder / 'work'}", *flags]
    return [sys.executable, "-m", "speech_jax.main", *arguments]


def environment(devices: int = 1, **others: str) -> dict[str, str]:
    """Of a process with so many CPU devices."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | others


def run(arguments, devices: int = 1, check: bool = True, **others: str):
    """Runs a command to its end."""
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(devices, **others), capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("audio_seconds_per_second", "mfu", "compiles")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def setup(config, workdir: Workdir) -> Setup:
    """What a step of a run is made of, its parts made in the workdir where they are not there."""
    source = experiment.open_training(config)
    parts = experiment.make_parts(config, workdir.folder, source)
    task = experiment.make_task(config, parts)
    corpus = experiment.training_corpus(config, source, parts, task)
    mesh = sharding.make_mesh(**config.mesh)
    plan = experiment.training_plan(config, corpus, task, mesh)
    return make_setup(config, task, corpus.fields, mesh, plan.buckets[0])


def saved_state(workdir: Workdir, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name; of the newest one, if no step is given."""
    step = max(steps(workdir)) if step is None else step
    names = [field.name for field in dataclasses.fields(TrainState) if field.name != "rng"]
    return saved.load(saved.epath.Path(workdir.checkpoints) / str(step), names)


def steps(workdir: Workdir) -> list[int]:
    """The updates after which there are checkpoints."""
    return sorted(int(path.name) for path in workdir.checkpoints.iterdir() if path.name.isdigit())


def record(workdir: Workdir, step: int) -> dict[str, Any]:
    """The record of a checkpoint, without what depends on the clock."""
    path = workdir.checkpoints / str(step) / "record" / "metadata"
    found = json.loads(path.read_text())
    for name in ("seconds", "totals"):
        found["data"].pop(name, None)
    return found


class Killed(BaseException):
    """Nobody catches it, as nobody does a kill."""


def interrupted(at: int, seen: list | None = None, killed: bool = False) -> Callable:
    """experiment.training_batches, which ends the run before its batch number `at` is trained on.

    By a SIGTERM, after the next update, or as if it had been killed. What was trained on before is
    added to `seen`, as the utterances' places of each batch.
    """

    def batches(*arguments):
        for count, batch in enumerate(loaded(*arguments)):
            if count == at and killed:
                raise Killed
            if count == at:
                os.kill(os.getpid(), signal.SIGTERM)
            if seen is not None:
                seen.append(batch["index"].tolist())
            yield batch

    loaded = experiment.training_batches
    return batches
