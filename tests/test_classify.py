"""Classes of utterances: the head is what is written of it, and a run finds what it can hear."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import soundfile

import runs
import speech_jax
from speech_jax import bundle, classify, experiment, files, gain, models, tasks, train, transcribe
from speech_jax.bundle import start
from speech_jax.config import default
from speech_jax.data.parts.audio import Audio
from speech_jax.deploy import export
from speech_jax.errors import UserError
from speech_jax.experiment import make_frontend
from speech_jax.ops import augment
from speech_jax.tasks.classify import Classify
from speech_jax.training import groups
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax
CLASSES = 4


def make(**settings):
    """A small task of four classes, its random parameters, and a batch of three rows."""
    config = default()
    config.features.mels = 8
    config.spec_augment.update({"time_masks": 0, "frequency_masks": 0})
    config.model = models.settings(
        "conformer", "tiny", width=8, num_layers=2, heads=2, kernel=3, subsampling_channels=2
    )
    encoder = models.make_encoder(**config.model)
    frontend = make_frontend(config, encoder, {"audio": Audio()})
    known = {"counts": {"target": CLASSES}, "examples": {"target": (1, 2, 3, 6)}}
    task = Classify(encoder=encoder, frontend=frontend, **known, **settings)
    rng = np.random.default_rng(0)
    batch = {
        "audio": jnp.asarray(rng.normal(0, 3000, (3, 8_000)), jnp.int16),
        "audio_length": jnp.array([8_000, 5_000, 6_500]),
        "target": jnp.array([2, 0, 3]),
        "weight": jnp.array([1.0, 1.0, 1.0]),
        "index": jnp.array([0, 1, 2]),
    }
    params, state = jax.jit(task.init)(jax.random.key(0), batch)
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(p.dtype), params)
    return task, params, state, batch


def hidden_of(task, params, batch):
    inputs, lengths = task.frontend(batch)
    hidden, lengths = task.encoder.apply({"params": params["encoder"]}, inputs, lengths, True)
    return np.asarray(hidden, np.float64), np.asarray(lengths)


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_the_head_is_what_it_says(pooling):
    task, params, state, batch = make(pooling=pooling, units=6, dropout=0.5)
    hidden, lengths = hidden_of(task, params, batch)
    rows = []
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    for row, length in zip(hidden, lengths, strict=True):
        frames = row[:length]
        weights = np.full((length, 1), 1 / length)
        if pooling == "attentive":
            scores = dense("attention_score", np.tanh(dense("attention_units", frames)))
            weights = scipy.special.softmax(scores, axis=0)
        mean = (weights * frames).sum(0)
        spread = np.sqrt((weights * (frames - mean) ** 2).sum(0) + 1e-5)
        pooled = mean if pooling == "mean" else np.concatenate([mean, spread])
        rows.append(dense("classifier", np.maximum(dense("projector", pooled), 0)))
    expected = scipy.special.softmax(np.stack(rows), axis=-1)
    found = jax.jit(task.predict)(params, state, batch)
    np.testing.assert_allclose(found["probabilities"], expected, atol=2e-5)
    assert found["target"].tolist() == expected.argmax(-1).tolist()


def test_the_loss_of_mixed_speech_is_that_of_both_classes():
    plain, params, state, batch = make(smoothing=0.1, balance=1.0)
    mixing = dataclasses.replace(plain, mixup=1.0)
    found = jax.jit(mixing.loss)(params, state, batch, jax.random.key(3))
    rng, key = jax.random.split(jax.random.key(3))
    loss = jax.jit(plain.loss)
    each = [loss(params, state, one, rng) for one in augment.mixup(key, batch, 1.0)]
    for place in (0, 1):
        assert found[place] == pytest.approx(float(each[0][place] + each[1][place]), rel=1e-4)
        assert min(float(one[place]) for one in each) > 0.01


def test_padding_and_filler_rows_change_nothing():
    task, params, state, batch = make(pooling="attentive")
    loss = jax.jit(task.loss)
    whole = loss(params, state, batch)[:2]
    longer = batch | {"audio": jnp.pad(batch["audio"], ((0, 0), (0, 4_000)), constant_values=99)}
    np.testing.assert_allclose(loss(params, state, longer)[:2], whole, rtol=1e-4)
    filled = batch | {
        "weight": jnp.array([1.0, 0.0, 1.0]),
        "target": jnp.array([2, -1, 3]),
        "audio_length": jnp.array([8_000, 0, 6_500]),
    }
    without = {name: array[jnp.array([0, 2])] for name, array in batch.items()}
    found, expected = loss(params, state, filled), loss(params, state, without)
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-4)
    assert found[1] == 2


def test_a_row_of_an_unknown_class_is_no_loss():
    task, params, state, batch = make(balance=1.0, smoothing=0.1)
    loss, weight, _ = task.loss(params, state, batch | {"target": jnp.full(3, -1)})
    assert (loss, weight) == (0.0, 0.0)


def test_the_loss_is_smoothed_and_balanced_cross_entropy():
    settings = {"smoothing": 0.2, "balance": 0.5}
    task, params, state, batch = make(**settings)
    logits = np.log(np.asarray(task.predict(params, state, batch)["probabilities"], np.float64))
    targets = np.asarray(batch["target"])
    spread = 0.8 * np.eye(CLASSES)[targets] + 0.2 / CLASSES
    examples = np.array([1, 2, 3, 6])
    weights = examples**-0.5 * 12 / (examples**0.5).sum()
    assert (weights * examples).sum() == pytest.approx(12)  # the mean over examples is 1
    loss, weight, _ = task.loss(params, state, batch)
    assert loss == pytest.approx(-((spread * logits).sum(1) * weights[targets]).sum(), rel=1e-4)
    assert weight == pytest.approx(weights[targets].sum(), rel=1e-5)


@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_the_margin_is_an_angle(margin):
    task, _, _, _ = make(margin=margin, scale=10.0)
    angles = np.linspace(0.01, np.pi - 0.01, 50)
    targets = np.eye(2)[[0] * 50]
    logits = task._logits(jnp.cos(jnp.stack([angles, angles], 1)), jnp.asarray(targets))
    inside = angles < np.pi - margin
    np.testing.assert_allclose(logits[:, 1], 10 * np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(logits[inside, 0], 10 * np.cos(angles + margin)[inside], atol=1e-3)
    assert (np.diff(logits[:, 0]) < 0).all()  # beyond pi it goes on falling


def test_scores_with_a_margin_are_cosines_and_there_is_none_without_training():
    task, params, state, batch = make(margin=0.3, scale=10.0, units=6, activation="none")
    embedding, scores, _ = task._apply(params, state, batch)
    vectors = np.asarray(params["classifier"]["kernel"])
    unit = lambda x, axis: x / np.linalg.norm(x, axis=axis, keepdims=True)
    expected = unit(np.asarray(embedding), 1) @ unit(vectors, 0)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    clean = task.loss(params, state, batch)[0]
    assert clean == pytest.approx(
        dataclasses.replace(task, margin=0.6).loss(params, state, batch)[0]
    )
    assert task.loss(params, state, batch, jax.random.key(0))[0] > clean


def test_standardized_is_each_number_over_the_rows_with_frames():
    task, params, state, batch = make(standardize=True)
    plain = dataclasses.replace(task, standardize=False)
    pooled = np.asarray(plain._apply(params, {}, batch)[0])
    norm = {name: np.asarray(value) for name, value in params["pooled_norm"].items()}
    batch["audio_length"] = batch["audio_length"].at[2].set(0)  # a filler row
    found, _, moved = task._apply(params, state, batch, jax.random.key(0))
    known = np.asarray(plain._apply(params, {}, batch, jax.random.key(0))[0])[:2]
    expected = (known - known.mean(0)) / np.sqrt(known.var(0) + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(found[:2], expected, atol=1e-3)
    kept = moved["batch_stats"]["pooled_norm"]["mean"]
    np.testing.assert_allclose(kept, 0.05 * known.mean(0), atol=1e-5)
    # What is kept is used where nothing is trained: neighbours do not matter.
    evaluated = np.asarray(task._apply(params, state, batch)[0])
    np.testing.assert_allclose(
        evaluated[0], pooled[0] / np.sqrt(1 + 1e-5) * norm["scale"] + norm["bias"], atol=1e-4
    )


def test_unknown_numbers_of_examples_are_refused():
    task = make()[0]
    with pytest.raises(UserError, match=r"config\.task\.balance needs"):
        dataclasses.replace(task, examples={"target": ()}, balance=1.0)


# ---- A run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calls(tones, tmp_path_factory):
    """The tones as a manifest."""
    return write_calls(tones, tmp_path_factory.mktemp("calls"))


def write_calls(tones, root):
    """Writes manifests of the tones into `root`; an utterance's label is its first word."""
    for split in ("train", "dev"):
        lines = []
        chapter = tones / split / "1" / "1"
        for line in (chapter / "1-1.trans.txt").read_text().splitlines():
            name, *words = line.split()
            row = {"audio_filepath": str(chapter / f"{name}.flac"), "id": name, "label": words[0]}
            lines.append(json.dumps(row | {"speaker": f"s{int(name[-1]) % 2}"}) + "\n")
        (root / f"{split}.jsonl").write_text("".join(lines))
    return root


