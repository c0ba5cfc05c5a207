"""Training: the loop and its results, in the order in which they run."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from speech_jax import bundle, experiment, files, gain, hidden, versions
from speech_jax.bundle import runs, start
from speech_jax.config import split_names
from speech_jax.data.batch import signature
from speech_jax.data.plan import Epochs
from speech_jax.evaluators import layer_weights
from speech_jax.evaluators.generated import Generated
from speech_jax.evaluators.loop import Evaluation, alone, measure
from speech_jax.evaluators.report import write_report
from speech_jax.run_data import RunData, TrainingError, open_data, opening
from speech_jax.setup import Setup, make_setup
from speech_jax.tasks import Task
from speech_jax.training import costs, groups, sharding
from speech_jax.training.checkpoint import Checkpoints
from speech_jax.training.report import Report
from speech_jax.training.step import TrainState
from speech_jax.training.stopping import EarlyStopping, Interrupted, Interruption, Watched
from speech_jax.training.watchdog import Watchdog
from speech_jax.workdir import Workdir

# What is called with the state that a run begins with: (evaluation, state, say).
AtStart = Callable[[Evaluation, TrainState, Callable[[str], None]], None]


def run(config: ConfigDict, workdir: Workdir) -> dict | None:
    """Trains as `config` says in `workdir`, from its newest checkpoint if there is one.

    Returns what results.json then holds, or None if it was told to leave before the end (SIGTERM or
    Ctrl-C): the same call goes on from there.

    Raises:
      UserError: something that the run needs is missing or does not fit; too many updates were not
        finite; what it writes cannot be written.
    """
    with Interruption() as interruption, workdir.locked():

        def train(
            config: ConfigDict, workdir: Workdir, at_start: AtStart = lambda *_: None
        ) -> dict | None:
            return _run(config, workdir, interruption, at_start)

        try:
            if config.train.compare:
                return gain.run(config, workdir, train)
            return train(config, workdir)
        except Interrupted:
            print("left before it was done; the same command goes on from there", file=sys.stderr)
            return None


def _run(
    config: ConfigDict, workdir: Workdir, interruption: Interruption, at_start: AtStart
) -> dict | None:
    started = time.monotonic()
    _check_frozen(config)
    workdir.check(config)
    workdir.prepare(experiment.evaluated_splits(config))
    watchdog = Watchdog(config.checkpoint.watchdog_seconds)

    def on_batch() -> None:
        watchdog.beat(busy=True)  # the next batch may have to be compiled
        interruption.check()

    data = open_data(config, workdir, on_batch)
    interruption.check()
    costs.peak_flops()  # measured while nothing else is computed
    with contextlib.ExitStack() as stack:
        loop = _Loop(config, workdir, data, started, watchdog, interruption, stack)
        if loop.begins:
            at_start(data.evaluation, loop.state, loop.report.say)
        with loop.checkpoints, loop.report, watchdog:
            figures = loop.run()
    if figures is None:
        return None
    return _results(loop, figures)


def _check_frozen(config: ConfigDict) -> None:
    """Raises TrainingError where random weights would stand still."""
    if (frozen := experiment.frozen(config)) and not config.init.folder:
        raise TrainingError(
            f"random weights would be held still (config.optimizer.frozen={frozen}; LoRA and "
            "adapters freeze the encoder): name what to start from in config.init.folder"
        )


# ---- The loop ----------------------------------------------------------------------------------


class _Loop:
    """The updates of a run from where it left off, with its evaluations and checkpoints.

    Attributes:
      state: what the updates change.
      begins: whether there was no checkpoint to go on from.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        data: RunData,
        started: float,
        watchdog: Watchdog,
        interruption: Interruption,
        stack: contextlib.ExitStack,
    ):
        """Restores what there is, and makes the workdir one of this run.

        `started` is a time; `stack` ends what works beside the loop: loading and compiling.
        """
        self.config, self.workdir, self.data = config, workdir, data
        self.setup = setup = make_setup(
            config, data.task, data.corpus.fields, data.mesh, data.plan.buckets[0]
        )
        self._started, self._watchdog, self._interruption = started, watchdog, interruption
        self._splits = split_names(config.data.eval_splits)
        self._watched = _watched(config, self._splits[0], data) if self._splits else None
        self._generated = None
        if self._splits and hasattr(data.task, "generate"):
            corpus, rate = data.evaluation.corpus(self._splits[0]), config.data.sample_rate
            self._generated = Generated(data.task, corpus, rate, data.mesh, workdir)
        settings = config.checkpoint
        self.stopper = EarlyStopping(
            settings.patience,
            self._watched,
            min_delta=settings.min_delta,
            patience_epochs=settings.patience_epochs,
        )
        self.checkpoints = Checkpoints(
            workdir.checkpoints, keep=settings.keep, watched=self._watched
        )
        self._epochs = Epochs(data.plan.count)
        restored = self.checkpoints.restore(setup.abstract)
        self.begins = restored is None
        position = restored.data if restored else {"next_batch": 0, "seconds": 0.0}
        self._first, self._before = position["next_batch"], position["seconds"]
        self._pending = position.get("pending", False)
        self._batches, self._programs = iter(()), None
        if self._first < config.train.steps:
            self._compile(stack)
        self._check_memory()
        if restored is None:
            self.state, notes = _first_state(setup)
        else:
            self.state, notes = restored.state, (self.stopper.from_dict(restored.stopper),)
            if isinstance(data.task, hidden.OnHidden):
                data.task.check_encoder(self.state.params)
        interruption.check()
        if self._programs:
            self._programs.at(self._first + 1, self._shape)
        workdir.record(config)  # all that can fail early has not
        workdir.record_plan(data.plan.buckets, data.corpus.fingerprint(), len(data.corpus))
        workdir.write_left_out(data.left_out(experiment.evaluated_splits(config)))
        self.report = _report(config, workdir, data, setup, self._first)
        self.report.from_dict(position.get("totals", {}))
        for line in (*_table(setup), *notes, *opening(data, setup, self._first)):
            if line:
                self.report.say(line)

    def _compile(self, stack: contextlib.ExitStack) -> None:
        """Begins to load and to compile; the first batch says which step is compiled first."""
        data = self.data
        loaded = experiment.training_batches(self.config, data.corpus, data.plan, self._first)
        stack.callback(loaded.close)
        batch = next(loaded)
        self._batches, self._shape = itertools.chain([batch], loaded), signature(batch)
        self._programs = self.setup.compile(data.plan.buckets, soonest=batch)
        stack.callback(self._programs.close)

    def _check_memory(self) -> None:
        """Raises UserError where evaluations do not fit; they are compiled if they must be."""
        shapes, data = self.setup.abstract, self.data
        longest = data.plan.buckets[-1].size(data.task.along)
        for split in experiment.evaluated_splits(self.config):
            data.evaluation.check_memory(split, shapes.params, shapes.model_state, longest)

    @property
    def seconds(self) -> float:
        """How long the run has worked, in all of its processes."""
        return self._before + time.monotonic() - self._started

    def run(self) -> dict[str, Any] | None:
        """Trains to the end; the figures of it, or None where the run was told to leave."""
        steps = self.config.train.steps
        if self._pending:  # the run left before this evaluation was done
            with self.report.pause():
                self._save(self._first, self._evaluate(self._first))
        for step in range(self._first + 1, steps + 1):
            if self.stopper.should_stop:
                self.report.say(f"stopped after update {step - 1}: {self.stopper.why}")
                break
            self._update(step, next(self._batches))
            if self._pause(step):
                return self._leave(step)
        figures = self.report.finish()
        _check(self.report, self.config.train.max_skipped, self.data.task)
        return figures

    def _update(self, step: int, batch: Any) -> None:
        shape = signature(batch)
        if not self._programs.has(step, shape):  # it is still being compiled
            with self.report.pause(), self._watchdog.busy():
                self._programs.at(step, shape)
        program = self._programs.at(step, shape)
        self.state, sums, finite = program.run(
            self.state, sharding.put_batch(batch, self.data.mesh)
        )
        self.report.step(step, sums, finite, batch["index"], program.flops)
        _check(self.report, self.config.train.max_skipped, self.data.task)
        self.checkpoints.check()
        self._watchdog.beat()

    def _pause(self, step: int) -> bool:
        """Evaluates and saves where it is time for it; returns whether the run must leave."""
        last = step == self.config.train.steps
        due = bool(self._splits) and (last or self._is_due(step))
        leave = self._interruption.asked()
        if not (due or leave or last or step % self.config.checkpoint.every == 0):
            return False
        with self.report.pause():
            scores = {}
            if due and not leave:
                try:
                    self._watchdog.beat(busy=True)
                    scores = self._evaluate(step)
                except Interrupted:
                    leave = True
            self._save(step, scores, pending=due and leave)
        return leave

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation is to be made after an update, which is not the last."""
        settings = self.config.train
        if settings.eval_epochs:
            return self._epochs.passed(step, settings.eval_epochs)
        return step % settings.eval_every == 0

    def _evaluate(self, step: int) -> dict[str, float | None]:
        """The scores of the first split, or Interrupted."""
        evaluate = self.data.evaluation.run
        found = {
            split: evaluate(self.state.evaluated, self.state.model_state, split)
            for split in self._splits
        }
        rates = {
            split: {name: value for name, value in score.rates.items() if value is not None}
            for split, score in found.items()
        }
        self.report.scores(step, rates, {split: score.line for split, score in found.items()})
        if self._generated:
            self._generated.write(self.state.evaluated, self.state.model_state, step)
        first, metric = found[self._splits[0]], self._watched.metric
        self.stopper.update(first.results, self._epochs.after(step))
        return first.rates | {metric: first.results[metric]}

    def _save(self, step: int, scores: dict[str, float | None], pending: bool = False) -> None:
        data = {
            "next_batch": step,
            "seconds": self.seconds,
            "totals": self.report.to_dict(),
            "pending": pending,
        }
        with self._watchdog.busy():
            self.checkpoints.save(
                step,
                self.state,
                data=data,
                stopper=self.stopper.to_dict(),
                config=files.plain(self.config),
                metrics=scores,
            )

    def _leave(self, step: int) -> None:
        with self._watchdog.busy():
            self.checkpoints.wait()
        self.report.say(f"saved update {step}; the same command goes on from there")

    def measure(self) -> tuple[dict[str, dict], Any]:
        """The scores of the best checkpoint on all splits, and its parameters."""
        # As it was trained, LoRA beside the kernels: nothing has to be compiled again.
        model = runs.open_workdir(self.workdir.folder)
        params, state = bundle.on_mesh(model, self.data.mesh)
        splits, evaluation = experiment.evaluated_splits(self.config), self.data.evaluation
        with self._watchdog:
            scores = measure(evaluation, params, state, splits, self.workdir, self.report.say)
        return scores, params


def _results(loop: _Loop, figures: Mapping[str, Any]) -> dict:
    """Writes what a run has come to; returns what results.json then holds."""
    corpus, workdir = loop.data.corpus, loop.workdir
    scores, params = loop.measure()
    workdir.write_left_out(loop.data.left_out(experiment.evaluated_splits(loop.config)))
    training = {
        "seconds": loop.seconds,
        "steps": int(loop.state.step),
        "parameters": loop.setup.parameters,
        "left_out": len(corpus.left_out),
        "unreadable": len(corpus.skipped),
        **figures,
        **layer_weights.found(params, workdir.layer_weights),
    }
    return workdir.write_results(
        scores,
        training=training,
        config=files.plain(loop.config),
        versions=versions.versions() | {"device": sharding.described()},
    )


def _watched(config: ConfigDict, split: str, data: RunData) -> Watched:
    """What picks the best checkpoint: what the configuration names, or the task.

    Raises:
      TrainingError: a metric that nothing measures.
    """
    settings = config.checkpoint
    if not settings.metric:
        return Watched(split, *data.task.best)
    measured = data.task.evaluator(data.parts).results()
    known = [name for name, value in measured.items() if not isinstance(value, Mapping)]
    if settings.metric not in known:
        raise TrainingError(
            f"config.checkpoint.metric={settings.metric!r} is not measured; there are "
            f"{', '.join(known)}"
        )
    return Watched(split, settings.metric, settings.mode)


def _first_state(setup: Setup) -> tuple[TrainState, Iterable[str]]:
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


def _report(
    config: ConfigDict, workdir: Workdir, data: RunData, setup: Setup, first: int
) -> Report:
    """What is said and logged of a run, from the update `first` on."""
    return Report(
        workdir.metrics,
        workdir.tensorboard,
        steps=config.train.steps,
        first=first,
        log_every=config.train.log_every,
        sample_rate=experiment.rate(config, data.corpus),
        peak_flops=costs.peak_flops() * jax.device_count(),
        learning_rate=setup.schedule,
        figures=data.task.figures,
        name=lambda index: data.source.utterances[index].id,
        unreadable=lambda: len(data.corpus.skipped),
    )


def _table(setup: Setup) -> list[str]:
    """What learns, how fast and with how much decay."""
    optimizer = setup.config.optimizer
    settings = {
        key: optimizer[key] for key in ("decay", "rates", "layer_decay") if key in optimizer
    }
    frozen = experiment.frozen(setup.config)
    settings |= {"frozen": frozen, "above": experiment.above(setup.task)}
    return groups.shown(groups.table(setup.abstract.params, **settings))


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
            evaluation.check(split)
            evaluation.check_memory(split, params, state, longest)
        found = measure(evaluation, params, state, splits, workdir, say)
        used = {"decoder": decoder.settings.used()} if decoder else {}
        results = workdir.write_results(found, **used)
        corpora = {split: evaluation.corpus(split) for split in splits}
        if write_report(workdir, task.evaluator(model.parts), corpora, results):
            say(f"report: {workdir.report}")
        return results
