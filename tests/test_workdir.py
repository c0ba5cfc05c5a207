"""A workdir: what may change between its runs, one run at a time, and files under any name.

Run as a program, this file is a run that holds a workdir's lock.
"""

import contextlib
import json
import os
import pathlib
import signal
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs
from speech_jax import config as settings
from speech_jax import files
from speech_jax.data.batch import Bucket
from speech_jax.errors import UserError
from speech_jax.workdir import FREE, Workdir, WorkdirError


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path / "run")


@pytest.fixture
def recorded(workdir):
    """A workdir in which a run of the default configuration was recorded."""
    workdir.record(settings.default())
    return workdir


def changed(key, value):
    """The default configuration with another value."""
    config = settings.default().unlock()
    section, _, name = key.rpartition(".")
    with config.ignore_type():
        (config[section] if section else config)[name] = value
    return config


def edit(workdir, change):
    """Changes the record as another version would have written it."""
    record = json.loads(workdir.config.read_text())
    change(record)
    workdir.config.write_text(json.dumps(record))


# ---- What may change ---------------------------------------------------------------------------


def test_what_was_recorded_is_what_comes_back(recorded):
    assert files.plain(recorded.recorded()) == files.plain(settings.default())
    recorded.check(settings.default())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 7),
        ("seed", 1),
        ("schedule.peak", 1e-4),
        ("model.width", 16),
        ("data.speeds", (0.9, 1.0)),
        ("optimizer.b1", 0.8),
        ("init.folder", "/elsewhere"),
    ],
)
def test_another_value_is_refused_by_name(recorded, key, value):
    with pytest.raises(WorkdirError, match=rf"was trained with config\.{key}=.*, not ") as raised:
        recorded.check(changed(key, value))
    assert "\n" not in str(raised.value)


def test_another_name_is_named_before_what_comes_with_it(recorded):
    config = settings.default().unlock()
    config.optimizer = {"name": "sgd", "momentum": 0.9}
    with pytest.raises(WorkdirError, match=r"config\.optimizer\.name='adamw', not 'sgd'"):
        recorded.check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.root", "/elsewhere"),
        ("data.eval_splits", "other"),
        ("mesh.fsdp", 8),
        ("checkpoint.patience", 3),
        ("robustness.epsilons", (0.1,)),
        ("train.log_every", 1),
    ],
)
def test_where_things_are_and_how_fast_may_change(recorded, key, value):
    recorded.check(changed(key, value))


def test_what_may_change_is_a_setting():
    flat = files.plain(settings.default())
    for key in FREE:
        section = flat
        for part in key.split("."):
            section = section[part]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("features", "floor"),
        ("data", "train_minutes"),
        ("optimizer", "frozen"),
        ("model", "dropout"),
    ],
)
def test_a_setting_that_is_newer_than_the_record_has_its_default(recorded, section, key):
    edit(recorded, lambda record: record[section].pop(key))
    default = settings.default()[section][key]
    assert recorded.recorded()[section].get(key, default) == default
    if section != "model":  # an encoder's default is that of its constructor, not of its size
        recorded.check(settings.default())
    value = 0.25 if isinstance(default, float) else (("a", -1),)
    with pytest.raises(WorkdirError, match=rf"config\.{section}\.{key}="):
        recorded.check(changed(f"{section}.{key}", value))


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", "none", [], {}])
def test_a_setting_that_is_gone_and_was_off_is_not_missed(recorded, value):
    edit(recorded, lambda record: record["train"].update(gone=value))
    recorded.check(settings.default())
    assert "gone" not in recorded.recorded().train


@pytest.mark.parametrize("value", [True, 0.5, "fast", [1]])
def test_a_setting_that_is_gone_and_was_on_is_refused(recorded, value):
    edit(recorded, lambda record: record["train"].update(gone=value))
    with pytest.raises(WorkdirError, match=r"config\.train\.gone=.* unknown here: go on with the"):
        recorded.check(settings.default())


def test_a_record_of_before_is_read_under_todays_names(recorded):
    def before(record):
        record["model"]["features"] = record["model"].pop("width")
        record["task"]["name"] = "asr"
        record["text"]["normalizer"] = "librispeech"

    edit(recorded, before)
    recorded.check(changed("text.normalizer", "english"))
    found = recorded.recorded()
    assert found.text.normalizer == "english"
    assert (found.task.name, found.model.width) == ("recognize", settings.default().model.width)
    with pytest.raises(WorkdirError, match=r"config\.model\.width="):
        recorded.check(changed("model.width", 16))


