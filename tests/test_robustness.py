"""Robustness curves of a model that was trained, from its workdir to the plot."""

import json
import os

import jax
import numpy as np
import pytest

import runs
from speech_jax import train
from speech_jax.errors import UserError
from speech_jax.evaluators import robustness
from speech_jax.training import sharding
from speech_jax.workdir import Workdir
from test_adversarial import make_batch, make_task, start


def make_config(root):
    """Tones, learned against perturbations."""
    config = runs.tiny_config(root, steps=12, eval_every=6)
    config.adversarial.method = "fgsm"
    config.robustness.epsilons = (0.0002, 0.2)
    config.robustness.noise_snr_db = (60.0, -30.0)
    return config


@pytest.fixture(scope="module")
def hardened(tones, tmp_path_factory) -> runs.Finished:
    config, workdir = make_config(tones), Workdir(tmp_path_factory.mktemp("hardened"))
    return runs.Finished(config, workdir, train.run(config, workdir))


def test_a_hardened_run_is_measured_and_drawn(hardened):
    config, workdir, results = hardened
    lines = [json.loads(line) for line in workdir.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss_per_label" in line] == list(range(2, 13, 2))
    assert lines[-1]["step"] == 12

    curves = robustness.run(config, workdir, lambda line: None)["dev"]
    assert json.loads(workdir.robustness.read_text())["dev"] == curves
    assert (workdir.folder / "robustness.png").read_bytes().startswith(b"\x89PNG")
    scores = {"wer", "cer", "words", "utterances", "insertions", "deletions", "substitutions"}
    assert set(curves["clean"]) == scores | {"left_out"}
    assert (curves["clean"]["utterances"], curves["clean"]["left_out"]) == (6, 0)
    # What is measured without a perturbation is what evaluation measures.
    assert curves["clean"]["wer"] == results["splits"]["dev"]["wer"]
    for name, key, levels in (
        ("fgsm", "epsilon", [0.0002, 0.2]),
        ("pgd10", "epsilon", [0.0002, 0.2]),
        ("noise", "snr_db", [60.0, -30.0]),
    ):
        assert [point[key] for point in curves[name]] == levels
        assert {point["utterances"] for point in curves[name]} == {6}
    assert curves["pgd10"][1]["wer"] >= curves["clean"]["wer"]


def test_it_is_alone_in_the_workdir_and_can_write_there(hardened, monkeypatch):
    """And it leaves after the batch in which it is asked to, as other modes do."""
    config, workdir = hardened.config.copy_and_resolve_references(), hardened.workdir
    workdir.robustness.unlink(missing_ok=True)
    config.robustness.epsilons, config.robustness.noise_snr_db = (), ()
    measure = lambda: robustness.run(config, workdir, lambda line: None)
    with workdir.locked(), pytest.raises(UserError, match="is in use by process"):
        measure()
    workdir.robustness.mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        measure()
    workdir.robustness.rmdir()
    monkeypatch.setattr(robustness, "by_utterance", lambda *_: os.kill(os.getpid(), 15) or [])
    with pytest.raises(UserError, match="interrupted: nothing was written"):
        measure()
    assert not workdir.robustness.exists()


def test_attacks_of_all_strengths_share_one_program():
    """And nothing at all changes nothing."""
    task, batch, (params, state) = make_task(), jax.device_get(make_batch()), start()
    recognize = robustness.make_recognizer(
        task, sharding.make_mesh(), space="waveform", norm="linf"
    )
    compiled = []

    def listen(event, _, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        clean, index = jax.device_get(recognize(params, state, batch, 0.0, 0, 0.0, False))
        programs = len(compiled)
        for attack in robustness.ATTACKS.values():
            found, _ = recognize(params, state, batch, 0.05, *attack)
            assert (np.asarray(found["labels"]) != clean["labels"]).any()
        assert len(compiled) == programs > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    plain = jax.jit(task.predict)(params, state, batch)
    np.testing.assert_array_equal(clean["labels"], plain["labels"])
    np.testing.assert_array_equal(index, batch["index"])


def test_noise_is_mixed_at_the_ratio_that_was_asked_for():
    rng = np.random.default_rng(0)
    batch = {
        "audio": np.zeros((3, 5000), np.int16),
        "audio_length": np.asarray([5000, 4000, 0], np.int32),
        "index": np.asarray([4, 9, -1], np.int32),
    }
    for row, length in enumerate(batch["audio_length"]):
        batch["audio"][row, :length] = 1000 * rng.standard_normal(length)
    noises = [(500 * rng.standard_normal(8000)).astype(np.int16) for _ in range(2)]
    mixed = [robustness._with_noise(batch, noises, 5.0, turn)["audio"] for turn in (0, 1)]
    added = mixed[0].astype(float) - batch["audio"]
    assert not added[1, 4000:].any()
    assert not mixed[0][2].any()
    for row in (0, 1):
        power = np.square(batch["audio"][row].astype(float)).sum() / np.square(added[row]).sum()
        assert 10 * np.log10(power) == pytest.approx(5.0, abs=0.1)
    assert (mixed[0] != mixed[1]).any()
    again = robustness._with_noise(batch, noises, 5.0, 0)["audio"]
    np.testing.assert_array_equal(again, mixed[0])


def test_what_cannot_be_measured_is_named(hardened, tones, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        robustness.run(make_config(tmp_path), Workdir(tmp_path))
    audio = tones / "dev" / "1" / "1" / "1-1-0000.flac"
    (tmp_path / "dev.jsonl").write_text(json.dumps({"audio_filepath": str(audio), "text": ""}))
    config = make_config(tmp_path)
    config.data.source = "manifest"
    config.robustness.epsilons, config.robustness.noise_snr_db = (), ()
    with pytest.raises(UserError, match="dev: there is no word"):
        robustness.run(config, hardened.workdir, lambda line: None)


def test_translations_are_shown_by_bleu(tmp_path):
    point = lambda bleu: {"bleu": bleu, "wer": 0.5}
    curves = {"clean": point(30.0), "noise": [{"snr_db": 5.0, **point(20.0)}]} | {
        name: [{"epsilon": 0.001, **point(10.0)}] for name in robustness.ATTACKS
    }
    lines = [*robustness._table("dev", curves)]
    assert lines[0] == "dev: clean BLEU 30.00"
    assert lines[-1] == "dev: noise BLEU  5 dB 20.0"
    robustness.plot({"one": {"dev": curves}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
