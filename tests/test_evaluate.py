"""Evaluation of what was trained: its own settings, all of a split, and never waiting."""

import json
import shutil
import threading
import types

import jax
import numpy as np
import pytest

import runs
import test_config
from configs import verification
from speech_jax import bundle, config, train
from speech_jax.data import sources
from speech_jax.errors import UserError
from speech_jax.evaluators import loop
from speech_jax.evaluators.loop import Evaluation
from speech_jax.training import checkpoint, sharding
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax


@pytest.fixture
def copied(finished, tmp_path) -> Workdir:
    """A copy of the finished run's workdir, to write results into."""
    return Workdir(shutil.copytree(finished.workdir.folder, tmp_path / "work"))


def use(root, **mesh):
    """Settings to evaluate with: the defaults, but for where the data is."""
    settings = config.default()
    settings.data.root, settings.data.cache = str(root), str(root.parent / "cache")
    settings.data.eval_splits = "dev"
    settings.data.eval_buckets = 1
    settings.mesh.update(mesh)
    return settings


def strict(path):
    """The JSON in a file, in which NaN and Infinity are no numbers."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- The record decides ------------------------------------------------------------------------


def test_the_record_says_what_the_model_is(finished, copied, tones):
    """Whatever is asked for: only the data and the devices are the command's."""
    before = finished.results
    settings = use(tones, fsdp=8, data=1)
    settings.data.sample_rate = 8_000
    settings.train.ema_decay = 0.0
    settings.features.mels = 80
    settings.text.normalizer = "lower"
    said = []
    results = train.evaluate(settings, copied, said.append)
    assert results["splits"]["dev"] == before["splits"]["dev"]
    assert results["training"] == before["training"]
    assert results == strict(copied.results)
    line = f"dev: {_line(before['splits']['dev'])}  (6 utterances)"
    assert said == ["decoder: greedy", line, f"report: {copied.report}"]
    assert copied.report.read_text("utf-8").count("<audio") <= 6
    lines = [json.loads(line) for line in copied.predictions("dev").read_text().splitlines()]
    assert all(line["reference"] == line["reference"].upper() for line in lines)


@pytest.mark.parametrize("name", test_config.RECIPES)
def test_any_recipe_will_do(name, finished, copied, tones):
    settings = test_config.resolve(name)
    with settings.unlocked():
        settings.data = use(tones).data
        settings.mesh.update({"data": 1, "fsdp": 8})
    if (settings.task.name, settings.model.name) != ("recognize", "conformer"):
        with pytest.raises(UserError, match="name the recipe that it was trained with"):
            train.evaluate(settings, copied, lambda line: None)
        return
    results = train.evaluate(settings, copied, lambda line: None)
    assert results["splits"]["dev"] == finished.results["splits"]["dev"]


def _line(found) -> str:
    return f"WER {100 * found['wer']:.2f}%  CER {100 * found['cer']:.2f}%"


def test_a_split_is_added_and_batches_change_nothing(finished, copied, tones):
    """On another mesh, in other batches."""
    copied.results.unlink()
    settings = use(tones, fsdp=1, data=8)
    settings.data.eval_splits = "dev,train"
    settings.data.batch_seconds = 40.0
    assert train.evaluate(settings, copied)["splits"] == finished.results["splits"]


def test_averaged_weights_are_those_that_are_evaluated(finished):
    found = checkpoint.load_best(finished.workdir.checkpoints, ("params", "ema"))
    model = bundle.open(finished.workdir.folder)
    kernel = model.params["head"]["kernel"]
    np.testing.assert_array_equal(kernel, found["ema/head/kernel"])
    assert (kernel != found["params/head/kernel"]).any()


