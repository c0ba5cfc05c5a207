"""A strict session: eight CPU devices; implicit promotion and warnings are errors."""

import atexit
import fcntl
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation: little of it is spent on optimizing.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_force_host_platform_device_count=8",
    ]
)
# Two threads for each device, on however few cores: with fewer, they wait for each other for ever
# in a collective (seen on jax 0.11 with 2 cores).
os.environ.setdefault("NPROC", "16")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one worker, or a training run in a subprocess, has compiled the others need not.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="speech_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest
import soundfile


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Implicit promotion of dtype or rank raises, except in tests of optax, which relies on it."""
    if request.node.get_closest_marker("optax"):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            yield


@pytest.fixture(scope="session")
def speech() -> pathlib.Path:
    """The folder of recorded speech; tests that need it are skipped where it is not."""
    root = os.environ.get("SPEECH_JAX_TEST_DATA", "")
    if not root or not pathlib.Path(root).is_dir():
        pytest.skip("NO RECORDED SPEECH: set SPEECH_JAX_TEST_DATA to the folder that holds it")
    return pathlib.Path(root)


def made_once(tmp_path_factory, name: str, make) -> pathlib.Path:
    """The folder that `make` fills, the same one for all workers of a session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            partial = base / f"{name}.partial"
            make(partial)
            partial.rename(base / name)
    return base / name


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> pathlib.Path:
    """A LibriSpeech-style folder with splits 'train' and 'dev': each word is a tone of its own."""

    def make(root):
        for split, count, seed in (("train", 48, 0), ("dev", 6, 1)):
            write_tones(root / split, count, seed)

    return made_once(tmp_path_factory, "tones", make)


@pytest.fixture(scope="session")
def finished(tones, tmp_path_factory):
    """A run on the tones that came to its end, and recognizes them; its weights are averaged."""
    import runs
    from speech_jax import files, train
    from speech_jax.workdir import Workdir

    config, compiled = runs.learning_config(tones), []

    def count(event: str, seconds: float, **of: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and of["fun_name"] == "jit(step)":
            compiled.append(seconds)

    def make(path):
        jax.monitoring.register_event_duration_secs_listener(count)
        train.run(config, Workdir(path))
        jax.monitoring.unregister_event_duration_listener(count)
        files.write_atomically(path / "compiled.json", files.dump_json(compiled))

    folder = made_once(tmp_path_factory, "finished", make)
    return runs.Finished(config, Workdir(folder), files.read_json(Workdir(folder).results))


WORDS = {"A": 300.0, "B": 900.0, "C": 2700.0}


def write_tones(folder: pathlib.Path, count: int, seed: int, rate: int = 16_000) -> None:
    """Writes `count` utterances of one speaker and chapter, in the official layout."""
    rng = np.random.default_rng(seed)
    chapter = folder / "1" / "1"
    chapter.mkdir(parents=True)
    lines = []
    for number in range(count):
        words = rng.choice(list(WORDS), size=rng.integers(1, 5))
        time = np.arange(round(0.3 * rate)) / rate
        gap = np.zeros(rate // 8)
        audio = np.concatenate(
            [np.concatenate([np.sin(2 * np.pi * WORDS[word] * time), gap]) for word in words]
        )
        audio = 0.3 * audio + 0.01 * rng.standard_normal(len(audio))
        name = f"1-1-{number:04d}"
        soundfile.write(chapter / f"{name}.flac", audio, rate, subtype="PCM_16")
        lines.append(f"{name} {' '.join(words)}\n")
    (chapter / "1-1.trans.txt").write_text("".join(lines))
