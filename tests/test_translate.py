"""Translation: what its loss is made of, where its search ends, and data that it cannot use."""

import dataclasses
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import speech_jax
from speech_jax import bundle, experiment, models, tasks, transcribe
from speech_jax import config as defaults
from speech_jax.bundle.format import Bundle
from speech_jax.data import text
from speech_jax.data.parts import PartError
from speech_jax.data.parts.audio import Audio
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.pipeline import CorpusError
from speech_jax.decoding.decoder import DecoderError
from speech_jax.errors import UserError
from speech_jax.evaluators.bleu import Bleu
from speech_jax.ops import ctc
from speech_jax.training import adversarial, peft

pytestmark = pytest.mark.optax

RATE = 16_000
COUNTS = {"labels": 5, "target": 6}


def configure(root, width=2, **task):
    config = defaults.default()
    config.decoder.width = width
    config.data.source, config.data.root, config.data.cache = "manifest", str(root), str(root)
    config.data.train_splits = "train"
    config.parts = {"target": {"tag": "translation"}}
    config.task = tasks.settings("translate", layers=1, heads=2, dropout=0.0, **task)
    config.model = models.settings(
        "conformer", "tiny", width=8, num_layers=1, heads=2, subsampling_channels=4, dropout=0.0
    )
    return config


class Part:
    """What a task asks of a part."""

    def __init__(self, count: int = 0):
        self.count, self.statistics = count, {}


