"""How a run ends, whatever comes: by itself, or in one line, at once and with what it has saved.

Each way is tried at the third batch of a run of six, which saves every second update. Other ways
have tests of their own: kills, a second Ctrl-C and signals within evaluations and compilations
(test_train.py, test_stopping.py, test_checkpoint.py), hangs (test_watchdog.py), full disks byte by
byte (test_checkpoint.py, test_report.py), two runs in a workdir (test_workdir.py), and at random
`python -m benchmarks.faults`.
"""

import errno
import os
import pathlib
import re
import resource
import signal
import subprocess
import time

import pytest

import runs
from speech_jax import experiment, files, train
from speech_jax.errors import UserError
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax


def told(number):
    def action(workdir, patch):
        os.kill(os.getpid(), number)

    return action


def full(workdir, patch):
    """No file may grow beyond some bytes: as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, HARD))


def in_the_way(name):
    """A file where a folder was."""

    def action(workdir, patch):
        path = workdir.folder / name
        saved = workdir.folder / "checkpoints" / "3"
        while not saved.exists():  # else its threads would go on writing in a folder that moves
            time.sleep(0.01)
        if path.exists():
            path.rename(path.with_name(f"{name}.away"))
        path.write_text("")

    return action


def lift(workdir):
    resource.setrlimit(resource.RLIMIT_FSIZE, (HARD, HARD))
    for name in FOLDERS:
        path, away = workdir.folder / name, workdir.folder / f"{name}.away"
        if path.is_file():
            path.unlink()
        if away.exists():
            away.rename(path)


def read_only(method):
    """As a file system that turned read-only, which root does not heed, makes it fail."""

    def failing(*arguments, **others):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def action(workdir, patch):
        patch.setattr(files, method, failing)

    return action


HARD = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
FOLDERS = ("checkpoints", "predictions", "tensorboard")
# What happens at the third batch, and what the run says then; None: it comes to its end.
WAYS = {
    "nothing": (lambda workdir, patch: None, None),
    "SIGTERM": (told(signal.SIGTERM), "left"),
    "Ctrl-C": (told(signal.SIGINT), "left"),
    "a full disk": (full, "annot write"),
    "a file in the way of checkpoints": (in_the_way("checkpoints"), "Cannot write checkpoint"),
    "a file in the way of predictions": (in_the_way("predictions"), "cannot write .*predictions"),
    "a file in the way of TensorBoard": (in_the_way("tensorboard"), None),  # its file is open
    "read-only": (read_only("write_atomically"), "cannot write .*Read-only"),
}


@pytest.fixture(scope="module")
def whole(tones, tmp_path_factory):
    return outcome(runs.tiny_config(tones), Workdir(tmp_path_factory.mktemp("whole")))


def outcome(config, workdir):
    """The state in which a run comes to its end."""
    assert train.run(config, workdir)["training"]["steps"] == 6
    return {name: value.tobytes() for name, value in runs.saved_state(workdir).items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_at_once_and_says_why_and_goes_on_later(way, whole, tones, tmp_path):
    action, says = WAYS[way]
    config, workdir = runs.tiny_config(tones), Workdir(tmp_path / "work")
    loaded, started = experiment.training_batches, time.monotonic()
    with pytest.MonkeyPatch.context() as patch:

        def batches(*arguments):
            for count, batch in enumerate(loaded(*arguments)):
                if count == 3:
                    action(workdir, patch)
                yield batch

        patch.setattr(experiment, "training_batches", batches)
        try:
            said = None if train.run(config, workdir) else "left"
        except UserError as error:
            said = str(error)
        finally:
            lift(workdir)
    assert time.monotonic() - started < 60
    assert says == said or re.search(says or "$^", said), said
    assert "\n" not in (said or "")
    assert outcome(config, workdir) == whole


def test_ctrl_c_before_there_is_a_run_is_one_line(tones, tmp_path):
    command = runs.command(tmp_path, tones)
    with subprocess.Popen(
        command, cwd=runs.ROOT, env=runs.environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while "jax" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)  # it imports, which takes a second or more
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted\n"
