"""A run small enough to be made many times in a test session."""

import json
import os
import pathlib
import subprocess
import sys

from speech_jax import config as defaults
from speech_jax import models

ROOT = pathlib.Path(__file__).parent.parent


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
