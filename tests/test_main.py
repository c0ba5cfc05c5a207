"""The command: help that teaches, and one clear line for what a person got wrong."""

import re
import sys
import types

import pytest
from absl import flags
from ml_collections import config_flags

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
    ("wrong", "message"),
    [
        (["--config.train.steps=ten"], "error: --config.train.steps=ten must be a whole number\n"),
        (["--config.data.arguments.x=3"], "'librispeech': unknown key 'x'; known: download"),
        (["train"], "did you mean --train?"),
        (["--mode=test", "--config.data.root=x"], "error: flag --mode=test: value should be one"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_clear_line(tones, tmp_path, wrong, message):
    done = runs.run([*runs.command(tmp_path, tones), *wrong], check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "config.json").exists()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no such recipe \(did you mean .*recipe1\.py\?\)"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(size):\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def get_config(size):\n    return {}[size]", "line 2: KeyError: 'tiny'"),
        ("def get_config(size):\n    return int(size)", "line 2: ValueError: invalid literal"),
        ("def get_config(size):\n    return open(size)", "line 2: FileNotFoundError"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config(size): pass", "must return a ConfigDict"),
    ],
)
def test_a_recipe_that_is_none_is_named_on_one_line(text, message, tmp_path):
    recipe = tmp_path / "recipe.py"
    (tmp_path / "recipe1.py").write_text("")
    if text is not None:
        recipe.write_text(text)
    argv, values = ["main", f"--config={recipe}:tiny"], flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values["config"].parser = main.Recipe("config")
    with pytest.raises((flags.Error, *main.NOT_A_VALUE)) as raised:
        values(argv)
    said = main.said(raised.value, argv)
    assert re.search(message, said)
    assert str(recipe) in said
    assert "\n" not in said


def test_a_flag_that_the_record_overrules_is_named(finished):
    config = finished.config.copy_and_resolve_references()
    config.model.width, config.data.root, config.train.steps = 64, "elsewhere", 120
    argv = [
        "main", "--mode=evaluate", "--config.model.width=64", "--config.data.root=elsewhere",
        "--config.train.steps=120", "--config.decoder.name=beam",
    ]  # fmt: skip
    (line,) = main._unheeded(config, finished.workdir, argv)
    assert line.startswith("--config.model.width=64 is ignored: the model was trained with 16")


@pytest.mark.parametrize(("name", "lines"), [("greedy", 1), ("beam", 0)])
def test_a_flag_of_another_decoder_is_named(finished, name, lines):
    config = finished.config.copy_and_resolve_references()
    config.decoder.update({"name": name, "width": 8})
    flags = ["--config.decoder.width=8", "--config.decoder.lm="]
    said = [*main._unheeded(config, finished.workdir, flags)]
    ignored = "is ignored: config.decoder.name='greedy' does not use it"
    assert said == [f"{flag} {ignored}" for flag in flags][: 2 * lines]


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
        ("evaluate", {}, "work does not exist"),
        ("robustness", {}, "work does not exist"),
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
    monkeypatch.setattr(main, "keep_memory", lambda: None)  # it is for the whole process
    with pytest.raises(SystemExit) as left:
        main.main(["main"])
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "work" / "config.json").exists()
