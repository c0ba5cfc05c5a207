"""From a configuration to the parts of a run: sources, tokenizer, corpora, batches, task.

Training, evaluation and deployment build the same parts here, so that they cannot disagree.
"""

import json
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from speech_jax import models, registry, tasks
from speech_jax.config import split_names
from speech_jax.data import audio, pipeline, sources, text
from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import features
from speech_jax.training import sharding
from speech_jax.training.adversarial import Adversary

# What may change between the runs that share a workdir: where things are and how fast they go,
# never what is computed.
_FREE = (
    "data.root", "data.cache", "data.threads", "data.eval_splits", "data.test_splits",
    "data.eval_buckets", "data.noise_root", "robustness", "train.log_every", "checkpoint",
    "mesh",
)  # fmt: skip


_TOKENIZER, _FEATURES = "tokenizer.json", "features.json"
# What a workdir's parameters are good for.
_MODEL = ("task", "model", "features", "text")


class WorkdirError(UserError):
    """A workdir that this run cannot use; the message says which one would do."""


def check_workdir(workdir: pathlib.Path, config: ConfigDict, *, trained: bool = False) -> None:
    """Checks that a workdir is of this configuration, or fresh and writable; in time, before work.

    `trained` asks for one that was trained in, by whatever schedule and on whatever data: the model
    is to be used, not trained further.

    Raises:
      WorkdirError: it cannot be written, or holds another configuration.
    """
    path = workdir / "config.json"
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        if trained:
            raise WorkdirError(f"{workdir} holds no config.json: train there first") from None
        if jax.process_index() == 0:
            _prepare(workdir)
        _barrier("workdir")
        return
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}): use another --workdir") from error
    resolved = json.loads(config.to_json())
    compared = {
        name: (recorded.get(name), resolved[name]) for name in (_MODEL if trained else resolved)
    }
    for key, old, new in _differences(compared):
        raise WorkdirError(
            f"{workdir} was trained with config.{key}={old!r}, not {new!r}: use another "
            "--workdir, or the same value"
        )


def recorded_config(workdir: pathlib.Path) -> ConfigDict:
    """What a workdir was trained with.

    Raises:
      WorkdirError: it was not trained in.
    """
    try:
        return ConfigDict(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{workdir / 'config.json'} cannot be read: {error}") from error


def record_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the workdir one of this configuration: from now on there is something to resume."""
    if jax.process_index() == 0:
        _write(workdir / "config.json", json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    _barrier("config")


def _prepare(workdir: pathlib.Path) -> None:
    """A folder without what a start that failed has left, which may be of other settings."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name in (_TOKENIZER, _FEATURES):
            (workdir / name).unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise WorkdirError(f"cannot write to --workdir={workdir}: {error}") from error


def _write(path: pathlib.Path, text: str) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_text(text)
    scratch.replace(path)


def _differences(pairs, prefix=""):
    for name, (old, new) in pairs.items():
        key = f"{prefix}{name}"
        if key in _FREE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys())}
            yield from _differences(inner, f"{key}.")
        elif old != new:
            yield key, old, new


# ---- Data --------------------------------------------------------------------------------------


def open_splits(config: ConfigDict, names: str) -> sources.Source:
    """One source of the splits in `names`, which are joined by commas."""
    data = config.data
    opened = [
        sources.open_source(
            data.source,
            root=data.root,
            split=name,
            on_error=data.on_error,
            cache=data.cache or None,
            **data.arguments,
        )
        for name in split_names(names)
    ]
    return opened[0] if len(opened) == 1 else sources.concatenate(opened)


def open_training(config: ConfigDict) -> sources.Source:
    """The training splits, or as much of them as is asked for."""
    source = open_splits(config, config.data.train_splits)
    minutes = config.data.train_minutes
    return sources.draw(source, 60 * minutes, config.seed) if minutes else source


def make_tokenizer(config: ConfigDict, workdir: pathlib.Path, source=None) -> text.Tokenizer | None:
    """The tokenizer of the workdir; where there is none yet, made of a source's transcripts.

    None for a task without transcripts.
    """
    if not tasks.constructor(config.task.name).labelled:
        return None
    path = workdir / _TOKENIZER
    if source is None and not path.exists():
        raise WorkdirError(f"{workdir} holds no {_TOKENIZER}: train there first")
    if jax.process_index() == 0 and not path.exists():
        made = text.make_tokenizer(
            config.text.tokenizer,
            [utterance.text for utterance in source.utterances],
            normalizer=config.text.normalizer,
            vocabulary_size=config.text.vocabulary_size,
        )
        made.save(path)
    _barrier("tokenizer")
    return text.load_tokenizer(path)


def training_corpus(config: ConfigDict, source, tokenizer, task) -> pipeline.Corpus:
    """The utterances of `source` that can be trained on; the others are counted in the log.

    What has no transcript to fit is cropped where it is too long, at a new place in each epoch.
    """
    data = config.data
    corpus = pipeline.encode_corpus(
        source,
        tokenizer,
        sample_rate=data.sample_rate,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        output_lengths=lambda samples: task.encoder.output_lengths(task.frontend.lengths(samples)),
        max_speed=max(data.speeds),
        crop=not task.labelled,
        on_error=data.on_error,
    )
    for name, reason in list(corpus.left_out.items())[:5]:
        logging.warning("left out: %s: %s", name, reason)
    if len(corpus.left_out) > 5:
        logging.warning("left out: %d utterances in all", len(corpus.left_out))
    return corpus


