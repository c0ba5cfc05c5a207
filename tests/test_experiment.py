"""A run's parts: every form of a corpus trains alike; what cannot be used is named."""

import importlib
import inspect
import json
import tarfile
import types

import jax
import numpy as np
import pytest
import soundfile

import runs
from conftest import write_tones
from speech_jax import bundle, experiment, train
from speech_jax.config import default
from speech_jax.data import prepare, sources
from speech_jax.errors import UserError
from speech_jax.workdir import Workdir

pytestmark = pytest.mark.optax


def as_folder(tones, root):
    return "librispeech", tones


def as_archive(tones, root):
    for split in ("train", "dev"):
        with tarfile.open(root / f"{split}.tar.gz", "w:gz") as archive:
            archive.add(tones / split, f"LibriSpeech/{split}")
    return "librispeech", root


def as_manifest(tones, root):
    for split in ("train", "dev"):
        source = sources.open_source("librispeech", root=tones, split=split)
        rows = [
            {
                "audio_filepath": str(source.open(i)),
                "duration": u.duration,
                "text": u.text,
                "id": u.id,
            }
            for i, u in enumerate(source.utterances)
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "manifest", root


def as_prepared(tones, root):
    for split in ("train", "dev"):
        source = sources.open_source("librispeech", root=tones, split=split)
        prepare.prepare(source, split, root, workers=1)
    return "prepared", root


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory):
    """Parameters and scores after two updates, for each form of the same corpus."""

    def run(form):
        root, workdir = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("work")
        kind, where = form(tones, root)
        config = runs.tiny_config(tones, steps=2, eval_every=2)
        config.data.source, config.data.root = kind, str(where)
        results = train.run(config, Workdir(workdir))
        return bundle.open(workdir).params, results["splits"]

    return {form: run(form) for form in (as_folder, as_archive, as_manifest, as_prepared)}


@pytest.mark.parametrize("form", [as_archive, as_manifest, as_prepared])
def test_every_form_of_a_corpus_trains_to_the_same_parameters(trained, form):
    params, splits = trained[form]
    expected, expected_splits = trained[as_folder]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert splits == expected_splits


def test_synthetic_speech_trains(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the quickstart extra is not installed")
    config = runs.tiny_config(tmp_path, steps=1, eval_every=1)
    config.data.source, config.data.root = "synthetic", ""
    config.data.cache = str(tmp_path)
    config.data.arguments = {"utterances": 12}
    config.data.max_seconds = 8.0
    results = train.run(config, Workdir(tmp_path / "work"))
    assert results["splits"]["dev"]["utterances"] == 12


def test_a_sentencepiece_model_stays_in_the_workdir(tones, tmp_path):
    config = runs.tiny_config(tones)
    config.features.normalize = "utterance"
    config.text.tokenizer, config.text.vocabulary_size = "sentencepiece", 8
    source = experiment.open_splits(config, "train")
    made = experiment.make_parts(config, tmp_path, source)["labels"]
    assert made.count == 8
    again = experiment.restore_parts(config, tmp_path)["labels"]
    assert [again.tokenizer.encode(u.text) for u in source.utterances] == [
        made.tokenizer.encode(u.text) for u in source.utterances
    ]
    with pytest.raises(UserError, match="train there first"):
        experiment.restore_parts(config, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / "1-1-0000.flac").write_bytes(b"fLaC, but not really"),
            "1-1-0000",
        ),
        (lambda folder: (folder / "1-1-0000.flac").write_bytes(b""), "1-1-0000"),
        (lambda folder: (folder / "1-1-0000.flac").unlink(), "1-1-0000"),
        (
            lambda folder: soundfile.write(folder / "1-1-9999.flac", np.zeros(8_000), 16_000),
            "1-1-9999",
        ),
        (
            lambda folder: soundfile.write(folder / "1-1-0000.flac", np.zeros(600), 16_000),
            "1-1-0000.*need",
        ),
    ],
    ids=["not audio", "empty", "no audio", "no transcript", "too short for its text"],
)
def test_what_cannot_be_used_is_named_or_left_out(tmp_path, caplog, break_it, message):
    write_tones(tmp_path / "train", 4, seed=0)
    break_it(tmp_path / "train" / "1" / "1")
    config = runs.tiny_config(tmp_path)
    config.data.min_seconds = 0.0
    config.data.on_error = "raise"

    def corpus():
        source = experiment.open_training(config)
        parts = experiment.make_parts(config, tmp_path, source)
        task = experiment.make_task(config, parts)
        return experiment.training_corpus(config, source, parts, task)

    with pytest.raises(UserError, match=message):
        corpus()
    config.data.on_error = "skip"
    left = corpus()
    assert len(left) == (4 if "9999" in message else 3)
    assert len(left.left_out) == 1
    assert "left out" in caplog.text


def test_a_start_without_a_checkpoint_is_no_model(tones, tmp_path):
    config, workdir = runs.tiny_config(tones), Workdir(tmp_path)
    workdir.prepare([])
    workdir.record(config)
    with pytest.raises(UserError, match="train first"):
        bundle.open(tmp_path)


def test_arguments_of_a_source_that_are_not_set_are_its_own(monkeypatch):
    config, taken = default(), []
    empty = types.SimpleNamespace(utterances=())
    open_source = lambda *_, **settings: taken.append(settings) or empty
    monkeypatch.setattr(experiment.sources, "open_source", open_source)
    experiment.open_splits(config, "one")
    known = set(config.data.arguments)
    config.data.arguments.trust_durations = False
    experiment.open_splits(config, "one")
    assert not known & taken[0].keys()
    assert taken[1] == taken[0] | {"trust_durations": False}


def test_every_argument_of_a_source_can_be_set():
    """Also from the command line, which sets only what is there."""
    known = set()
    for place in experiment.sources.SOURCES.values():
        module, _, function = place.partition(":")
        opener = getattr(importlib.import_module(module), function)
        parameters = inspect.signature(opener).parameters.values()
        known |= {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert known == set(default().data.arguments)
