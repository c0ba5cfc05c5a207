"""The walls hold: five tasks that speech_jax does not know, registered by a test (new_tasks.py),
and three that write, which it knows.

Each of them trains, goes on after it was told to leave and after a kill as if nothing had been,
evaluates, and opens as a bundle.
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import soundfile

import new_tasks
import runs
import speech_jax
from speech_jax import bundle, experiment, models, tasks, train
from speech_jax import config as defaults
from speech_jax.data import parts, sources
from speech_jax.data.batch import signature
from speech_jax.decoding import lm
from speech_jax.errors import UserError
from speech_jax.evaluators import tune
from speech_jax.evaluators.errors import ErrorCounts, count_errors
from speech_jax.evaluators.loop import Evaluation
from speech_jax.setup import Setup, make_setup
from speech_jax.training import checkpoint, sharding
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax

_OF_TAGS = {"target": {"tag": "speaker", "unseen": True}}
# Of each task: its settings that are not the defaults.
CASES: dict[str, dict[str, Any]] = {
    "spell": {"buckets": 2},
    "watch": {"source": "pictured", "parts": {**_OF_TAGS, "context": {"tag": "context"}}},
    "sort": {"parts": _OF_TAGS},
    "say": {"parts": {"target": {"tag": "translation"}}},
    "verify": {"parts": _OF_TAGS},
    "attend": {
        "task": {"layers": 1, "heads": 2},
        "model": {"width": 8, "num_layers": 1, "heads": 2, "subsampling_channels": 4},
        "peak": 1e-2,
        "decoder": {"name": "joint", "width": 2},
    },
    "transduce": {
        "task": {"width": 8, "span": 2, "warmup": 0},
        "model": {"width": 8, "num_layers": 1, "heads": 2, "subsampling_channels": 4},
        "peak": 1e-2,
        "decoder": {"name": "transducer"},
    },
    "translate": {
        "parts": {"target": {"tag": "translation"}},
        "task": {"layers": 1, "heads": 2},
        "model": {"width": 8, "num_layers": 1, "heads": 2, "subsampling_channels": 4},
        "peak": 1e-2,
        "decoder": {"width": 2},
    },
}
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The new tasks are in the tables, for this file alone."""
    tables = (tasks.TASKS, parts.PARTS, sources.SOURCES)
    before = [dict(table) for table in tables]
    new_tasks.register()
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture(scope="module")
def talks(tones, tmp_path_factory) -> pathlib.Path:
    """The tones as manifests with tags: each lacks a video, a context or a known speaker here and
    there, and is translated letter by letter."""
    root = tmp_path_factory.mktemp("talks")
    letters = str.maketrans("ABC ", "xyz-")
    for split, count in (("train", 32), ("dev", 6)):
        chapter = tones / split / "1" / "1"
        lines = []
        for line in (chapter / "1-1.trans.txt").read_text().splitlines()[:count]:
            name, _, text = line.partition(" ")
            number, path = int(name[-4:]), chapter / f"{name}.flac"
            row = {"audio_filepath": str(path), "id": name, "text": text}
            row |= {"speaker": f"s{number % 3}", "translation": text.translate(letters)}
            if number % 3:
                frames = round(12 * soundfile.info(path).duration)
                pixels = np.random.default_rng(number).integers(0, 256, (frames, 4), np.uint8)
                np.save(root / f"{split}-{number}.npy", pixels)
                row["video"] = f"{split}-{number}.npy"
            if number % 4:
                row["context"] = f"{text} again"
            if split == "dev" and number == 1:
                row["speaker"] = "a stranger"
            lines.append(json.dumps(row) + "\n")
        (root / f"{split}.jsonl").write_text("".join(lines))
    return root


def configure(name: str, root: pathlib.Path):
    """A run of a task on the talks."""
    config = defaults.default()
    config.data.root = str(root)
    config.data.cache = str(root / "cache")
    config.data.source = CASES[name].get("source", "manifest")
    config.data.train_splits, config.data.eval_splits = "train", "dev"
    config.data.on_error = "raise"
    config.data.batch_seconds, config.data.max_seconds = 6.0, 2.0
    config.data.buckets, config.data.eval_buckets = CASES[name].get("buckets", 1), 1
    config.task = tasks.settings(name, **CASES[name].get("task", {"width": 3}))
    config.model = models.settings("conformer", "tiny", **CASES[name].get("model", {}))
    config.parts = CASES[name].get("parts", {})
    config.decoder.update(CASES[name].get("decoder", {}))
    config.text.normalizer = "none"
    config.schedule = {"name": "constant", "peak": CASES[name].get("peak", 1e-1), "warmup": 1}
    config.train.update({"steps": STEPS, "eval_every": 3, "log_every": 1})
    config.checkpoint.every = 2
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


