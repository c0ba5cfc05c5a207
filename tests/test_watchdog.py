"""The watchdog ends a process that hangs, and leaves one that works alone."""

import subprocess
import sys

import pytest

from speech_jax.training.watchdog import Watchdog

SETUP = "import ctypes, time; from speech_jax.training.watchdog import Watchdog\n"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(50)",
        "ctypes.PyDLL(None).sleep(50)",  # holds the GIL: no Python thread could end this
    ],
)
def test_a_hang_dumps_all_stacks_and_fails(hang):
    result = run(
        "import threading\n"
        "def loader(): time.sleep(50)\n"
        "threading.Thread(target=loader, daemon=True).start()\n"
        f"def train_step(): {hang}\n"
        "with Watchdog(0.5) as watchdog:\n"
        "    watchdog.beat()\n"
        "    train_step()\n"
    )
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert "train_step" in result.stderr
    assert "loader" in result.stderr


def test_beats_and_leaving_keep_the_process_alive():
    result = run(
        "with Watchdog(2) as watchdog:\n"
        "    for _ in range(30):\n"
        "        time.sleep(0.1)\n"
        "        watchdog.beat()\n"
        "time.sleep(2.5)\n"
        "print('alive')\n"
    )
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


def test_long_work_has_a_longer_time_and_not_all_of_it():
    result = run(
        "with Watchdog(0.2) as watchdog:\n"
        "    with watchdog.busy():\n"
        "        time.sleep(1)\n"
        "    print('compiled', flush=True)\n"
        "    with watchdog.busy():\n"
        "        time.sleep(50)\n"
    )
    assert (result.returncode, result.stdout) == (1, "compiled\n"), result.stderr
    assert "Timeout" in result.stderr
    result = run(
        "with Watchdog(0.2) as watchdog:\n"
        "    with watchdog.busy(): pass\n"
        "    started = time.time()\n"
        "    time.sleep(3)\n"
    )
    assert result.returncode == 1, "after it, the time of a step counts again"


def test_zero_turns_it_off_and_negative_is_refused():
    result = run("with Watchdog(0) as watchdog:\n    watchdog.beat()\nprint('alive')\n")
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr
    with pytest.raises(ValueError, match="0 turns it off"):
        Watchdog(-1)
