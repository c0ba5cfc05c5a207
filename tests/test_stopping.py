"""When a run ends early: patience with what is watched, and signals, from wherever it is.

Run as a program, this file is a run that is interrupted.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import runs
from speech_jax.training.stopping import EarlyStopping, Interrupted, Interruption, Watched

NAN, INF = float("nan"), float("inf")
WER = Watched("dev", "wer", "min")
ACCURACY = Watched("dev", "accuracy", "max")

# ---- Patience ----------------------------------------------------------------------------------


def updates(stopper, *values):
    return [stopper.update({stopper.watched.metric: value}) for value in values]


def test_it_counts_evaluations_without_a_better_one():
    stopper = EarlyStopping(patience=2, watched=WER)
    assert updates(stopper, 3.0, 2.0, NAN) == [True, True, False]
    assert not stopper.should_stop
    resumed = EarlyStopping(patience=2, watched=WER)
    assert resumed.from_dict(stopper.to_dict()) is None
    assert updates(resumed, 2.0) == [False]  # an equal is not better
    assert resumed.should_stop
    assert resumed.why == "dev wer not better than 2 for 2 evaluations"
    assert updates(resumed, 1.0) == [True]
    assert not resumed.should_stop


@pytest.mark.parametrize("watched", [WER, ACCURACY])
def test_no_score_is_no_improvement_and_picks_nothing(watched):
    stopper = EarlyStopping(patience=9, watched=watched)
    assert updates(stopper, NAN, INF, -INF, None) == [False] * 4
    assert not stopper.update({})
    assert (stopper.best, stopper.count) == (None, 5)
    assert updates(stopper, 0.0) == [True]
    assert watched.score({watched.metric: 0.0}) == 0.0
    assert watched.score({watched.metric: INF}) is None


def test_by_the_highest():
    stopper = EarlyStopping(patience=1, watched=ACCURACY)
    assert updates(stopper, -2.0, -1.0, -3.0) == [True, True, False]
    assert stopper.should_stop


def test_an_improvement_is_of_more_than_min_delta():
    assert updates(EarlyStopping(2, WER, min_delta=0.1), 1.0, 0.95, 0.85) == [True, False, True]
    assert updates(EarlyStopping(2, ACCURACY, min_delta=0.1), 0.5, 0.55, 0.65) == [1, 0, 1]


def test_patience_may_be_of_epochs_and_goes_on_after_a_kill():
    stopper = EarlyStopping(patience=0, watched=WER, patience_epochs=4.0)
    found = []
    for epoch, value in ((2.5, NAN), (5.0, 0.3), (7.5, 0.4), (8.9, 0.3), (9.0, 0.5)):
        stopper.update({"wer": value}, epoch)
        found.append(stopper.should_stop)
        resumed = EarlyStopping(patience=0, watched=WER, patience_epochs=4.0)
        resumed.from_dict(json.loads(json.dumps(stopper.to_dict())))
        assert resumed == stopper
        stopper = resumed
    assert found == [False, False, False, False, True]
    # Without a score it waits from the first evaluation on.
    never = EarlyStopping(patience=0, watched=WER, patience_epochs=1.0)
    assert [never.update({}, epoch) or never.should_stop for epoch in (9.0, 9.9, 10.0)] == [0, 0, 1]
    # A record of before knows of no epochs: they count from the next evaluation on.
    old = EarlyStopping(patience=0, watched=WER, patience_epochs=1.0)
    old.from_dict({"best": 0.1, "count": 1})
    assert [old.update({}, epoch) or old.should_stop for epoch in (9.0, 9.9, 10.0)] == [0, 0, 1]


def test_never():
    never = EarlyStopping(patience=0, watched=WER)
    updates(never, NAN, NAN)
    assert not never.should_stop
    assert not EarlyStopping(patience=3).update({"wer": 0.1})  # nothing is watched


@pytest.mark.parametrize(
    "other", [Watched("harder", "wer", "min"), Watched("dev", "cer", "min"), None]
)
def test_another_split_or_metric_starts_anew_and_says_so(other):
    stopper = EarlyStopping(patience=2, watched=WER)
    updates(stopper, 0.1, 0.2)
    resumed = EarlyStopping(patience=2, watched=other)
    line = resumed.from_dict(stopper.to_dict())
    if other is None:  # nothing is evaluated now
        assert line is None
        return
    assert "was scored on dev (wer)" in line
    assert f"{other.split} ({other.metric})" in line
    assert (resumed.best, resumed.count) == (None, 0)


def test_what_was_saved_before_the_split_was_named_goes_on():
    resumed = EarlyStopping(patience=2, watched=WER)
    assert resumed.from_dict({"best": 0.1, "count": 1}) is None
    assert (resumed.best, resumed.count) == (0.1, 1)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'lowest': use 'min' or 'max'"):
        Watched("dev", "wer", "lowest")


# ---- Signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_and_the_handlers_come_back(number):
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    with Interruption() as interruption:
        assert not interruption.asked()
        interruption.check()
        os.kill(os.getpid(), number)
        assert interruption.asked()
        assert interruption.asked()
        with pytest.raises(Interrupted):
            interruption.check()
    assert {one: signal.getsignal(one) for one in before} == before


def test_in_another_thread_it_hears_nothing_and_works():
    found = []

    def run():
        with Interruption() as interruption:
            found.append(interruption.asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def start(role):
    return subprocess.Popen(
        [sys.executable, __file__, role],
        env=runs.environment(PYTHONPATH=str(pathlib.Path(__file__).parent.parent)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_second_ctrl_c_leaves_at_once():
    with start("deaf") as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert "again leaves at once" in process.stderr.readline() + process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
        assert process.stdout.read() + process.stderr.read() == ""


def deaf():
    """Works for long without asking."""
    with Interruption():
        print("working", flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.1)


def test_a_signal_within_a_compilation_is_heard_right_after_it():
    with start("compiles") as process:
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "True\n"), errors


def compiles():
    """Is told to leave while XLA compiles, in a thread and in this one."""
    import concurrent.futures

    import jax
    import jax.numpy as jnp

    def slow(x):
        for i in range(150):
            x = jnp.sort(jnp.sin(x) + i)
        return x

    with Interruption() as interruption:
        lowered = jax.jit(slow).lower(jax.ShapeDtypeStruct((50,), jnp.float32))
        print("compiling", flush=True)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda one: one.compile(), [lowered]))
        print(interruption.asked())


if __name__ == "__main__":
    {"deaf": deaf, "compiles": compiles}[sys.argv[1]]()