def test_what_a_setting_was_goes_to_another_section():
    searched = {"name": "translate", "beam": 3, "length_penalty": 0.9}
    for decoder, wanted in (({"width": None}, (3, 0.9)), ({"width": 7}, (7, 0.9))):
        found = settings.completed({"task": searched, "decoder": decoder}, "a record")
        assert (found.decoder.width, found.decoder.length_penalty) == wanted
    assert searched["beam"] == 3
    assert settings.renamed({"task": 1, "decoder": []}) == {"task": 1, "decoder": []}


# ---- Damage ------------------------------------------------------------------------------------

DAMAGE = [b"", b"{", b"\xff\xfe", b"null", b"[1]", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize(
    "damage",
    [
        *DAMAGE,
        b'{"model": 1}',
        b'{"model": {"name": "none such"}}',
        b'{"task": {"name": "none such"}}',
        b'{"data": {"sample_rate": 7}}',
        b'{"model": {"name": "wav2vec2", "conv_kernels": [3]}}',
        b'{"model": {"name": "conformer", "subsampling": 40}}',
    ],
)
def test_a_damaged_record_of_a_trained_run_is_one_sentence(recorded, damage):
    (recorded.checkpoints / "4").mkdir(parents=True)
    recorded.config.write_bytes(damage)
    for use in (recorded.recorded, lambda: recorded.check(settings.default())):
        with pytest.raises(UserError, match=r"config\.json|--workdir") as raised:
            use()
        assert "\n" not in str(raised.value)
    assert recorded.config.read_bytes() == damage
    recorded.config.unlink()
    with pytest.raises(WorkdirError, match=r"holds checkpoints and no config\.json: bring it back"):
        recorded.check(settings.default())


def test_a_recorded_decoder_that_is_none_is_one_sentence(recorded):
    recorded.config.write_text('{"decoder": {"name": "/etc/passwd"}}')
    with pytest.raises(
        WorkdirError, match=r"config\.json: config\.decoder\.name='/etc/passwd' must"
    ):
        recorded.recorded()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_a_run_that_goes_on_are_set_aside(recorded, damage, caplog):
    names = ("config", "plan", "results")
    for name in names:
        getattr(recorded, name).write_bytes(damage)
    recorded.check(settings.default())  # which was never trained
    assert recorded.recorded_plan() is None
    assert recorded.write_results({"dev": {"wer": 0.1}}) == {"splits": {"dev": {"wer": 0.1}}}
    for name in names:
        assert (recorded.folder / f"{name}.json.damaged").read_bytes() == damage
        assert f"{name}.json.damaged and not used" in caplog.text


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"batches": [], "fingerprint": "a", "utterances": 1},
        {"batches": [{"rows": 0, "sizes": {}}], "fingerprint": "a", "utterances": 1},
        {"batches": [{"rows": 1, "sizes": [1]}], "fingerprint": "a", "utterances": 1},
        {"batches": 3, "fingerprint": "a", "utterances": 1},
        {"batches": [{"rows": float("inf"), "sizes": {}}], "fingerprint": "a", "utterances": 1},
    ],
)
def test_a_plan_that_is_none_is_set_aside(recorded, plan):
    recorded.plan.write_text(json.dumps(plan))
    assert recorded.recorded_plan() is None
    assert not recorded.plan.exists()


# ---- Plan and results --------------------------------------------------------------------------


def test_the_plan_is_that_of_the_first_start(workdir):
    assert workdir.recorded_plan() is None
    buckets = (Bucket(8, (("samples", 16_000), ("labels", 16))), Bucket(4, (("samples", 32_000),)))
    workdir.record_plan(iter(buckets), "abc", 48)
    workdir.record_plan(buckets[:1], "other", 7)
    assert workdir.recorded_plan() == (buckets, "abc", 48)


def test_results_are_merged(workdir):
    workdir.write_results({"dev": {"wer": 0.5}}, training={"steps": 2})
    found = workdir.write_results({"test": {"wer": 0.1}, "dev": {"wer": 0.4}})
    splits = {"dev": {"wer": 0.4}, "test": {"wer": 0.1}}
    assert found == {"splits": splits, "training": {"steps": 2}}
    assert json.loads(workdir.results.read_text()) == found


def test_what_cannot_be_written_is_one_sentence(workdir):
    workdir.folder.parent.joinpath("run").write_text("")  # a file in the place of the folder
    for use in (
        lambda: workdir.prepare([]),
        lambda: workdir.record(settings.default()),
        lambda: workdir.write_results({}),
        lambda: contextlib.ExitStack().enter_context(workdir.locked()),
    ):
        with pytest.raises(WorkdirError, match=r"cannot write .*run.* or use another --workdir"):
            use()


