"""Tuning a decoder, evaluating with what was found, and taking it along."""

import json
import shutil

import pytest

import test_evaluate
from speech_jax import bundle, train
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.decoding import lm
from speech_jax.decoding.decoder import Decoder
from speech_jax.errors import UserError
from speech_jax.evaluators import tune
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax


@pytest.fixture(scope="module")
def tuned(finished, tones, tmp_path_factory):
    """A tuned copy of the finished run's workdir, what was said, and the language model's file."""
    folder = tmp_path_factory.mktemp("tuned")
    workdir = Workdir(shutil.copytree(finished.workdir.folder, folder / "work"))
    text, arpa = folder / "text.txt", folder / "lm.arpa"
    text.write_text("A B C\nC B\nB\nA C A\n")
    assert lm.main(["build", str(text), str(arpa), "--order=3", f"--model={workdir.folder}"]) == 0
    settings = test_evaluate.use(tones)
    settings.decoder.update({"name": "beam", "lm": str(arpa), "width": 4})
    said = []
    return workdir, tune.run(settings, workdir, said.append), said, arpa


def test_what_is_found_is_used(tuned, finished, tones):
    workdir, found, said, arpa = tuned
    assert found["lm"] == "decoder-lm.arpa"
    assert (workdir.folder / found["lm"]).read_bytes() == arpa.read_bytes()
    assert {"lm_weight", "bonus", "calibration"} < found.keys()
    assert any("the half that was not tuned on, 3 utterances" in line for line in said)
    assert json.loads(workdir.decoder.read_text()) == found
    said = []
    results = train.evaluate(test_evaluate.use(tones), workdir, said.append)
    how = f"beam 4, lm decoder-lm.arpa weight {found['lm_weight']:g} bonus {found['bonus']:g}"
    assert f"decoder: {how}" in said
    assert results["splits"]["dev"]["decoder"] == how
    assert how in workdir.report.read_text()
    assert results["decoder"] == found | {"lm": str(workdir.folder / found["lm"])}
    assert results["splits"]["dev"]["wer"] <= finished.results["splits"]["dev"]["wer"]
    lines = map(json.loads, workdir.predictions("dev").read_text().splitlines())
    for line in lines:
        assert [word for word, *_ in line["words"]] == line["hypothesis"].split()
        assert all(0 <= start <= end < 3 for _, start, end, _ in line["words"])
        assert all(0 <= sure <= 1 for *_, sure in line["words"])
        assert line["score"] < 0
    assert bundle.open(workdir.folder).task().decoder.settings.width == 4


def test_what_is_not_used_is_not_told(tuned, tones):
    settings = test_evaluate.use(tones)
    settings.decoder.name = "greedy"
    said = []
    results = train.evaluate(settings, tuned[0], said.append)
    assert "decoder: greedy" in said
    assert results["decoder"].keys() == {"name", "calibration"}


def test_a_workdir_that_is_copied_has_its_language_model(tuned, tones, tmp_path):
    workdir = Workdir(shutil.copytree(tuned[0].folder, tmp_path / "copy"))
    settings = bundle.open(workdir.folder).task().decoder.settings
    assert settings.lm == str(workdir.folder / "decoder-lm.arpa")
    (workdir.folder / "decoder-lm.arpa").unlink()
    with pytest.raises(UserError, match=r"copy/decoder-lm\.arpa' is no file: bring it back"):
        train.evaluate(test_evaluate.use(tones), workdir)
    config = test_evaluate.use(tones)
    config.decoder.name = "greedy"  # which the message names as another cure
    train.evaluate(config, workdir, lambda line: None)


def test_a_calibration_needs_words_that_are_wrong(monkeypatch):
    decoder = Decoder({"calibration": (0.7, -0.2)}, Transcript(CharacterTokenizer(" A")), 0.04)
    judged = lambda wrong: ([0.9] * 200, [True] * (200 - wrong) + [False] * wrong)
    said = []
    for wrong, kept in ((0, True), (9, True), (10, False)):
        monkeypatch.setattr(tune, "_judged", lambda *_, wrong=wrong: judged(wrong))
        found = tune._calibrated(tune._Search(decoder, None), [], said.append)
        assert (found.decoder is decoder) == kept
    assert len(said) == 2
    assert "191 words are right and 9 wrong" in said[1]
    assert "stays as it was, (0.7, -0.2)" in said[1]


def test_a_saved_model_has_its_language_model_in_it(tuned, tmp_path):
    workdir, found, _, arpa = tuned
    bundle.save(bundle.open(workdir.folder), tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    settings = bundle.open(moved).task().decoder.settings
    assert settings.lm == str(moved / "decoder-lm.arpa")
    assert (moved / "decoder-lm.arpa").read_bytes() == arpa.read_bytes()
    assert settings.lm_weight == found["lm_weight"]


def test_what_cannot_be_tuned_is_named(tuned, finished, tones):
    settings = test_evaluate.use(tones)
    settings.data.eval_splits = ""
    with pytest.raises(UserError, match=r"name one in config\.data\.eval_splits"):
        tune.run(settings, tuned[0])
    settings = test_evaluate.use(tones)
    settings.decoder.update({"name": "beam", "lm": "gone.arpa"})
    with pytest.raises(UserError, match=r"config\.decoder\.lm='gone\.arpa' is no file"):
        tune.run(settings, finished.workdir)
