"""Training: what a run is made of, the loop, and its results, in the order in which they run."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax import bundle, experiment, files, hidden, tasks, versions
from speech_jax.bundle import runs, start
from speech_jax.config import split_names
from speech_jax.data.batch import signature
from speech_jax.data.parts import Part
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.pipeline import Corpus
from speech_jax.data.plan import Epochs, Plan
from speech_jax.data.sources import Source
from speech_jax.errors import UserError
from speech_jax.evaluators import compare, layer_weights
from speech_jax.evaluators.loop import Evaluation, alone
from speech_jax.evaluators.report import write_report
from speech_jax.tasks import Task
from speech_jax.training import costs, groups, sharding
from speech_jax.training.checkpoint import Checkpoints
from speech_jax.training.report import Report
from speech_jax.training.step import TrainState
from speech_jax.training.stopping import EarlyStopping, Interrupted, Interruption, Watched
from speech_jax.training.watchdog import Watchdog
from speech_jax.workdir import Workdir


class TrainingError(UserError):
    """The run cannot go on; the message says why."""


def run(config: ConfigDict, workdir: Workdir) -> dict | None:
    """Trains as `config` says in `workdir`, from its newest checkpoint if there is one.

    Returns what results.json then holds, or None if it was told to leave before the end (SIGTERM or
    Ctrl-C): the same call goes on from there.

    Raises:
      UserError: something that the run needs is missing or does not fit; too many updates were not
        finite; what it writes cannot be written.
    """
    with Interruption() as interruption, workdir.locked():
        try:
            if config.train.compare:
                return _run_and_compare(config, workdir, interruption)
            return _run(config, workdir, interruption)
        except Interrupted:
            print("left before it was done; the same command goes on from there", file=sys.stderr)
            return None


def _run(config: ConfigDict, workdir: Workdir, interruption: Interruption) -> dict | None:
    with contextlib.ExitStack() as stack:
        return _train(config, workdir, interruption, stack)


def _train(
    config: ConfigDict,
    workdir: Workdir,
    interruption: Interruption,
    stack: contextlib.ExitStack,
) -> dict | None:
    """`stack` closes what works beside the loop."""
    started = time.monotonic()
    frozen = experiment.frozen(config)
    if frozen and not config.init.folder:
        raise TrainingError(
            f"random weights would be held still (config.optimizer.frozen={frozen}; LoRA and "
            "adapters freeze the encoder): name what to start from in config.init.folder"
        )
    eval_splits = split_names(config.data.eval_splits)
    splits = dict.fromkeys(eval_splits + split_names(config.data.test_splits))
    workdir.check(config)
    workdir.prepare(splits)
    steps = config.train.steps
    watchdog = Watchdog(config.checkpoint.watchdog_seconds)

    # ---- Data ----------------------------------------------------------------------------------
    mesh = sharding.make_mesh(**config.mesh)
    source = experiment.open_training(config)
    if workdir.config.exists():
        parts = experiment.restore_parts(config, workdir.folder)
    elif config.init.folder and config.init.take == "model":
        parts = start.parts(config, workdir.folder)
    else:  # what a start that failed has left may be of other settings
        parts = experiment.make_parts(config, workdir.folder, source)
    task = experiment.make_task(config, parts)
    if config.data.cache_hidden:
        task, parts = hidden.replace_audio(config, task, parts, mesh)
    corpus = experiment.training_corpus(config, source, parts, task)
    plan, note = _plan(config, workdir, corpus, task, mesh)

    def on_batch() -> None:
        watchdog.beat(busy=True)  # the next batch may have to be compiled
        interruption.check()

    evaluation = Evaluation(config, task, parts, mesh, on_batch)
    for split in splits:
        evaluation.corpus(split)  # what is missing is said before the training, not after it
    interruption.check()

    # ---- Step ----------------------------------------------------------------------------------
    setup = experiment.make_setup(config, task, corpus.fields, mesh, plan.buckets[0])
    peak = costs.peak_flops() * jax.device_count()  # while nothing else is computed

    # ---- Restore -------------------------------------------------------------------------------
    watched = _watched(config, eval_splits[0], task, parts) if eval_splits else None
    stopper = EarlyStopping(
        config.checkpoint.patience,
        watched,
        min_delta=config.checkpoint.min_delta,
        patience_epochs=config.checkpoint.patience_epochs,
    )
    epochs = Epochs(plan.count)
    checkpoints = Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep, watched=watched)
    restored = checkpoints.restore(setup.abstract)
    data = restored.data if restored else {"next_batch": 0, "seconds": 0.0}
    first, seconds = data["next_batch"], data["seconds"]
    if first < steps:
        loaded = experiment.training_batches(config, corpus, plan, first)
        stack.callback(loaded.close)
        batch = next(loaded)
        batches = itertools.chain([batch], loaded)
        programs = setup.compile(plan.buckets, soonest=batch)
        stack.callback(programs.close)
    longest = plan.buckets[-1].size(task.along)
    for split in splits:
        evaluation.check_memory(split, setup.abstract.params, setup.abstract.model_state, longest)
    interruption.check()
    if restored is None:
        state, started_from = _first_state(setup)
    else:
        state, started_from = restored.state, ()
        note = stopper.from_dict(restored.stopper) or note
    if first < steps:
        programs.at(first + 1, signature(batch))
    workdir.record(config)  # all that can fail early has not
    workdir.record_plan(plan.buckets, corpus.fingerprint(), len(corpus))
    report = Report(
        workdir.metrics,
        workdir.tensorboard,
        steps=steps,
        first=first,
        log_every=config.train.log_every,
        sample_rate=parts["hidden"].rate if config.data.cache_hidden else config.data.sample_rate,
        peak_flops=peak,
        learning_rate=setup.schedule,
        figures=task.figures,
        name=lambda index: source.utterances[index].id,
        unreadable=lambda: len(corpus.skipped),
    )
    report.from_dict(data.get("totals", {}))
    opening = _opening(corpus, parts, setup, first)
    for line in (*_table(setup), *started_from, opening, note, *_lost(parts, source)):
        if line:
            report.say(line)

    if restored is None and config.train.compare:
        untouched = workdir.before("untouched")
        scores = measure(
            evaluation,
            state.params,
            state.model_state,
            _compared(config),
            untouched,
            lambda line: report.say(f"before, {line}"),
        )
        untouched.write_results(scores)

    # ---- Loop ----------------------------------------------------------------------------------
    def save(step: int, scores: dict[str, float | None], pending: bool = False) -> None:
        position = {"next_batch": step, "seconds": seconds + time.monotonic() - started}
        with watchdog.busy():
            checkpoints.save(
                step,
                state,
                data=position | {"totals": report.to_dict(), "pending": pending},
                stopper=stopper.to_dict(),
                config=files.plain(config),
                metrics=scores,
            )

    def evaluate(step: int) -> dict[str, float | None]:
        """The scores of the first split, or Interrupted."""
        found = {}
        for split in eval_splits:
            found[split] = evaluation.run(state.evaluated, state.model_state, split)
        rates = {
            split: {name: value for name, value in score.rates.items() if value is not None}
            for split, score in found.items()
        }
        report.scores(step, rates, {split: score.line for split, score in found.items()})
        first = found[eval_splits[0]]
        stopper.update(first.results, epochs.after(step))
        return first.rates | {watched.metric: first.results[watched.metric]}

    def is_due(step: int) -> bool:
        """Whether an evaluation is to be made after an update."""
        if not eval_splits:
            return False
        if config.train.eval_epochs:
            return step == steps or epochs.passed(step, config.train.eval_epochs)
        return step == steps or step % config.train.eval_every == 0

    with checkpoints, report, watchdog:
        if data.get("pending"):  # the run left before this evaluation was done
            with report.pause():
                save(first, evaluate(first))
        for step in range(first + 1, steps + 1):
            if stopper.should_stop:
                break
            batch = next(batches)
            shape = signature(batch)
            if not programs.has(step, shape):  # it is still being compiled
                with report.pause(), watchdog.busy():
                    programs.at(step, shape)
            program = programs.at(step, shape)
            state, sums, finite = program.run(state, sharding.put_batch(batch, mesh))
            report.step(step, sums, finite, batch["index"], program.flops)
            _check(report, config.train.max_skipped, task)
            checkpoints.check()
            watchdog.beat()

            due = is_due(step)
            leave = interruption.asked()
            if due or leave or step % config.checkpoint.every == 0 or step == steps:
                with report.pause():
                    scores = {}
                    if due and not leave:
                        try:
                            watchdog.beat(busy=True)
                            scores = evaluate(step)
                        except Interrupted:
                            leave = True
                    save(step, scores, pending=due and leave)
            if leave:
                with watchdog.busy():
                    checkpoints.wait()
                report.say(f"saved update {step}; the same command goes on from there")
                return None
        figures = report.finish()
        _check(report, config.train.max_skipped, task)

    # ---- Results -------------------------------------------------------------------------------
    # As it was trained, LoRA beside the kernels: nothing has to be compiled again.
    params, model_state = bundle.on_mesh(runs.open_workdir(workdir.folder), mesh)
    with watchdog:
        scores = measure(evaluation, params, model_state, splits, workdir, report.say)
    training = {
        "seconds": seconds + time.monotonic() - started,
        "steps": int(state.step),
        "parameters": setup.parameters,
        "left_out": len(corpus.left_out),
        "unreadable": len(corpus.skipped),
        **figures,
    }
    if "layer_weights" in params:  # what is where in the encoder (tasks/classify.py)
        training["layer_weights"] = layer_weights.shares(params["layer_weights"])
        if jax.process_index() == 0:
            with files.writing(workdir.layer_weights):
                layer_weights.draw(training["layer_weights"], workdir.layer_weights)
    return workdir.write_results(
        scores,
        training=training,
        config=files.plain(config),
        versions=versions.versions() | {"device": _device()},
    )


def _run_and_compare(
    config: ConfigDict, workdir: Workdir, interruption: Interruption
) -> dict | None:
    """As `_run`, and what has been gained: over the head alone, or over the start as it was.

    The head alone is fitted in a run of its own, on the hidden states of the encoder as it is.
    """
    before = {"untouched": workdir.before("untouched")}
    alone = _head_alone(config)
    if alone is not None:
        before["head"] = workdir.before("head")
        if not before["head"].results.exists():
            print("the head alone:", flush=True)
            with before["head"].locked():
                if _run(alone, before["head"], interruption) is None:
                    return None
        print("all that learns:", flush=True)
    results = _run(config, workdir, interruption)
    if results is None:
        return None
    start = before.get("head", before["untouched"])
    measured = {
        name: files.read_json(one.results)["splits"]
        for name, one in before.items()
        if one.results.exists()
    }
    parts = experiment.restore_parts(config, workdir.folder)
    tallies = getattr(experiment.make_task(config, parts).evaluator(parts), "tallies", None)
    gains = {
        split: compare.gain(tallies, start.predictions(split), workdir.predictions(split))
        for split in _compared(config)
        if tallies and start.predictions(split).exists()
    }
    for split, found in gains.items():
        if found["interval"]:
            low, high = (100 * value for value in found["interval"])
            print(
                f"{split}: {found['metric']} {100 * found['before']:.2f}% before, "
                f"{100 * found['after']:.2f}% after, gain {100 * found['gain']:.2f} points "
                f"(95%: {low:.2f} to {high:.2f})"
            )
    return workdir.write_results({}, before=measured, gain=gains)


def _compared(config: ConfigDict) -> list[str]:
    """The splits on which the start is measured: those of the test, or else of the evaluations."""
    return split_names(config.data.test_splits) or split_names(config.data.eval_splits)


def _head_alone(config: ConfigDict) -> ConfigDict | None:
    """The run that fits the head alone on what this one starts from; None where this one does."""
    frozen = ("encoder/.*", -1)
    task = tasks.constructor(config.task.name)
    held = [tuple(rule) for rule in config.optimizer.get("frozen", ())]
    if not hasattr(task, "encode") or not config.init.folder or frozen in held:
        return None
    alone = config.copy_and_resolve_references()
    with alone.unlocked():
        alone.optimizer.frozen = (frozen,)
        alone.data.update({"cache_hidden": True, "speeds": (1.0,), "noise_root": ""})
        alone.spec_augment.update({"time_masks": 0, "frequency_masks": 0, "time_warp": 0})
        alone.adversarial.method = "none"
        alone.lora.rank = 0
        alone.task.mixup = 0.0
        if "adapter" in alone.model:
            alone.model.adapter = 0
        alone.train.compare = False
    return alone.lock()


def _plan(
    config: ConfigDict, workdir: Workdir, corpus: Corpus, task: Task, mesh: Mesh
) -> tuple[Plan, str]:
    """The plan of the run, that of its first start, and what is to be said of it."""
    recorded = workdir.recorded_plan()
    if recorded is None:
        return experiment.training_plan(config, corpus, task, mesh), ""
    parts = sharding.batch_shards(mesh) * config.train.accumulate
    for bucket in recorded.buckets:
        if bucket.rows % parts:
            raise TrainingError(
                f"this run trains on batches of {bucket.rows} rows, which {parts} parts (devices "
                "along the batch x config.train.accumulate) cannot share: use a mesh whose parts "
                "divide them, or another --workdir"
            )
    plan = experiment.training_plan(config, corpus, task, mesh, recorded.buckets)
    if recorded.fingerprint == corpus.fingerprint():
        return plan, ""
    note = (
        f"the training data is not what this run began with ({recorded.utterances} utterances "
        f"then, {len(corpus)} now)"
    )
    if not plan.holds_all():
        raise TrainingError(f"{note}, and its batches do not hold it: use another --workdir")
    return plan, f"{note}: from here on the order of the data is another"


def _watched(config: ConfigDict, split: str, task: Task, parts: Mapping[str, Part]) -> Watched:
    """What picks the best checkpoint: what the configuration names, or the task.

    Raises:
      TrainingError: a metric that nothing measures.
    """
    settings = config.checkpoint
    if not settings.metric:
        return Watched(split, *task.best)
    measured = task.evaluator(parts).results()
    known = [name for name, value in measured.items() if not isinstance(value, Mapping)]
    if settings.metric not in known:
        raise TrainingError(
            f"config.checkpoint.metric={settings.metric!r} is not measured; there are "
            f"{', '.join(known)}"
        )
    return Watched(split, settings.metric, settings.mode)


def _first_state(setup: experiment.Setup) -> tuple[TrainState, Iterable[str]]:
    """The state that training begins with, and what is to be said of it.

    It is random, but for what config.init takes of a bundle.
    """
    state, config = setup.fresh_state(), setup.config
    if not config.init.folder:
        return state, ()
    params, stats, report = start.with_bundle(state.params, state.model_state, config)
    ema = {}
    if config.train.ema_decay:
        mask = groups.trainable(params, experiment.frozen(config))
        ema = jax.tree.map(jnp.copy, groups.split(params, mask)[0])
    return state.replace(params=params, model_state=stats, ema=ema), tuple(report.lines())


def _table(setup: experiment.Setup) -> list[str]:
    """What learns, how fast and with how much decay."""
    optimizer = setup.config.optimizer
    settings = {
        key: optimizer[key] for key in ("decay", "rates", "layer_decay") if key in optimizer
    }
    frozen = experiment.frozen(setup.config)
    return groups.shown(groups.table(setup.abstract.params, frozen=frozen, **settings))


def _opening(corpus: Corpus, parts: Mapping[str, Part], setup: experiment.Setup, first: int) -> str:
    """What is trained on what, in a line."""
    counts = [f"{part.count} {name}" for name, part in parts.items() if part.count]
    return ", ".join(
        [
            f"{corpus.seconds / 3600:.2f} h of speech in {len(corpus)} utterances",
            *counts,
            f"{setup.parameters / 1e6:.2f} M parameters",
            _device(),
            f"from update {first}",
        ]
    )


def _lost(parts: Mapping[str, Part], source: Source) -> Iterator[str]:
    """What the normalizers of transcripts drop of the training data, in a line each."""
    for name, part in parts.items():
        if isinstance(part, Transcript):
            lost = part.dropped(source.utterances)
            if lost:
                total = sum(lost.values())
                most = ", ".join(f"{character!r} {n}" for character, n in lost.most_common(8))
                yield (
                    f"the normalizer of {name} drops {total} letters, marks or numbers of the "
                    f"training texts: {most} (config.text.normalizer='words' keeps them)"
                )


def _device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _check(report: Report, most: int, task: Task) -> None:
    """Ends a run that is of no use: too many updates were skipped, or the task finds so."""
    if report.skipped > most:
        raise TrainingError(
            f"{report.skipped} updates were not finite, more than config.train.max_skipped={most}: "
            "lower the learning rate or look at the utterances above"
        )
    if report.figures:
        task.check(report.figures, report.logged)


# ---- Evaluation --------------------------------------------------------------------------------


def evaluate(config: ConfigDict, workdir: Workdir, say: Callable[[str], None] = print) -> dict:
    """Evaluates the best checkpoint of a workdir on `config.data.eval_splits`.

    Adds the splits to the workdir's results.json and returns all of it. The model is what the
    workdir records; `config` says on what data and devices it is evaluated.
    """
    model = bundle.open(workdir.folder)
    config = bundle.for_use(model, config)
    splits = split_names(config.data.eval_splits)
    with alone(workdir, splits) as on_batch:
        mesh = sharding.make_mesh(**config.mesh)
        task = experiment.make_task(config, model.parts)
        params, state = bundle.on_mesh(model, mesh)
        evaluation = Evaluation(config, task, model.parts, mesh, on_batch)
        longest = round(config.data.max_seconds * config.data.sample_rate)
        decoder = getattr(task, "decoder", None)
        if decoder:
            say(f"decoder: {decoder.settings}")
        for split in splits:
            evaluation.check_memory(split, params, state, longest)
        found = measure(evaluation, params, state, splits, workdir, say)
        used = {"decoder": decoder.settings.used()} if decoder else {}
        results = workdir.write_results(found, **used)
        corpora = {split: evaluation.corpus(split) for split in splits}
        if write_report(workdir, task.evaluator(model.parts), corpora, results):
            say(f"report: {workdir.report}")
        return results


def measure(
    evaluation: Evaluation,
    params: Any,
    state: Any,
    splits: Iterable[str],
    workdir: Workdir,
    say: Callable[[str], None],
) -> dict[str, dict]:
    """results.json's entry of each split; details go to the workdir's predictions."""
    results = {}
    decoder = getattr(evaluation.task, "decoder", None)
    how = {"decoder": str(decoder.settings)} if decoder else {}
    for split in splits:
        score = evaluation.run(params, state, split, workdir.predictions(split))
        results[split] = score.results | how
        say(f"{split}: {score.line}")
    return results