def test_what_is_no_workdir_is_one_sentence(tones, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        train.evaluate(use(tones), Workdir(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        train.evaluate(use(tones), Workdir(tmp_path / "nowhere"))


# ---- How much of a split -----------------------------------------------------------------------


def test_results_say_how_many_of_a_split_they_are_of(copied, tones, tmp_path, caplog):
    shutil.copytree(tones / "dev", tmp_path / "data" / "dev")
    chapter = tmp_path / "data" / "dev" / "1" / "1"
    (chapter / "1-1-0000.flac").write_bytes(b"fLaC, but not really")
    whole = (chapter / "1-1-0003.flac").read_bytes()
    (chapter / "1-1-0003.flac").write_bytes(whole[: len(whole) // 2])
    said = []
    results = train.evaluate(use(tmp_path / "data", fsdp=8, data=1), copied, said.append)
    found = results["splits"]["dev"]
    assert (found["utterances"], found["left_out"]) == (4, 2)
    assert said[1] == f"dev: {_line(found)}  (4 of 6 utterances)"
    assert "2 of 6 utterances are not in the score" in caplog.text
    assert "1-1-0000" in caplog.text
    assert "1-1-0003" in caplog.text
    page = copied.report.read_text("utf-8")
    assert "4 of 6 utterances were heard" in page
    assert "1-1-0003" in page


def test_nothing_to_read_is_an_error(copied, tones, tmp_path):
    shutil.copytree(tones / "dev", tmp_path / "data" / "dev")
    for path in (tmp_path / "data").rglob("*.flac"):
        path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(UserError, match="dev: no utterance could be read"):
        train.evaluate(use(tmp_path / "data", fsdp=8, data=1), copied)


def test_a_split_without_a_word_has_no_error_rate_and_picks_no_model(tones, tmp_path):
    """The newest is then the best, and the patience counts."""
    for split in ("train", "dev"):
        source = sources.open_source("librispeech", root=tones, split=split)
        rows = [
            {
                "audio_filepath": str(source.open(index)),
                "text": one.text if split == "train" else "",
                "id": one.id,
            }
            for index, one in enumerate(source.utterances)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    settings, workdir = runs.tiny_config(tones), Workdir(tmp_path / "work")
    settings.data.source, settings.data.root = "manifest", str(tmp_path)
    train.run(settings, workdir)
    found = strict(workdir.results)["splits"]["dev"]
    assert found["wer"] is found["cer"] is None
    assert (found["words"], found["utterances"]) == (0, 6)
    stopper = runs.record(workdir, 6)["stopper"]
    assert (stopper["best"], stopper["count"]) == (None, 2)
    assert runs.record(workdir, 6)["metrics"] == {"wer": None, "cer": None}
    newest, best = runs.saved_state(workdir, 6), bundle.open(workdir.folder).params
    np.testing.assert_array_equal(best["head"]["bias"], newest["params/head/bias"])
    for line in workdir.metrics.read_text().splitlines():
        assert json.loads(line).get("dev/wer") is None


def test_the_pairs_that_are_compared_are_those_that_are_asked_for():
    model = bundle.Bundle(verification.get_config(), {}, {}, {})
    asked = verification.get_config()
    asked.task.update({"trials": "pairs.txt", "units": 8})
    used = bundle.for_use(model, asked)
    assert (used.task.trials, used.task.units) == ("pairs.txt", 192)
    assert bundle.of_use("task.trials", "classify")
    assert not bundle.of_use("task.units", "classify")


# ---- Never waiting -----------------------------------------------------------------------------


def test_the_next_batch_is_dispatched_before_the_last_one_is_read(finished, tones, monkeypatch):
    """No prediction is read by the thread that dispatches, however long reading takes."""
    model = bundle.open(finished.workdir.folder)
    settings = use(tones, fsdp=8, data=1)
    settings.data.batch_seconds = 8.0
    mesh = sharding.make_mesh(**settings.mesh)
    evaluation = Evaluation(bundle.for_use(model, settings), model.task(), model.parts, mesh)
    dispatched: list[threading.Event] = [threading.Event() for _ in range(6)]
    reads, dispatches, fetched = [], [], []
    predict, read = evaluation._predict, loop._Reader.read
    numpy = types.SimpleNamespace(**{name: getattr(np, name) for name in dir(np)})

    def counted(*arguments):
        found = predict(*arguments)
        dispatched[len(dispatches)].set()
        dispatches.append(threading.get_ident())
        return found

    def late(self, *arguments):
        """Reads a batch only when the next one is on its way."""
        following = len(reads) + 1
        reads.append(threading.get_ident())
        assert following == 6 or dispatched[following].wait(60), "it waits to be read"
        return read(self, *arguments)

    def asarray(value, *arguments):
        if isinstance(value, jax.Array):
            fetched.append(threading.get_ident())
        return np.asarray(value, *arguments)

    def device_get(value):
        raise AssertionError("the loop reads what it has dispatched")

    numpy.asarray = numpy.array = asarray
    monkeypatch.setattr(evaluation, "_predict", counted)
    monkeypatch.setattr(loop._Reader, "read", late)
    monkeypatch.setattr(loop, "np", numpy)
    monkeypatch.setattr(jax, "device_get", device_get)
    score = evaluation.run(*bundle.on_mesh(model, mesh), "train")
    assert score.results | {"decoder": "greedy"} == finished.results["splits"]["train"]
    assert (len(dispatches), len(reads)) == (6, 6)
    assert set(dispatches) == {threading.get_ident()}
    assert len(set(reads)) == 1
    assert len(fetched) >= 12
    assert set(fetched) == set(reads)
    assert set(reads).isdisjoint(dispatches)


def test_an_error_on_the_first_of_several_processes_waits_for_all(monkeypatch):
    """The others are in the batches still; where there is one process alone, it ends at once."""
    corpus = types.SimpleNamespace(source=types.SimpleNamespace(utterances=("a", "b")))
    batch, found = {"index": np.arange(2)}, {"x": jax.numpy.arange(2)}
    seen = []

    def add(utterance, example, row):
        seen.append(utterance)
        raise UserError(f"{utterance} has no tag")

    with pytest.raises(UserError, match="a has no tag"):
        loop._Reader(corpus, add).read(batch, found, {})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    reader = loop._Reader(corpus, add)
    reader.read(batch, found, {})
    reader.read(batch, found, {})
    assert seen == ["a", "a"]
    with pytest.raises(UserError, match="a has no tag"):
        reader.check()