def make_task(**task):
    parts = {"audio": Part(), **{name: Part(count) for name, count in COUNTS.items()}}
    config = configure(".", **task)
    return experiment.make_task(config, parts)


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows, samples = 3, RATE // 2
    lengths = np.asarray([samples, samples - 2_000, samples], np.int32)
    return {
        "audio": rng.integers(-3_000, 3_000, (rows, samples)).astype(np.int16),
        "audio_length": lengths,
        "labels": rng.integers(1, COUNTS["labels"], (rows, 4)).astype(np.int32),
        "labels_length": np.asarray([4, 2, 3], np.int32),
        "target": rng.integers(1, COUNTS["target"], (rows, 5)).astype(np.int32),
        "target_length": np.asarray([5, 1, 3], np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def model(task, batch):
    params, state = jax.jit(task.init)(jax.random.key(0), batch)
    return jax.tree.map(lambda x: x + 0.1, params), state  # so that no kernel is 0


@pytest.fixture(scope="module")
def loss(task, model):
    compiled = jax.jit(lambda batch: task.loss(*model, batch))

    def run(batch):
        total, weight, aux = compiled(batch)
        return {"total": total, "weight": weight} | aux["sums"]

    return run


def test_the_loss_is_that_of_both(task, model, loss, batch):
    """By hand, of logits: of each symbol behind those before it, and of CTC."""
    texts = batch["target"], batch["target_length"]
    apply = lambda params: task.model.apply(params, *task.frontend(batch), *texts, True)
    written, heard, frames = jax.jit(apply)({"params": model[0]})
    log_probs = np.asarray(jax.nn.log_softmax(written), np.float64)
    nats, end = 0.0, COUNTS["target"]
    for row, count in enumerate(batch["target_length"]):
        for place, symbol in enumerate([*batch["target"][row, :count], end]):
            nats -= 0.9 * log_probs[row, place, symbol]
            nats -= 0.1 * log_probs[row, place, 1:].mean()
    labels = batch["labels"], batch["labels_length"]
    spoken = float(ctc.ctc_loss(heard, frames, *labels).sum())
    found = loss(batch)
    assert found["weight"] == 5 + 1 + 3 + 3
    np.testing.assert_allclose(found["total"], 0.7 * nats + 0.3 * spoken, rtol=1e-5)


def test_ctc_leaves_out_what_has_no_transcript_or_no_room(loss, batch):
    whole = loss(batch)
    silent = loss(batch | {"labels_length": np.asarray([4, 0, 3], np.int32)})
    short = loss(batch | {"audio_length": batch["audio_length"] // np.int32([1, 20, 1])})
    assert (whole["infeasible"], silent["infeasible"], short["infeasible"]) == (0, 0, 1)
    # The decoder learns from all of them.
    assert silent["weight"] == short["weight"] == whole["weight"]
    assert silent["total"] < whole["total"]
    untranslated = loss(batch | {"target_length": np.asarray([5, 0, 3], np.int32)})
    assert untranslated["weight"] == whole["weight"] - 2


def test_what_does_not_end_is_cut_and_said_to_be(task, model, batch):
    """Whatever the decoder says: it never ends, or at once."""
    params, state = model
    predict = jax.jit(lambda params: task.predict(params, state, batch))
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def ending(logit: float):
        bias = flat["decoder/output/bias"].at[-1].set(logit)
        changed = flat | {"decoder/output/bias": bias}
        return predict(flax.traverse_util.unflatten_dict(changed, sep="/"))

    never, at_once = ending(-1e4), ending(1e4)
    frames = task.encoder.output_lengths(task.frontend.lengths(batch["audio_length"]))
    np.testing.assert_array_equal(never["target_length"], task.longest(np.asarray(frames)))
    assert not never["ended"].any()
    assert at_once["ended"].all()
    assert not at_once["target_length"].any()
    for name in ("labels", "labels_length"):  # the transcript is CTC's alone
        np.testing.assert_array_equal(never[name], at_once[name])


@pytest.mark.parametrize("wrapped", ["fgsm", "lora", "no ctc"])
def test_it_goes_with_the_rest(task, batch, wrapped):
    """Shapes alone: the gradient has that of the parameters."""
    if wrapped == "lora":
        task = peft.Adapted(task, peft.LoRA(rank=2))
    if wrapped == "no ctc":
        task = make_task(ctc_weight=0.0)
    params, state = jax.eval_shape(task.init, jax.random.key(0), batch)
    names = flax.traverse_util.flatten_dict(params, sep="/").keys()
    assert any("decoder/" in name and name.endswith("lora/a") for name in names) == (
        wrapped == "lora"
    )
    assert any(name.startswith("head/") for name in names) == (wrapped != "no ctc")
    adversary = adversarial.Adversary(method="fgsm" if wrapped == "fgsm" else "none")
    gradients = adversarial.gradients(task, adversary)
    found = jax.eval_shape(gradients, params, state, batch, jax.random.key(1), jnp.int32(3))
    assert jax.tree.map(lambda x: x.shape, found[0]) == jax.tree.map(lambda x: x.shape, params)


# ---- Data --------------------------------------------------------------------------------------


@pytest.fixture
def write(tones, tmp_path):
    """Writes a manifest of the tones with these translations, and configures a run on it."""

    def run(translations, **task):
        chapter = tones / "train" / "1" / "1"
        lines = (chapter / "1-1.trans.txt").read_text().splitlines()
        rows = []
        for line, translation in zip(lines, translations, strict=False):
            name, _, text = line.partition(" ")
            row = {"id": name, "audio_filepath": str(chapter / f"{name}.flac"), "text": text}
            tags = {} if translation is None else {"translation": translation}
            rows.append(json.dumps(row | {"speaker": "s"} | tags) + "\n")
        (tmp_path / "train.jsonl").write_text("".join(rows))
        return configure(tmp_path, **task)

    return run


def corpus(config):
    source = experiment.open_training(config)
    made = experiment.make_parts(config, pathlib.Path(config.data.root), source)
    task = experiment.make_task(config, made)
    return experiment.training_corpus(config, source, made, task)


def test_no_translations_at_all(write):
    config = write([None] * 4)
    message = r"the tag 'translation'.*tags are speaker.*the first is 1-1-0000: add it"
    with pytest.raises(PartError, match=message):
        corpus(config)


def test_a_split_without_translations_is_refused_before_the_training(write):
    config = write(["oui", "non", "si"])
    made = corpus(config)
    measure = Bleu(made.parts["target"])
    utterances = made.source.utterances
    measure.check(utterances)
    without = [dataclasses.replace(one, tags={}) for one in utterances]
    with pytest.raises(UserError, match=r"no utterance has a translation.*'translation'"):
        measure.check(without)


def test_a_transcript_that_is_not_there_is_no_error(write):
    made = corpus(write(["oui", "non", "si"]))
    measure = Bleu(made.parts["target"], made.parts["labels"])
    row = {"labels": np.ones(3, np.int32), "labels_length": 3, "ended": True}
    row |= {"target": np.ones(2, np.int32), "target_length": 2}
    for one in made.source.utterances:
        measure.add(dataclasses.replace(one, text=""), {}, row)
    assert measure.results()["transcript_wer"] is None


def test_a_target_vocabulary_that_is_too_small(write):
    config = write(["il fait beau aujourd'hui"] * 4)
    config.parts.target.update({"tokenizer": "sentencepiece", "vocabulary_size": 4})
    message = r"config.parts.target.*'translation': vocabulary_size 4 is too small.*set it to"
    with pytest.raises(PartError, match=message):
        corpus(config)


@pytest.mark.parametrize("empty", ["", " ", None, "..."])
def test_an_empty_translation_is_named_or_left_out(write, empty):
    config = write(["oui", "non", empty, "oui"])
    config.data.on_error = "raise"
    with pytest.raises(CorpusError, match=r"utterance 1-1-0002: no translation.*on_error='skip'"):
        corpus(config)
    config.data.on_error = "skip"
    found = corpus(config)
    assert len(found) == 3
    assert list(found.left_out) == ["1-1-0002"]


def test_a_translation_that_cannot_be_written_is_named(write):
    config = write(["oui", "non " * 60], labels_per_frame=0.5)
    config.data.on_error = "raise"
    with pytest.raises(CorpusError, match=r"1-1-0001: translation too long: 239 .*labels_per"):
        corpus(config)


def test_ctc_may_learn_from_translations(write):
    """Where nothing was written of what was said."""
    config = write(["oui", "non", "si"])
    config.parts.labels = {"tag": "translation"}
    found = corpus(config)
    parts = found.parts
    assert parts["labels"].tokenizer.alphabet == parts["target"].tokenizer.alphabet
    task = experiment.make_task(config, parts)
    results = task.evaluator(parts).results()
    assert "transcript_wer" not in results
    assert results["bleu"] is None


# ---- Use ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A saved translator that says something."""
    names = {"labels": "abcd", "target": "vwxyz"}
    parts = {
        name: Transcript(text.CharacterTokenizer(letters), name, "" if name == "labels" else "t")
        for name, letters in names.items()
    }
    config = configure(".")
    config.parts.target.tag = "t"
    found = Bundle(config, {"audio": Audio(), **parts}, *jax.device_get(model))
    path = tmp_path_factory.mktemp("translator") / "model"
    bundle.save(found, path)
    return path


def test_recordings_are_translated(folder, task, model, batch, tmp_path, capsys):
    """What the task predicts is what is read, on the command line too."""
    translator = speech_jax.load(folder)
    assert translator.translates
    rows, recordings = [], tmp_path / "calls"
    recordings.mkdir()
    predicted = jax.device_get(jax.jit(task.predict)(*model, batch))
    for row, length in enumerate(batch["audio_length"]):
        samples = batch["audio"][row, :length]
        count = predicted["target_length"][row]
        expected = "".join("vwxyz"[i - 1] for i in predicted["target"][row, :count])
        found = translator.translate(samples)
        assert found.text == expected != ""
        (word,) = found.words
        assert (word.start, word.end) == (0, pytest.approx(length / RATE))
        assert word.confidence == pytest.approx(float(predicted["sure"][row]), rel=1e-4)
        assert set(translator.transcribe(samples).text) <= set("abcd")
        soundfile.write(recordings / f"{row}.wav", samples, RATE, subtype="PCM_16")
        rows.append(f"{recordings / f'{row}.wav'}: {expected}\n")
    assert transcribe.main([str(recordings), f"--model={folder}"]) == 0
    assert capsys.readouterr().out == "".join(rows)
    for flag in ("--chunk=9", "--decoder=joint"):
        with pytest.raises(SystemExit):
            transcribe.main([str(recordings), f"--model={folder}", flag])
        said = f"{flag.partition('=')[0]} does nothing with a model that translates"
        assert said in capsys.readouterr().err


def test_a_translation_is_searched_as_is_asked_for(folder, batch, tmp_path, capsys):
    """Of more hypotheses the best scores no less, and the others are alternatives."""
    samples = batch["audio"][0]
    found = {
        width: speech_jax.load(folder, decoder={"width": width, "nbest": width})
        .translate(samples)
        .segments[0]
        for width in (1, 4)
    }
    assert len(found[1].alternatives) == 1 < len(found[4].alternatives)
    scores = [score for _, score in found[4].alternatives]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= found[1].alternatives[0][1] - 1e-5
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="PCM_16")
    flags = [f"--model={folder}", "--beam=4", "--nbest=4", "--format=json"]
    assert transcribe.main([str(tmp_path / "a.wav"), *flags]) == 0
    (segment,) = json.loads(capsys.readouterr().out)["segments"]
    assert len(segment["alternatives"]) == len(scores)
    with pytest.raises(DecoderError, match="has no 'beam'"):
        speech_jax.load(folder, decoder={"beam": 4})
    for name in ("greedy", "joint"):
        with pytest.raises(UserError, match="with this one it can be attention"):
            speech_jax.load(folder, decoder={"name": name})


def test_what_learned_from_translations_alone_does_not_transcribe(folder, tmp_path):
    model = bundle.open(folder)
    config = model.config.copy_and_resolve_references().unlock()
    config.parts.labels = {"tag": "t"}
    bundle.save(dataclasses.replace(model, config=config), tmp_path / "model")
    translator = speech_jax.load(tmp_path / "model")
    silence = np.ones(RATE, np.int16)
    assert isinstance(translator.translate(silence).text, str)
    for use in (translator.transcribe, translator.transcribe_all):
        with pytest.raises(UserError, match=r"writes translations .*: use translate"):
            use(silence)


def test_a_recognizer_does_not_translate(finished):
    recognizer = speech_jax.load(finished.workdir.folder)
    with pytest.raises(UserError, match="does not translate: use transcribe"):
        recognizer.translate(np.ones(RATE, np.int16))
