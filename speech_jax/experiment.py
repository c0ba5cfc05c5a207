"""From a configuration to what a run is made of: sources, parts, corpora, plans and the task.

Training, evaluation, preflight and deployment build the same things here, so that they cannot
disagree. What a training step is made of is in setup.py.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from speech_jax import files, models, registry, tasks
from speech_jax.config import split_names
from speech_jax.data import parts as part_kinds
from speech_jax.data import pipeline, sources
from speech_jax.data.batch import Bucket, Fields, shapes
from speech_jax.data.parts import Part
from speech_jax.data.parts.audio import open_noise
from speech_jax.data.parts.category import Category
from speech_jax.data.parts.hidden import Hidden
from speech_jax.data.plan import Plan
from speech_jax.data.sources import portions
from speech_jax.decoding.decoder import OF_CTC, Decoder
from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import features
from speech_jax.tasks import Task
from speech_jax.training import groups, peft, sharding

# Batch lengths are rounded up to so much audio.
_ROUND_SECONDS = 0.1


# ---- Data --------------------------------------------------------------------------------------


def open_splits(config: ConfigDict, names: str) -> sources.Source:
    """One source of the splits in `names`, or portions of them, which are joined by commas.

    What ends in .jsonl is a manifest, whatever the source of the others is: below the root, or a
    path from the current folder.
    """
    data = config.data
    arguments = {name: value for name, value in data.arguments.items() if value is not None}
    opened = []
    for name in split_names(names):
        split, low, high = portions.parse(name)
        is_manifest = split.endswith(".jsonl")  # as of pseudo_label.py, beside any other source
        root = data.root
        if is_manifest and (not root or files.is_remote(root)):
            root = "."
        source = sources.open_source(
            "manifest" if is_manifest else data.source,
            root=root,
            split=split,
            on_error=data.on_error,
            cache=data.cache or None,
            **({} if is_manifest and data.source != "manifest" else arguments),
        )
        kept = {"within": data.portion_within, "together": data.portion_together}
        opened.append(portions.portion(source, low, high, **kept))
        if source.utterances and not opened[-1].utterances:
            raise sources.SourceError(
                f"{name} holds none of the {len(source.utterances)} utterances of {split}: take a "
                "larger portion, or set config.data.portion_together to less"
            )
    source = opened[0] if len(opened) == 1 else sources.concatenate(opened)
    return sources.only(source, data.only) if data.only else source


def open_training(config: ConfigDict) -> sources.Source:
    """The training splits, or as much of them as is asked for."""
    source = open_splits(config, config.data.train_splits)
    minutes = config.data.train_minutes
    return sources.draw(source, 60 * minutes, config.seed) if minutes else source


def make_parts(config: ConfigDict, folder: pathlib.Path, source: sources.Source) -> dict[str, Part]:
    """The parts of the configured task by their name in a batch, made of `source`.

    What they learn is saved in `folder`. All processes of a run call this together.

    Raises:
      PartError: `source` lacks what a part learns from.
      UserError: the folder cannot be written.
    """

    def make() -> None:
        for name, constructor, settings in _parts(config, making=True):
            part = constructor.make(source, name, **settings)
            with files.writing(folder):
                part.save(folder)

    sharding.from_first(make)
    return restore_parts(config, folder)


def restore_parts(config: ConfigDict, folder: pathlib.Path, whole: bool = True) -> dict[str, Part]:
    """The parts of the configured task by their name in a batch, as `folder` keeps them.

    With `whole` off, what the folder lacks is left out: such a model is good for starting from.

    Raises:
      UserError: the folder lacks what a part has learned, or it is damaged.
    """
    if not whole and config.task.name not in tasks.TASKS:
        return {}
    restored = {}
    for name, constructor, settings in _parts(config):
        try:
            restored[name] = constructor.restore(folder, name, **settings)
        except FileNotFoundError as error:
            if whole:
                lost = pathlib.Path(str(error.filename or error)).name
                raise UserError(f"{folder} holds no {lost}: train there first") from error
    return restored


def _parts(
    config: ConfigDict, making: bool = False
) -> Iterator[tuple[str, type[Part], dict[str, Any]]]:
    """(name in a batch, class, settings) of each part of the configured task."""
    for name, kind in tasks.constructor(config.task.name).parts.items():
        constructor = part_kinds.constructor(kind)
        yield name, constructor, _part_settings(config, name, kind, making)


def _part_settings(config: ConfigDict, name: str, kind: str, making: bool) -> dict[str, Any]:
    """Keyword arguments of a part's `make` and `restore`: of its kind, and its own ones."""
    own = dict(config.parts.get(name, {}))
    if kind == "transcript":
        return {**config.text, **own}
    if kind == "category" and making:
        return {"on_error": config.data.on_error, **own}
    if kind not in ("audio", "crop"):
        return own
    settings: dict[str, Any] = {"sample_rate": config.data.sample_rate}
    if config.features.normalize == "global":
        settings["moments"] = _moments(config)
        if making:
            settings["seed"] = config.seed
            settings["known"] = files.expand(config.init.folder) if config.init.folder else None
    if kind == "crop":
        settings["longest"] = config.data.max_seconds
    return settings | own


