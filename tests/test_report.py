"""What is written of a run: each step once, of all its processes, or an error at once."""

import io
import json
import resource
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from speech_jax.training.report import Report, ReportError, Writer

SAMPLE_RATE = 100


def lines(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder):
    """The events of each of TensorBoard's files, the files in the order of their first events."""
    found = []
    for file in (folder / "tensorboard").iterdir():
        data, here = file.read_bytes(), []
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            here.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        found.append(here)
    return sorted(found, key=lambda file: file[0].wall_time)


def writer(folder, step=0):
    return Writer(folder / "metrics.jsonl", folder / "tensorboard", step)


def report(folder, first=0, steps=100, **changes):
    arguments = {
        "steps": steps,
        "first": first,
        "log_every": 2,
        "sample_rate": SAMPLE_RATE,
        "peak_flops": 1e3,
        "learning_rate": lambda step: 0.1 * step,
        "figures": lambda sums: {"loss": sums["loss"] / sums["steps"]},
        "name": "utterance-{}".format,
        "unreadable": lambda: 7,
    }
    return Report(folder / "metrics.jsonl", folder / "tensorboard", **arguments | changes)


def sums(step, log_every=2, skipped=0):
    """As a step gives them: over the steps since the last logged one."""
    count = (step - 1) % log_every + 1
    values = {
        "loss": 2.0 * count,
        "grad_norm": 3.0 * count,
        "steps": count - skipped,
        "skipped": skipped,
        "samples": 50.0 * count,
        "padded_samples": 100.0 * count,
    }
    return {name: jnp.float32(value) for name, value in values.items()}


def go(one, first, last, flops=10.0):
    for step in range(first + 1, last + 1):
        one.step(step, sums(step), jnp.bool_(True), [step], flops)


# ---- The writer --------------------------------------------------------------------------------


def test_resumed_runs_write_each_step_once(tmp_path):
    one = writer(tmp_path)
    for step in (10, 20, 30):
        one.write(step, {"loss": 1.0 / step})
    one.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    resumed = writer(tmp_path, 20)
    resumed.write(30, {"loss": 0.5})
    resumed.close()
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir() if "damaged" in path.name] == []
    before, after = events(tmp_path)
    assert [event.step for event in before if event.summary.value] == [10, 20, 30]
    starts = [event for event in after if event.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(21, event_pb2.SessionLog.START)]
    assert not any(event.HasField("session_log") for event in before)


def test_a_step_has_one_line_across_a_restart(tmp_path):
    one = writer(tmp_path)
    one.write(1, {"loss": 3})
    one.write(2, {"loss": 2})
    one.close()
    resumed = writer(tmp_path, 2)  # to evaluate what was saved before it was evaluated
    resumed.write(2, {"dev/wer": 0.5})
    resumed.write(2, {"test/wer": 0.25})
    resumed.write(3, {"loss": 1})
    resumed.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 3},
        {"step": 2, "loss": 2, "dev/wer": 0.5, "test/wer": 0.25},
        {"step": 3, "loss": 1},
    ]


def test_what_is_not_finite_is_no_point_and_null(tmp_path):
    one = writer(tmp_path)
    one.write(1, {"a": float("nan"), "b": float("-inf"), "c": None, "d": 0.5})
    one.close()
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5}]
    ((_, event),) = events(tmp_path)
    assert [(v.tag, v.simple_value) for v in event.summary.value] == [("d", 0.5)]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe{", b"null", b'{"step": "x"}', b"{}", b"[" * 100_000, b'"step"']
)
def test_damaged_lines_are_set_aside(tmp_path, damage, caplog):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2}\n'
    path.write_bytes(damage + b"\n" + good)
    writer(tmp_path, 5).close()
    assert path.read_bytes() == good
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n" + good
    assert "1 damaged lines" in caplog.text