def evaluation_corpus(config: ConfigDict, split: str) -> pipeline.Corpus:
    """All utterances of a split: none is left out for its length or its transcript."""
    source = open_splits(config, split)
    return pipeline.encode_corpus(source, None, sample_rate=config.data.sample_rate)


def training_buckets(config: ConfigDict, corpus: pipeline.Corpus, mesh):
    """The batch shapes of training."""
    return pipeline.corpus_buckets(
        corpus,
        count=config.data.buckets,
        batch_seconds=config.data.batch_seconds,
        rows_multiple=sharding.batch_shards(mesh) * config.train.accumulate,
        speeds=config.data.speeds,
    )


def training_batches(config: ConfigDict, corpus: pipeline.Corpus, buckets, start: int):
    """Endless batches of this process's rows, from the batch number `start` on."""
    data = config.data
    noise = None
    if data.noise_root:
        noise = pipeline.open_noise(
            data.noise_root, probability=data.noise_probability, snr_db=data.noise_snr_db
        )
    return pipeline.batches(
        corpus,
        buckets,
        seed=config.seed,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        speeds=data.speeds,
        noise=noise,
        on_error=data.on_error,
        threads=data.threads,
    )


def evaluation_batches(config: ConfigDict, corpus: pipeline.Corpus, mesh) -> Iterator[dict]:
    """One pass over a corpus, this process's rows; the last batch may hold filler rows."""
    longest = float(corpus.samples.max()) / config.data.sample_rate
    buckets = pipeline.corpus_buckets(
        corpus,
        count=config.data.eval_buckets,
        batch_seconds=max(config.data.batch_seconds, longest),
        rows_multiple=sharding.batch_shards(mesh),
    )
    return pipeline.batches(
        corpus,
        buckets,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        shuffle=False,
        repeat=False,
        on_error=config.data.on_error,
        threads=config.data.threads,
    )


# ---- Task --------------------------------------------------------------------------------------


def open_task(config: ConfigDict, workdir: pathlib.Path, source=None):
    """(task, tokenizer or None) of a workdir; what it does not hold yet is made of `source`."""
    tokenizer = make_tokenizer(config, workdir, source)
    statistics = feature_statistics(config, workdir, source)
    return make_task(config, tokenizer and tokenizer.vocabulary_size, statistics), tokenizer


def make_task(config: ConfigDict, vocabulary_size: int | None, statistics=None):
    """The task that the configuration names, around its encoder and front end.

    `vocabulary_size` is of a task with transcripts, `statistics` what `feature_statistics` returns.
    """
    encoder = models.make_encoder(**config.model)
    settings = dict(config.features)
    normalize = settings.pop("normalize")
    masks = dict(config.spec_augment)
    start = masks.pop("start_step")
    frontend = FrontEnd(
        listens=encoder.listens,
        log_mel={"sample_rate": config.data.sample_rate, **settings},
        normalize=normalize,
        spec_augment=masks,
        spec_augment_start=start,
        **(statistics or {}),
    )
    arguments = dict(config.task)
    name = arguments.pop("name")
    arguments |= {"encoder": encoder, "frontend": frontend}
    if tasks.constructor(name).labelled:
        arguments["vocabulary_size"] = vocabulary_size
    return registry.call(tasks.constructor(name), arguments, what=f"task ({name})")


def make_adversary(config: ConfigDict) -> Adversary:
    """What is done to the inputs in training."""
    return Adversary(**config.adversarial)


def feature_statistics(config: ConfigDict, workdir: pathlib.Path, source=None):
    """{'mean', 'std'} [mels] for global normalization, stored in the workdir; else None.

    They are those that a pretrained encoder has learned with, or of a thousand utterances drawn
    from `source`, which is enough for two moments.
    """
    if config.features.normalize != "global":
        return None
    path = workdir / _FEATURES
    if source is None and not path.exists():
        raise WorkdirError(f"{workdir} holds no {_FEATURES}: train there first")
    if jax.process_index() == 0 and not path.exists():
        learned = pathlib.Path(config.init.folder).expanduser() / _FEATURES
        known = config.init.folder and learned.exists()
        _write(path, learned.read_text() if known else json.dumps(_measure(config, source)))
    _barrier("features")
    return {
        name: np.asarray(value, np.float32) for name, value in json.loads(path.read_text()).items()
    }


def _measure(config: ConfigDict, source) -> dict[str, list[float]]:
    settings = {k: v for k, v in config.features.items() if k != "normalize"}
    rate = config.data.sample_rate
    size = round(rate * config.data.max_seconds)

    @jax.jit
    def moments(samples, length):
        mels, frames = features.log_mel(
            features.to_waveform(samples), length, sample_rate=rate, **settings
        )
        return frames.sum(), mels.sum((0, 1)), jnp.square(mels).sum((0, 1))

    rng = np.random.default_rng(config.seed)
    total = np.zeros((), np.float64)
    for place in rng.permutation(len(source.utterances))[:1000]:
        try:
            samples = audio.decode(source.open(int(place)), rate)[:size]
        except audio.AudioError:
            continue
        padded = np.zeros((1, size), np.int16)
        padded[0, : len(samples)] = samples
        count, first, second = moments(padded, np.asarray([len(samples)], np.int32))
        total = total + np.stack([np.full(first.shape, count), first, second]).astype(np.float64)
    count, first, second = total
    mean = first / count
    return {"mean": mean.tolist(), "std": np.sqrt(second / count - mean**2 + 1e-5).tolist()}


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