def _moments(config: ConfigDict) -> Callable[[np.ndarray], tuple]:
    """Of samples int16 [T]: log-mel frames, and the sum and the sum of squares over them [mels]."""
    settings = {k: v for k, v in config.features.items() if k != "normalize"}
    rate = config.data.sample_rate
    size = round(rate * config.data.max_seconds)

    @jax.jit
    def moments(samples, length):
        mels, frames = features.log_mel(
            features.to_waveform(samples), length, sample_rate=rate, **settings
        )
        return frames.sum(), mels.sum((0, 1)), jnp.square(mels).sum((0, 1))

    def padded(samples: np.ndarray) -> tuple:
        samples = samples[:size]
        row = np.zeros((1, size), np.int16)
        row[0, : len(samples)] = samples
        return moments(row, np.asarray([len(samples)], np.int32))

    return padded


def evaluated_splits(config: ConfigDict) -> list[str]:
    """All splits that a run evaluates, each once."""
    names = split_names(config.data.eval_splits) + split_names(config.data.test_splits)
    return list(dict.fromkeys(names))


def training_corpus(
    config: ConfigDict, source: sources.Source, parts: Mapping[str, Part], task: Task
) -> pipeline.Corpus:
    """The utterances of `source` that can be trained on; the others are counted in the log."""
    data = config.data
    if data.noise_root and "audio" in parts:
        noise = open_noise(
            data.noise_root, probability=data.noise_probability, snr_db=data.noise_snr_db
        )
        parts = {**parts, "audio": dataclasses.replace(parts["audio"], noise=noise)}
    corpus = pipeline.make_corpus(
        source,
        parts,
        unusable=task.unusable,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        max_speed=max(data.speeds),
        on_error=data.on_error,
    )
    for name, reason in list(corpus.left_out.items())[:5]:
        logging.warning("left out: %s: %s", name, reason)
    if len(corpus.left_out) > 5:
        logging.warning("left out: %d utterances in all", len(corpus.left_out))
    return corpus


