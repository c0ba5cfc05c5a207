"""The command: help that teaches, and one clear line for what a person got wrong."""

import sys
import types

import pytest

import runs
from speech_jax import main


def test_help_teaches():
    done = runs.run([sys.executable, "-m", "speech_jax.main", "--help"], check=False)
    for phrase in (
        "configs/quickstart.py",
        "--workdir",
        "--mode",
        "results.json",
        "--config.train",
    ):
        assert phrase in done.stdout, phrase


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.steps=ten"], "error: --config.train.steps=ten must be a whole number\n"),
        (["--config.data.arguments.x=3"], "'librispeech': unknown key 'x'; known: download"),
        (["train"], "did you mean --train?"),
        (["--mode=test"], "train"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_clear_line(tones, tmp_path, flags, message):
    done = runs.run([*runs.command(tmp_path, tones), *flags], check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "config.json").exists()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_one_line(tones, tmp_path, platform):
    done = runs.run(runs.command(tmp_path, tones), check=False, JAX_PLATFORMS=platform)
    if done.returncode == 0:
        pytest.skip(f"this machine has {platform}")
    assert f"error: there is no device of JAX_PLATFORMS={platform} (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("evaluate", {}, "work is no folder"),
        ("robustness", {}, "work is no folder"),
        ("train", {"data.root": "/no/such/folder"}, "/no/such/folder"),
        ("train", {"data.train_splits": "trian"}, "train"),
        ("train", {"mesh.fsdp": 3, "mesh.data": 1}, "does not fit 8 devices"),
        ("train", {"model.heads": 5}, "5 heads"),
        ("train", {"optimizer.frozen": (("encoder", 1),)}, "name what to start from"),
    ],
)
def test_what_a_run_cannot_do_is_one_clear_line(
    tones, tmp_path, monkeypatch, capsys, mode, settings, message
):
    config = runs.tiny_config(tones)
    config.update_from_flattened_dict(settings)
    for name, value in (("CONFIG", config), ("MODE", mode), ("WORKDIR", str(tmp_path / "work"))):
        monkeypatch.setattr(main, f"_{name}", types.SimpleNamespace(value=value))
    monkeypatch.setattr(main, "_keep_memory", lambda: None)  # it is for the whole process
    with pytest.raises(SystemExit) as left:
        main.main(["main"])
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "work" / "config.json").exists()