def configure(calls, folder):
    """Fine-tuning from the finished recognizer of the tones."""
    config = runs.tiny_config(calls, steps=30, log_every=10)
    config.data.source, config.data.test_splits = "manifest", "dev"
    config.data.eval_splits = "train[50%:]"
    config.data.train_splits = "train[:50%]"
    config.data.on_error = "raise"
    config.task = tasks.settings("classify", units=8, layer_sum=True, pooling="statistics")
    start.start_from(config, str(folder))
    config.schedule.peak = 3e-2
    config.train.eval_epochs = 4.0
    config.train.compare = True
    config.checkpoint.update({"metric": "macro_f1", "mode": "max", "every": 100})
    return config


@pytest.fixture(scope="module")
def tuned(calls, finished, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("tuned") / "work")
    config = configure(calls, finished.workdir.folder)
    return runs.Finished(config, workdir, train.run(config, workdir))


def test_a_run_says_what_it_has_gained(tuned):
    _, workdir, results = tuned
    assert results["splits"]["dev"]["utterances"] == 6
    assert set(results["before"]) == {"untouched", "head"}
    gain = results["gain"]["dev"]
    head = results["before"]["head"]["dev"]
    assert gain["before"] == pytest.approx(head["error_rate"])
    assert gain["after"] == pytest.approx(results["splits"]["dev"]["error_rate"])
    assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1]
    # The first word is heard, and a head that was never fitted hears nothing.
    assert results["splits"]["train[50%:]"]["accuracy"] > 0.6
    assert sum(results["training"]["layer_weights"]) == pytest.approx(1, abs=1e-5)
    pictures = (workdir.layer_weights, workdir.predictions("dev").with_suffix(".png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_head_alone_leaves_the_encoder_as_it_is(tuned, finished):
    alone = bundle.open(tuned.workdir.before("head").folder)
    base = bundle.open(finished.workdir.folder)
    jax.tree.map(
        np.testing.assert_array_equal, alone.params["encoder"], dict(base.params["encoder"])
    )


def test_a_head_that_was_fitted_otherwise_is_not_taken(tuned, tmp_path):
    workdir = Workdir(shutil.copytree(tuned.workdir.folder, tmp_path / "run"))
    shutil.rmtree(workdir.checkpoints)
    workdir.config.unlink()
    changed = tuned.config.copy_and_resolve_references()
    changed.task.units = 4
    with pytest.raises(UserError, match=r"before/head was trained with config\.task\.units=8,"):
        train.run(changed, workdir)
    # On other splits it is measured anew, and fitted no more.
    changed.task.units = 8
    asked = []

    def trains(config, folder, *_):
        asked.append(folder.folder.name)

    for splits, again in (("dev", []), ("dev,train[:50%]", ["head"])):
        changed.data.test_splits = splits
        asked.clear()
        assert gain.run(changed, workdir, trains) is None
        assert asked[: len(again)] == again
        assert len(asked) == 1


def test_the_head_alone_stands_on_the_adapters_of_its_base(calls, finished, tmp_path):
    config = configure(calls, finished.workdir.folder)
    config.model.adapter = 2
    assert gain.head_alone(config).model.adapter == 0  # the base has none
    base = bundle.open(finished.workdir.folder)
    theirs = base.config.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.model.adapter = 2
    bundle.save(dataclasses.replace(base, config=theirs), tmp_path / "base")
    config.init.folder = str(tmp_path / "base")
    alone = gain.head_alone(config)
    assert alone.model.adapter == 2
    params = {"encoder": {"adapter": {"up": {"kernel": jnp.ones(1)}}}, "classifier": jnp.ones(1)}
    learns = groups.trainable(params, experiment.frozen(alone))
    assert learns == {"encoder": {"adapter": {"up": {"kernel": False}}}, "classifier": True}
    assert groups.trainable(params, experiment.frozen(config))["encoder"]["adapter"]["up"]["kernel"]


def test_hidden_states_give_what_audio_gives(tuned):
    """The head that was fitted on kept states is as good on audio."""
    before = tuned.workdir.before("head")
    kept = files.read_json(before.results)["splits"]["dev"]
    heard = train.evaluate(tuned.config, before, say=lambda line: None)["splits"]["dev"]
    assert heard["classes"] == kept["classes"]


@pytest.fixture(scope="module")
def heard(tuned):
    """(the file of an utterance of dev, the probabilities that evaluation found) of each."""
    dev = json.loads(
        (pathlib.Path(tuned.config.data.root) / "dev.jsonl").read_text().split("\n")[0]
    )
    folder = pathlib.Path(dev["audio_filepath"]).parent
    lines = map(json.loads, tuned.workdir.predictions("dev").read_text().splitlines())
    return {str(folder / f"{line['id']}.flac"): line["probabilities"] for line in lines}


def test_the_command_finds_what_evaluation_found(tuned, heard, tmp_path, capsys):
    silent, model = tmp_path / "silent.wav", f"--model={tuned.workdir.folder}"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    assert classify.main([*heard, str(silent), "nowhere.wav", model, "--format=json"]) == 1
    said = capsys.readouterr()
    found = {one["file"]: one for one in map(json.loads, said.out.splitlines())}
    assert found.keys() == heard.keys()
    for file, probabilities in heard.items():
        assert list(found[file]["classes"].values()) == sorted(probabilities.values())[::-1]
        assert found[file]["classes"] == pytest.approx(probabilities, abs=1e-3)
        assert found[file]["class"] == max(probabilities, key=probabilities.get)
    assert "nowhere.wav: no such file" in said.err
    assert f"{silent}: digital silence" in said.err
    first = next(iter(heard))
    assert classify.main([first, model, "--top=2"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(found[first]["classes"])[:2]
    for arguments in ([], [first], [first, model, "--top=0"], [first, model, "--format=srt"]):
        with pytest.raises(SystemExit) as left:
            classify.main(arguments)
        assert left.value.code == 2


def test_a_classifier_in_python(tuned, heard):
    model = speech_jax.load(tuned.workdir.folder)
    first, other = list(heard)[:2]
    whole = model.classify(first)
    assert str(whole) == whole.name == max(heard[first], key=heard[first].get)
    samples, rate = soundfile.read(first)
    assert model.classify(samples, rate) == whole
    # What is longer than it has learned from is the average of its pieces.
    model._longest = len(samples)
    rest, _ = soundfile.read(other)
    rest = rest[: len(samples)]
    joined = dict(model.classify(np.concatenate([samples, rest]), rate).classes)
    shares = len(samples), len(rest)
    each = dict(whole.classes), dict(model.classify(rest, rate).classes)
    for name, share in joined.items():
        expected = np.average([one[name] for one in each], weights=shares)
        assert share == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="too short for a class"):
        model.classify(samples[:50], rate)
    with pytest.raises(UserError, match="chunk_seconds and decoder are for recognizers"):
        speech_jax.load(tuned.workdir.folder, chunk_seconds=5.0)


def test_a_model_of_another_task_names_the_command_for_it(tuned, finished, heard, capsys):
    first = next(iter(heard))
    assert transcribe.main([first, f"--model={tuned.workdir.folder}"]) == 1
    assert "python -m speech_jax.classify names the class" in capsys.readouterr().err
    assert classify.main([first, f"--model={finished.workdir.folder}"]) == 1
    assert "python -m speech_jax.transcribe writes down" in capsys.readouterr().err
    assert export.main([str(tuned.workdir.folder), "classes.sjx"]) == 1
    assert "is a classifier, and recognizers alone are exported" in capsys.readouterr().err
    with pytest.raises(UserError, match="use classify"):
        speech_jax.load(tuned.workdir.folder).transcribe(first)
    with pytest.raises(UserError, match="use transcribe"):
        speech_jax.load(finished.workdir.folder).classify(first)


def test_evaluations_follow_epochs(tuned):
    lines = [line for line in runs.metrics(tuned.workdir.folder) if "dev" not in str(line.keys())]
    steps = [line["step"] for line in lines if any("macro_f1" in key for key in line)]
    batches = files.read_json(tuned.workdir.plan)
    assert batches["utterances"] == 24
    assert steps[-1] == 30
    assert len(steps) > 1


def test_what_moves_or_is_random_has_no_kept_states(calls, finished, tmp_path):
    config = configure(calls, finished.workdir.folder)
    config.train.compare = False
    config.data.cache_hidden = True
    with pytest.raises(UserError, match=r"encoder/\S+ learns: set config"):
        train.run(config, Workdir(tmp_path / "one"))
    config.spec_augment.time_masks = 2
    with pytest.raises(UserError, match="spec_augment changes it at random"):
        train.run(config, Workdir(tmp_path / "two"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": None}, "utterance odd: no label: the utterance has no tag 'label'"),
        ({"label": "Z"}, "utterance odd is the only one of the training splits with the label 'Z'"),
    ],
)
def test_a_row_that_cannot_be_classified_is_named_or_counted(calls, finished, tmp_path, row, says):
    shutil.copytree(calls, tmp_path / "calls")
    path = tmp_path / "calls" / "train.jsonl"
    lines = path.read_text().splitlines()
    odd = {k: v for k, v in (json.loads(lines[0]) | {"id": "odd"} | row).items() if v}
    path.write_text("\n".join([json.dumps(odd), *lines]) + "\n")
    config = configure(tmp_path / "calls", finished.workdir.folder)
    config.data.train_splits = "train"
    source = experiment.open_training(config)

    def make():
        parts = experiment.make_parts(config, tmp_path / "work", source)
        task = experiment.make_task(config, parts)
        return experiment.training_corpus(config, source, parts, task)

    with pytest.raises(UserError, match=says):
        make()
    config.data.on_error = "skip"
    corpus = make()
    assert list(corpus.left_out) == ["odd"]
    assert len(corpus) == 48
    # All of them are listed.
    workdir = Workdir(tmp_path / "work")
    workdir.write_left_out({"training": corpus.left_out, "dev": {}})
    (listed,) = files.read_json(workdir.left_out)["training"].items()
    assert listed == ("odd", corpus.left_out["odd"])


def test_a_class_that_training_had_not_is_named_or_counted(calls, finished, tmp_path):
    config = configure(calls, finished.workdir.folder)
    config.data.train_splits, config.data.only = "train", "label!=A"
    parts = experiment.make_parts(config, tmp_path, experiment.open_training(config))
    config.data.only = ""
    with pytest.raises(
        UserError, match=r"train: utterance 1-1-\d+: unknown label: 'A' is not one of B, C"
    ):
        experiment.evaluation_corpus(config, "train", parts)
    config.data.on_error = "skip"
    corpus = experiment.evaluation_corpus(config, "train", parts)
    assert len(corpus) + len(corpus.left_out) == 48
    assert "unknown label: 'A'" in next(iter(corpus.left_out.values()))


def test_what_cannot_be_compared_or_used_is_named_before_the_training(
    calls, finished, tmp_path, monkeypatch
):
    config = configure(calls, finished.workdir.folder)
    config.train.compare = False
    monkeypatch.setattr(train, "make_setup", None)
    with config.unlocked():
        config.parts = {"target": {"tag": "label", "unseen": True}}
    config.task.verify = True
    config.checkpoint.metric = ""
    shutil.copytree(calls, tmp_path / "calls")
    config.data.root = str(tmp_path / "calls")
    rows = list(map(json.loads, (calls / "dev.jsonl").read_text().splitlines()))
    rows[3].pop("label")
    write = lambda: (tmp_path / "calls" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write()
    with pytest.raises(UserError, match=f"utterance {rows[3]['id']} has no tag 'label', so nobody"):
        train.run(config, Workdir(tmp_path / "one"))
    config.task.verify = False
    config.parts.target.unseen = False
    config.data.on_error = "skip"
    for row in rows:
        row["label"] = "Q"
    write()
    with pytest.raises(
        UserError, match=r"dev: no utterances left to use \(6 unknown label\); the first is .*'Q'"
    ):
        train.run(config, Workdir(tmp_path / "two"))


def test_a_metric_that_nothing_measures_is_refused(calls, finished, tmp_path):
    config = configure(calls, finished.workdir.folder)
    config.train.compare = False
    config.checkpoint.update({"metric": "wer", "mode": "min"})
    with pytest.raises(UserError, match="'wer' is not measured; there are accuracy,"):
        train.run(config, Workdir(tmp_path))