def evaluation_corpus(
    config: ConfigDict,
    split: str,
    parts: Mapping[str, Part],
    unusable: Callable[[Mapping[str, np.ndarray]], Mapping[int, str]] | None = None,
) -> pipeline.Corpus:
    """All utterances of a split, but for those that are `unusable` (pipeline.make_corpus).

    None is left out for its length or for what it lacks.

    Raises:
      UserError: an utterance is longer than config.data.eval_max_seconds.
    """
    source = open_splits(config, split)
    longest = max(source.utterances, key=lambda utterance: utterance.duration, default=None)
    if longest and longest.duration > config.data.eval_max_seconds:
        raise UserError(
            f"utterance {longest.id} of {split} lasts {longest.duration:.0f} s, and "
            f"config.data.eval_max_seconds={config.data.eval_max_seconds:g}: cut it into "
            "utterances (a manifest's rows take an offset and a duration), or raise that setting"
        )
    parts = {name: part.for_evaluation() for name, part in parts.items()}
    if isinstance(hidden := parts.get("hidden"), Hidden):
        parts["hidden"] = hidden.of(split)
    try:
        return pipeline.make_corpus(source, parts, unusable=unusable, on_error=config.data.on_error)
    except pipeline.CorpusError as error:
        raise pipeline.CorpusError(f"{split}: {error}") from error


def training_plan(
    config: ConfigDict,
    corpus: pipeline.Corpus,
    task: Task,
    mesh: Mesh,
    buckets: Sequence[Bucket] | None = None,
) -> Plan:
    """The order of training and its batch shapes: `buckets`, or those that suit the corpus."""
    data = config.data
    if buckets is None:
        buckets = corpus.buckets(
            along=task.along,
            count=data.buckets,
            budget=int(data.batch_seconds * rate(config, corpus)),
            rows_multiple=sharding.batch_shards(mesh) * config.train.accumulate,
            round_to=_round_to(config, task),
            speeds=data.speeds,
        )
    return Plan(
        corpus.lengths,
        task.along,
        buckets,
        seed=config.seed,
        speeds=tuple(data.speeds),
        stretched=corpus.stretched,
        short_first=data.short_first,
    )


def training_batches(config: ConfigDict, corpus: pipeline.Corpus, plan: Plan, start: int):
    """Endless batches of this process's rows, from the batch number `start` on."""
    return pipeline.batches(
        corpus,
        plan,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        on_error=config.data.on_error,
        threads=config.data.threads,
    )


def evaluation_plan(config: ConfigDict, corpus: pipeline.Corpus, task: Task, mesh: Mesh) -> Plan:
    """One pass over a corpus, by length."""
    data = config.data
    budget = data.batch_seconds * rate(config, corpus)
    if "samples" in corpus.lengths:
        budget = max(budget, corpus.lengths["samples"].max())
    buckets = corpus.buckets(
        along=task.along,
        count=data.eval_buckets,
        budget=int(budget),
        rows_multiple=sharding.batch_shards(mesh),
        round_to=_round_to(config, task),
    )
    return Plan(corpus.lengths, task.along, buckets, shuffle=False, stretched=corpus.stretched)