class Run(NamedTuple):
    """A run that was not interrupted."""

    name: str
    config: Any
    workdir: Workdir
    results: Mapping[str, Any]


@pytest.fixture(scope="module")
def trained(talks, tmp_path_factory) -> Callable[[str], Run]:
    """Gives the finished run of a task, which is made once."""

    @functools.cache
    def run(name: str) -> Run:
        config, workdir = configure(name, talks), Workdir(tmp_path_factory.mktemp(name))
        return Run(name, config, workdir, train.run(config, workdir))

    return run


@pytest.fixture(params=CASES)
def run(request, trained) -> Run:
    return trained(request.param)


class Built(NamedTuple):
    """What a run is made of."""

    corpus: Any
    plan: Any
    setup: Setup


def build(config, workdir: Workdir) -> Built:
    mesh = sharding.make_mesh(**config.mesh)
    source = experiment.open_training(config)
    made = experiment.restore_parts(config, workdir.folder)
    task = experiment.make_task(config, made)
    corpus = experiment.training_corpus(config, source, made, task)
    plan = experiment.training_plan(config, corpus, task, mesh)
    setup = make_setup(config, task, corpus.fields, mesh, plan.buckets[0])
    return Built(corpus, plan, setup)


def outcome(config, workdir: Workdir) -> dict[str, Any]:
    """All that a run leaves behind, apart from what the clock says."""
    with checkpoint.Checkpoints(workdir.checkpoints) as checkpoints:
        restored = checkpoints.restore(build(config, workdir).setup.abstract)
    state = [
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(restored.state)
    ]
    return {
        "step": restored.step,
        "state": [np.asarray(x).tobytes() for x in state],
        "stopper": restored.stopper,
        "metrics": runs.metrics(workdir.folder),
        "splits": json.loads(workdir.results.read_text())["splits"],
        "predictions": workdir.predictions("dev").read_text(),
    }


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- The same for all --------------------------------------------------------------------------