# ---- Names -------------------------------------------------------------------------------------

SPLITS = st.text(string.ascii_letters + "/\\.~%[]*? \0é漢\ud83d", min_size=1, max_size=300)


@given(SPLITS, SPLITS)
def test_every_split_has_a_file_of_its_own_in_predictions(one, other):
    folder = pathlib.Path("/work")
    paths = [Workdir(folder).predictions(split) for split in (one, other)]
    for path in paths:
        assert path.parent == folder / "predictions"
        assert not path.name.startswith((".", "~"))
        assert len(f".{path.name}.1234567".encode()) <= 255
    assert (paths[0] == paths[1]) == (one == other)


def test_plain_names_stay():
    for split in ("dev-clean", "test_é.2", "a b", "[x]"):
        assert Workdir("/work").predictions(split).name == f"{split}.jsonl"


@pytest.mark.parametrize("name", ["a b", "é", "[x]", "*", "a?b", "100%", "~x", "日本", "it's"])
def test_a_workdir_of_any_name(tmp_path, name):
    workdir = Workdir(tmp_path / name / "run")
    splits = ["dev", "/data/../dev.jsonl", "~/x", "a*[b]", "漢"]
    workdir.prepare(splits)
    workdir.record(settings.default())
    for split in splits:
        files.write_atomically(workdir.predictions(split), split)
    workdir.check(settings.default())
    assert {path.read_text("utf-8") for path in workdir.predictions("x").parent.iterdir()} == {
        *splits
    }
    assert [path.name for path in (tmp_path / name).iterdir()] == ["run"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Workdir("~/runs/x").folder == tmp_path / "runs" / "x"
    assert Workdir("runs").folder == tmp_path / "runs"
    with pytest.raises(UserError, match="no such home folder"):
        Workdir("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    "blocked",
    ["predictions/dev.jsonl", "results.json", "metrics.jsonl", "robustness.json", "config.json"],
)
def test_what_is_written_at_the_end_is_tried_at_the_start(workdir, blocked):
    (workdir.folder / blocked).mkdir(parents=True)
    with pytest.raises(WorkdirError, match=rf"cannot write .*{blocked} \(it is a folder\)"):
        workdir.prepare(["dev"])


@pytest.mark.parametrize("blocked", ["predictions", "checkpoints", "tensorboard"])
def test_folders_are_tried_too(workdir, blocked):
    workdir.folder.mkdir()
    (workdir.folder / blocked).write_text("")
    with pytest.raises(WorkdirError, match=rf"cannot write .*{blocked}"):
        workdir.prepare(["dev"])


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(WorkdirError, match="cannot write"):
        Workdir(tmp_path / name).prepare(["dev"])


def test_nothing_but_folders_is_left_by_trying(workdir):
    workdir.prepare(["dev"])
    assert [path for path in workdir.folder.rglob("*") if path.is_file()] == []


def test_a_start_that_failed_does_not_hold_the_workdir(workdir):
    workdir.prepare([])
    workdir.plan.write_text("{}")
    workdir.prepare([])
    assert not workdir.plan.exists()
    workdir.record(settings.default())
    workdir.plan.write_text("{}")
    workdir.prepare([])
    assert workdir.plan.exists()


def test_files_are_utf8_whatever_the_locale(tmp_path):
    code = (
        "from speech_jax.workdir import Workdir; from speech_jax import files\n"
        f"w = Workdir({str(tmp_path)!r}); w.prepare(['dev'])\n"
        "w.write_results({'dev': {'text': '\\u0414\\u0430'}}); w.write_results({'test': {}})\n"
    )
    env = runs.environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert "Да" in (tmp_path / "results.json").read_text("utf-8")


# ---- One run -----------------------------------------------------------------------------------


def hold(folder):
    """A run in the workdir that does nothing."""
    with Workdir(folder).locked():
        print("locked", flush=True)
        sys.stdin.read()


def test_one_run_at_a_time_by_a_lock_that_names_it_and_dies_with_it(workdir):
    command = [sys.executable, __file__, str(workdir.folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=runs.environment(), **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(WorkdirError) as raised, workdir.locked():
            pass
        assert f"is in use by process {process.pid} on " in str(raised.value)
        assert "\n" not in str(raised.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with workdir.locked():
            assert f"process {os.getpid()} on " in workdir.lock.read_text()
    with workdir.locked():
        pass


def test_a_lock_is_let_go_by_an_error(workdir):
    with pytest.raises(RuntimeError), workdir.locked():
        raise RuntimeError
    with workdir.locked():
        pass


if __name__ == "__main__":
    hold(sys.argv[1])