@pytest.fixture
def full():
    """Lets no file grow beyond 64 KiB from when it is called on: as a disk does that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("long", ["metrics", "tensorboard"])
def test_a_full_disk_is_an_error_at_once(tmp_path, full, long):
    with pytest.raises(ReportError, match=rf"cannot write to .*{long}.* make room") as raised:
        fill(tmp_path, full, long)
    assert "\n" not in str(raised.value)
    # The run goes on from what is whole.
    writer(tmp_path, 10).close()
    assert {line["step"] for line in lines(tmp_path)} <= set(range(11))


def fill(folder, full, long):
    value = None if long == "metrics" else 1.0  # which is no point in a plot
    values = {"loss": 1.0} | {f"a/{i}": value for i in range(100)}
    one = report(folder, figures=lambda sums: dict(values), log_every=1)
    with one:
        full()
        for step in range(1, 200):
            one.step(step, sums(step, 1), jnp.bool_(True), [0], 1.0)
            if long == "tensorboard":
                (folder / "metrics.jsonl").unlink(missing_ok=True)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(ReportError, match=r"cannot write to .*tensorboard"):
        writer(tmp_path)


# ---- The report --------------------------------------------------------------------------------


def test_a_step_is_read_after_the_next_was_dispatched(tmp_path):
    with report(tmp_path, log_every=1) as one:
        go(one, 0, 1)
        assert lines(tmp_path) == []
        go(one, 1, 2)
        assert [line["step"] for line in lines(tmp_path)] == [1]
        with one.pause():
            assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_logged(tmp_path, capsys):
    with report(tmp_path) as one:
        go(one, 0, 5)
        assert (one.figures, one.logged) == ({"loss": 2.0}, 4)
        one.scores(4, {"dev": {"wer": 0.5}, "test": {"wer": None}}, {"dev": "WER 50%"})
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4]  # the scores are in the line of their step
    assert (
        found[0].items()
        >= {
            "loss": 2.0,
            "grad_norm": 3.0,
            "learning_rate": 0.1,
            "padding_fraction": 0.5,
            "skipped_updates": 0,
            "unreadable": 7,
            "compiles": 0,
        }.items()
    )
    assert found[1].items() >= {"loss": 2.0, "dev/wer": 0.5, "test/wer": None}.items()
    shown = capsys.readouterr().err
    assert "step 4/100  loss 2.000  grad 3.00  lr 3.0e-01" in shown
    assert "step 4  dev: WER 50%" in shown


def test_updates_that_are_not_finite_are_counted_and_named(tmp_path, capsys):
    with report(tmp_path) as one:
        for step in (1, 2, 3):
            index = [10 * step, -1]
            one.step(step, sums(step, skipped=1), jnp.bool_(step == 2), index, 1.0)
        assert one.skipped == 1
        assert one.finish()["skipped_updates"] == 2
    err = capsys.readouterr().err
    assert "step 1: not finite, skipped; its utterances: utterance-10\n" in err
    assert "utterance-20" not in err
    assert "utterance--1" not in err


def test_totals_are_of_the_run_not_of_a_process(tmp_path):
    def total(one):
        return {k: v for k, v in one.to_dict()["total"].items() if k != "seconds"}

    def skip(one):
        one.step(4, sums(4), jnp.bool_(False), [], 10.0)
        jax.jit(lambda x: x + 1)(np.zeros(17, np.float32))

    with report(tmp_path / "whole") as whole:
        go(whole, 0, 3)
        skip(whole)
        go(whole, 4, 10)
        expected = whole.finish()
    with report(tmp_path / "killed") as first:
        go(first, 0, 3)
        skip(first)
        go(first, 4, 5)
        with first.pause():
            saved = json.loads(json.dumps(first.to_dict()))
        go(first, 5, 7)  # lost
    assert saved["window"]["steps"] == 1
    with report(tmp_path / "killed", first=5) as second:
        second.from_dict(saved)
        go(second, 5, 10)
        found = second.finish()
    assert total(second) == total(whole) == {"steps": 10, "audio_seconds": 5.0, "flops": 100.0}
    for name in ("skipped_updates", "compiles"):
        assert found[name] == expected[name]
    assert (found["skipped_updates"], found["compiles"]) == (1, 1)
    one = report(tmp_path / "old")
    one.from_dict({})  # of a checkpoint of before
    assert one.skipped == 0


def test_the_compilations_of_others_do_not_count(tmp_path):
    from jax._src import monitoring

    before = monitoring.get_event_duration_listeners()
    with report(tmp_path) as one:
        jax.jit(lambda x: x + 2)(np.zeros(19, np.float32))
    jax.jit(lambda x: x + 3)(np.zeros(19, np.float32))
    assert one.to_dict()["compiles"] == 1
    assert monitoring.get_event_duration_listeners() == before


class Gone(io.StringIO):
    """A terminal that is closed, or a pipe that nobody reads."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(28, "full")])
def test_a_run_goes_on_when_nobody_listens(tmp_path, monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Gone(error))
    with report(tmp_path) as one:
        go(one, 0, 5)
        one.say("hello")
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_rates_count_no_pause(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with report(tmp_path) as one:
        for step in range(1, 5):
            now[0] += 1.0
            go(one, step - 1, step)
            with one.pause():
                now[0] += 100.0
        figures = one.finish()
    assert figures["audio_seconds_per_second"] == pytest.approx(0.5)
    assert figures["mfu"] == pytest.approx(10 / 1e3)


def test_the_last_update_is_logged(tmp_path):
    with report(tmp_path, steps=3) as one:
        for step in range(3):
            go(one, step, step + 1)
        figures = one.finish()
    assert [line["step"] for line in lines(tmp_path)] == [2, 3]
    assert figures["audio_seconds_per_second"] > 0