def evaluation_batches(
    config: ConfigDict, corpus: pipeline.Corpus, plan: Plan
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a plan, this process's rows; the last one may hold filler rows."""
    return pipeline.batches(
        corpus,
        plan,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        repeat=False,
        on_error=config.data.on_error,
        threads=config.data.threads,
    )


def batch_shapes(fields: Fields, bucket: Bucket, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a bucket, as shapes with shardings."""
    placed = NamedSharding(mesh, sharding.BATCH)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        for name, (shape, dtype) in shapes(fields, bucket).items()
    }


def rate(config: ConfigDict, corpus: pipeline.Corpus) -> float:
    """How much of what batches are measured in there is in a second of audio."""
    hidden = corpus.parts.get("hidden")
    return hidden.rate if isinstance(hidden, Hidden) else config.data.sample_rate


def _round_to(config: ConfigDict, task: Task) -> int:
    return max(1, round(_ROUND_SECONDS * config.data.sample_rate)) if task.along == "samples" else 1


# ---- Task --------------------------------------------------------------------------------------


def make_task(config: ConfigDict, parts: Mapping[str, Part]) -> Task:
    """The task that the configuration names, around its encoder and front end if it has them."""
    arguments = dict(config.task)
    name = arguments.pop("name")
    constructor = tasks.constructor(name)
    if lacking := [part for part in constructor.parts if part not in parts]:
        raise UserError(
            f"the model has no {lacking[0]!r}, which its task {name!r} needs: it can be started "
            "from (config.init.folder), not used"
        )
    accepted = inspect.signature(constructor).parameters
    if "encoder" in accepted:
        arguments["encoder"] = models.make_encoder(**config.model)
    if "frontend" in accepted:
        arguments["frontend"] = make_frontend(config, arguments["encoder"], parts)
    if "decoder" in accepted:
        seconds = frame_seconds(config, arguments["encoder"], arguments["frontend"])
        written = parts[getattr(constructor, "text", "labels")]
        decoder = Decoder(decoder_settings(config.task, config.decoder), written, seconds)
        decoder.check_task(getattr(constructor, "searches", OF_CTC))
        arguments["decoder"] = decoder
    if "counts" in accepted:
        arguments["counts"] = {name: part.count for name, part in parts.items() if part.count}
    if "examples" in accepted:
        arguments["examples"] = {
            name: part.examples for name, part in parts.items() if isinstance(part, Category)
        }
    task = registry.call(constructor, arguments, what=f"task ({name})")
    lora = peft.LoRA(**config.lora)
    return peft.Adapted(task, lora) if lora.rank else task


def decoder_settings(task: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a decoder: those that are given, and else the usual ones of a task.

    Args:
      task, given: sections `task` and `decoder` of a configuration.
    """
    settings = tasks.settings(task["name"]) | dict(task)
    del settings["name"]
    usual = getattr(tasks.constructor(task["name"]), "usual_decoder", lambda **_: {})
    return usual(**settings) | {key: value for key, value in given.items() if value is not None}


def frame_seconds(config: ConfigDict, encoder: Any, frontend: FrontEnd) -> float:
    """Seconds from one frame of an encoder's output to the next."""
    seconds = 3600  # beside which the frames at the ends are nothing
    samples = seconds * config.data.sample_rate
    short, long = (encoder.output_lengths(frontend.lengths(n * samples)) for n in (1, 2))
    if long == short:
        raise UserError(
            f"config.features.hop_ms={config.features.hop_ms:g} and the strides of config.model "
            "make no frame of an hour of audio: lower them (10 ms are usual)"
        )
    return seconds / (int(long) - int(short))


def make_frontend(config: ConfigDict, encoder, parts: Mapping[str, Part]) -> FrontEnd:
    """What turns samples into what the encoder listens to."""
    settings = dict(config.features)
    normalize = settings.pop("normalize")
    masks = dict(config.spec_augment)
    begin = {
        "spec_augment_start": masks.pop("start_step"),
        "spec_augment_ramp": masks.pop("ramp"),
        "vocal_tract": masks.pop("vocal_tract"),
    }
    return FrontEnd(
        listens=encoder.listens,
        log_mel={"sample_rate": config.data.sample_rate, **settings},
        normalize=normalize,
        spec_augment=masks,
        **begin,
        **(parts["audio"].statistics or {}),
    )


def frozen(config: ConfigDict) -> tuple[tuple[str, int], ...]:
    """What stands still, and for how many updates: rules of `groups.thaw`.

    They are config.optimizer.frozen; LoRA and adapters are learned, unless a rule is of
    `peft.ADDED`, and the encoder that they are added to stands still where no rule says otherwise.
    So do the kernels of a decoder that LoRA is beside, where all of a model is gone on from.
    """
    rules = tuple(config.optimizer.get("frozen", ()))
    held = any(pattern == peft.ADDED for pattern, _ in rules)
    if not held and (config.lora.rank or config.model.get("adapter")):
        rules = ((peft.ADDED, 0), *rules, ("encoder/.*", groups.FOREVER))
        if config.lora.rank and config.init.take == "model":
            rules = (*rules, (config.lora.targets, groups.FOREVER))
    return rules


def above(task: Task) -> str:
    """The parameters behind the layers of a task's encoder: an expression, '' for none."""
    return getattr(getattr(task, "encoder", None), "above", "")