def test_it_trains_and_evaluates(run):
    task = tasks.constructor(run.name)
    found = run.results["splits"]["dev"]
    assert found["utterances"] == 6
    assert np.isfinite(found[task.best[0]])
    named = {line["id"] for line in lines(run.workdir.predictions("dev"))}
    assert named == {f"1-1-{number:04d}" for number in range(6)}
    logged = runs.metrics(run.workdir.folder)
    name = "loss" if "loss" in logged[0] else "loss_per_label"
    losses = [line[name] for line in logged if name in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert f"dev/{task.best[0]}" in logged[-1]
    assert train.evaluate(run.config, run.workdir)["splits"]["dev"] == found


def test_the_command_line_knows_it(run):
    defaults.check(run.config)
    assert run.workdir.recorded().task.to_dict() == run.config.task.to_dict()
    run.workdir.check(run.config)


class _Killed(BaseException):
    """Nobody catches it, as nobody does a kill."""


@pytest.mark.parametrize("end", ["told", "killed"])
def test_what_is_interrupted_ends_as_if_it_had_not_been(run, end, tmp_path, monkeypatch):
    if run.name == "translate" and end == "told":
        return  # a kill is harder, and each of its runs takes as long as all of the others'
    workdir, loaded = Workdir(tmp_path), experiment.training_batches

    def interrupted(*arguments):
        for number, batch in enumerate(loaded(*arguments)):
            if number == 3 and end == "killed":
                raise _Killed
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(experiment, "training_batches", interrupted)
    if end == "killed":
        with pytest.raises(_Killed):
            train.run(run.config, workdir)
    else:
        assert train.run(run.config, workdir) is None
    assert not workdir.results.exists()
    monkeypatch.setattr(experiment, "training_batches", loaded)
    assert train.run(run.config, workdir)["splits"] == run.results["splits"]
    assert outcome(run.config, workdir) == outcome(run.config, run.workdir)


def test_it_opens_as_a_bundle(run, tmp_path):
    trained = bundle.open(run.workdir.folder)
    bundle.save(trained, tmp_path / "model")
    saved = bundle.open(tmp_path / "model")
    assert jax.tree.structure(saved.params) == jax.tree.structure(trained.params)
    assert saved.config.to_dict() == trained.config.to_dict()
    mesh = sharding.make_mesh(**run.config.mesh)
    config = bundle.for_use(saved, run.config)
    evaluation = Evaluation(config, saved.task(), saved.parts, mesh)
    score = evaluation.run(*bundle.on_mesh(saved, mesh), "dev", tmp_path / "lines.jsonl")
    recorded = {k: v for k, v in run.results["splits"]["dev"].items() if k != "decoder"}
    assert score.results == recorded
    assert (tmp_path / "lines.jsonl").read_text() == run.workdir.predictions("dev").read_text()


def test_neighbours_and_padding_change_nothing(run):
    """Of a batch in pieces, and in one that is longer, the losses add up to the same."""
    trained = bundle.open(run.workdir.folder)
    task, corpus = trained.task(), build(run.config, run.workdir).corpus
    batch = _first(run.config, corpus, task)
    wide = dict(batch)
    for name, field in corpus.fields.items():
        if field.has_length:
            pads = [(0, 0), (0, 3)] + [(0, 0)] * (batch[name].ndim - 2)
            wide[name] = np.pad(batch[name], pads, constant_values=field.fill)
    assert signature(wide) != signature(batch)

    summed = jax.jit(lambda *arguments: task.loss(*arguments)[:2])

    def loss(rows):
        return np.asarray(summed(trained.params, trained.state, rows))

    whole = loss(batch)
    assert whole[1] > 0
    np.testing.assert_allclose(loss(wide), whole, rtol=1e-5)
    halves = [{k: v[start::2] for k, v in batch.items()} for start in (0, 1)]
    np.testing.assert_allclose(sum(map(loss, halves)), whole, rtol=1e-5)
    odd = (np.arange(len(batch["weight"])) % 2).astype(np.float32)
    without = batch | {"weight": odd * batch["weight"]}
    np.testing.assert_allclose(loss(without), loss(halves[1]), rtol=1e-5)


def _first(config, corpus, task) -> dict[str, np.ndarray]:
    plan = experiment.evaluation_plan(config, corpus, task, sharding.make_mesh(**config.mesh))
    batches = experiment.evaluation_batches(config, corpus, plan)
    try:
        return next(batches)
    finally:
        batches.close()


# ---- What each of them is about ----------------------------------------------------------------


def _batches(run: Run, count: int) -> list[dict[str, np.ndarray]]:
    """The first training batches of a run."""
    corpus, plan, _ = build(run.config, run.workdir)
    batches = experiment.training_batches(run.config, corpus, plan, 0)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def test_text_to_audio_has_its_batches_along_the_labels(trained):
    run = trained("spell")
    recorded = run.workdir.recorded_plan()
    sizes = [bucket.size("labels") for bucket in recorded.buckets]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 2
    corpus, plan, _ = build(run.config, run.workdir)
    short = [ids for bucket, ids, _ in plan.epoch(0) if bucket.size("labels") == sizes[0]]
    assert short
    assert corpus.lengths["labels"][np.concatenate(short)].max() <= sizes[0]
    # What is predicted is audio, as long as the text says.
    for line in lines(run.workdir.predictions("dev")):
        assert line["said"] == f"{32 * len(line['text']) / 16_000:.2f} s of audio"


def test_what_a_row_lacks_has_no_length(trained):
    run = trained("watch")
    source = experiment.open_training(run.config)
    lacking = {"video": 0, "context": 0}
    for batch in _batches(run, 4):
        for number, index in enumerate(batch["index"]):
            if index < 0:
                continue
            tags = source.utterances[index].tags
            for name in lacking:
                assert (batch[f"{name}_length"][number] > 0) == (name in tags)
                lacking[name] += name not in tags
            assert batch["audio_length"][number] > 0
    assert min(lacking.values()) > 2
    # Without them a prediction is that of silence and an empty screen: they are not left over.
    model = bundle.open(run.workdir.folder)
    batch = _batches(run, 1)[0]
    empty = batch | {"video_length": 0 * batch["video_length"]}
    noisy = empty | {
        "video": np.random.default_rng(0).integers(0, 256, batch["video"].shape, np.uint8)
    }
    task = model.task()
    loss = jax.jit(lambda *arguments: task.loss(*arguments)[0])
    one, two = (loss(model.params, model.state, rows) for rows in (empty, noisy))
    assert one == two


def test_classes_are_those_of_the_training_data(trained):
    run = trained("sort")
    assert bundle.open(run.workdir.folder).parts["target"].classes == ("s0", "s1", "s2")
    found = lines(run.workdir.predictions("dev"))
    said = {line["id"][-1]: line["is"] for line in found}
    assert said == {"0": "s0", "1": "", "2": "s2", "3": "s0", "4": "s1", "5": "s2"}
    right = sum(line["is"] == line["found"] for line in found)
    dev = run.results["splits"]["dev"]
    assert (dev["known"], dev["utterances"]) == (5, 6)
    assert dev["accuracy"] == right / 5


def test_two_texts_have_vocabularies_of_their_own(trained):
    run = trained("say")
    made = bundle.open(run.workdir.folder).parts
    assert set(made["labels"].tokenizer.alphabet) == set("ABC ")
    assert set(made["target"].tokenizer.alphabet) == set("xyz-")
    source = experiment.open_training(run.config)
    for batch in _batches(run, 2):
        for number, index in enumerate(batch["index"]):
            if index >= 0:
                row = {name: array[number] for name, array in batch.items()}
                utterance = source.utterances[index]
                assert made["labels"].read(row) == utterance.text
                assert made["target"].read(row) == utterance.tags["translation"]
    references = {line["reference"] for line in lines(run.workdir.predictions("dev"))}
    assert set("".join(references)) <= set("xyz-")


def test_an_evaluator_may_need_all_rows_at_once(trained):
    run = trained("verify")
    found = lines(run.workdir.predictions("dev"))
    rows = [(line["who"], np.asarray(line["embedding"])) for line in found]
    dev = run.results["splits"]["dev"]
    assert dev["pairs"] == 15
    assert dev["eer"] == new_tasks.equal_error_rate(rows)
    apart = [("a", np.zeros(1)), ("b", np.ones(1)), ("a", np.zeros(1)), ("b", np.ones(1))]
    assert new_tasks.equal_error_rate(apart) == 0
    assert new_tasks.equal_error_rate(apart[:2]) is None


@pytest.mark.parametrize("name", ["attend", "transduce"])
def test_what_a_task_finds_itself_is_transcribed(name, trained, tones):
    run = trained(name)
    by_task = speech_jax.load(run.workdir.folder)
    by_ctc = speech_jax.load(run.workdir.folder, decoder={"name": "greedy"})
    for line in lines(run.workdir.predictions("dev")):
        path = tones / "dev" / "1" / "1" / f"{line['id']}.flac"
        found = by_task.transcribe(path)
        assert found.text == line["hypothesis"]
        assert [word.text for word in found.words] == [word[0] for word in line["words"]]
        assert isinstance(by_ctc.transcribe(path).text, str)
    of_another = {"attend": "transducer", "transduce": "joint"}[name]
    with pytest.raises(UserError, match="a search of another kind of model"):
        speech_jax.load(run.workdir.folder, decoder={"name": of_another})


def test_a_transducer_is_tuned_with_a_language_model(trained, talks, tmp_path):
    run, said, arpa = trained("transduce"), [], tmp_path / "lm.arpa"
    workdir = Workdir(shutil.copytree(run.workdir.folder, tmp_path / "work"))
    (tmp_path / "text.txt").write_text("A B C\nC B\nB\nA C A\n")
    build = ["build", str(tmp_path / "text.txt"), str(arpa), "--order=3"]
    assert lm.main([*build, f"--model={workdir.folder}"]) == 0
    config = configure("transduce", talks)
    config.decoder.update({"name": "transducer_beam", "width": 3, "lm": str(arpa)})
    found = tune.run(config, workdir, said.append)
    assert found["name"] == "transducer_beam"
    assert {"width", "lm_weight", "bonus"} < found.keys()
    assert any(line.startswith("  transducer: WER") for line in said)
    # What was tuned is what evaluates: the errors of the half are those of its utterances.
    config.decoder.update({"name": None, "width": None, "lm": None})
    results = train.evaluate(config, workdir, lambda line: None)
    how = f"transducer_beam 3, lm {found['lm']} weight {found['lm_weight']:g}"
    assert results["splits"]["dev"]["decoder"].startswith(how)
    half = sorted(lines(workdir.predictions("dev")), key=lambda line: line["id"])[1::2]
    counts = sum(
        (count_errors(line["reference"], line["hypothesis"]) for line in half), ErrorCounts()
    )
    assert f"  tuned: WER {100 * counts.wer:.2f}%  CER {100 * counts.cer:.2f}%" in "\n".join(said)


def test_what_has_no_weights_to_be_tuned_is_refused(trained, talks):
    with pytest.raises(UserError, match=r"decoder\.name='joint' is neither: set it to one of gre"):
        tune.run(configure("attend", talks), trained("attend").workdir)


# ---- A process that is killed ------------------------------------------------------------------

RECIPE = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
import new_tasks, test_walls
new_tasks.register()
logged = []
figures = new_tasks.Spell.figures
def killed(self, sums):
    logged.append(sums)
    if len(logged) == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
    return figures(self, sums)
new_tasks.Spell.figures = killed
def get_config():
    return test_walls.configure("spell", pathlib.Path({root!r}))
"""


def test_a_command_that_was_killed_goes_on(trained, talks, tmp_path):
    run, recipe, workdir = trained("spell"), tmp_path / "recipe.py", Workdir(tmp_path / "work")
    command = [sys.executable, "-m", "speech_jax.main", f"--config={recipe}"]
    for last, code in ((4, -signal.SIGKILL), (0, 0)):
        content = RECIPE.format(tests=str(runs.ROOT / "tests"), root=str(talks), last=last)
        recipe.write_text(content)
        done = runs.run([*command, f"--workdir={workdir.folder}"], devices=8, check=False)
        assert done.returncode == code, done.stderr[-3000:]
    assert outcome(run.config, workdir) == outcome(run.config, run.workdir)
