"""The command: help that teaches, and one clear line for what a person got wrong."""

import sys

import pytest

import runs


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
        (["--mode=test"], "train"),
        (["train"], "did you mean --train?"),
        (["--mode=evaluate"], "work is no folder"),
        (["--config.data.root=/no/such/folder"], "/no/such/folder"),
        (["--config.data.train_splits=trian"], "train"),
        (["--config.mesh.fsdp=3", "--config.mesh.data=1"], "does not fit 1 devices"),
        (["--config.model.heads=5"], "5 heads"),
        (["--config.optimizer.frozen=(('encoder', 1),)"], "name what to start from"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_clear_line(tones, tmp_path, flags, message):
    done = runs.run([*runs.command(tmp_path, tones), *flags], check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "config.json").exists()
