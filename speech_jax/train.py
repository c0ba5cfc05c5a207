"""Training: the state, the jitted step, and the loop, in the order in which they run."""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from speech_jax import evaluate, experiment
from speech_jax.bundle import start as pretrained
from speech_jax.config import default, split_names
from speech_jax.preflight import hlo
from speech_jax.training import adversarial, groups, optim, sharding
from speech_jax.training import costs as flops
from speech_jax.training.checkpoint import Checkpoints
from speech_jax.training.report import Report, TrainingError
from speech_jax.training.step import SUMS, TrainState, accumulate, make_step
from speech_jax.training.stopping import EarlyStopping, catch_preemption
from speech_jax.training.watchdog import Watchdog

# ---- The state, as shapes ----------------------------------------------------------------------


def abstract_state(config: ConfigDict, task, schedule, mesh, probe):
    """The TrainState as shapes with shardings, the function that makes it, and the optimizer.

    `probe` is a batch, as shapes.
    """
    rng = jax.random.key(config.seed)
    params, model_state = jax.eval_shape(task.init, rng, probe)
    tx = optim.make_optimizer(
        schedule=schedule, params=params, defaults=default().optimizer, **config.optimizer
    )
    learned = lambda tree: groups.split(tree, groups.trainable(params, config.optimizer.frozen))[0]
    aux = jax.eval_shape(task.loss, params, model_state, probe)[2]

    def init() -> TrainState:
        blank = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in probe.items()}
        params, model_state = task.init(jax.random.key(config.seed), blank)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            rng=jax.random.key(config.seed + 1),
            params=params,
            model_state=model_state,
            opt_state=tx.init(learned(params)),
            ema=params if config.train.ema_decay else {},
            sums={name: jnp.zeros(()) for name in (*SUMS, *aux["sums"])},
        )

    shapes = jax.eval_shape(init)
    split = sharding.shard_params(params, mesh, task.rules)
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), shapes).replace(
        params=split,
        opt_state=sharding.shard_optimizer(tx, learned(params), learned(split), mesh),
        ema=split if config.train.ema_decay else {},
    )
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return abstract, init, tx


def batch_shapes(bucket, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a bucket, as shapes with shardings."""
    placed = NamedSharding(mesh, sharding.BATCH)
    rows, samples, labels = bucket.rows, bucket.samples, bucket.labels
    shapes = {
        "audio": ((rows, samples), jnp.int16),
        "audio_length": ((rows,), jnp.int32),
        "labels": ((rows, labels), jnp.int32),
        "labels_length": ((rows,), jnp.int32),
        "weight": ((rows,), jnp.float32),
        "index": ((rows,), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        for name, (shape, dtype) in shapes.items()
    }


# ---- The run -----------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: pathlib.Path) -> dict | None:
    """Trains as `config` says in `workdir`, from its newest checkpoint if there is one.

    Returns what results.json then holds, or None if it was told to leave before the end (SIGTERM):
    the same call goes on from there.

    Raises:
      TrainingError: too many updates were not finite, a batch does not fit in memory, or weights
        are frozen that were never trained.
    """
    started = time.monotonic()
    if config.optimizer.frozen and not config.init.folder:
        raise TrainingError(
            f"config.optimizer.frozen={config.optimizer.frozen} would hold random weights still: "
            "name what to start from in config.init.folder"
        )
    experiment.check_workdir(workdir, config)
    reached_preemption = catch_preemption()
    steps = config.train.steps

    # ---- Data ----------------------------------------------------------------------------------
    mesh = sharding.make_mesh(**config.mesh)
    source = experiment.open_training(config)
    task, tokenizer = experiment.open_task(config, workdir, source)
    corpus = experiment.training_corpus(config, source, tokenizer, task)
    buckets = experiment.training_buckets(config, corpus, mesh)
    eval_splits = split_names(config.data.eval_splits)
    splits = dict.fromkeys(eval_splits + split_names(config.data.test_splits))
    watchdog = Watchdog(config.checkpoint.watchdog_seconds)
    evaluator = evaluate.Evaluator(config, task, tokenizer, mesh, on_batch=watchdog.beat)
    for split in splits:
        evaluator.corpus(split)  # what is missing is said before the training, not after it

    # ---- State and step ------------------------------------------------------------------------
    schedule = optim.make_schedule(steps=steps, defaults=default().schedule, **config.schedule)
    abstract, init, tx = abstract_state(
        config, task, schedule, mesh, batch_shapes(buckets[0], mesh)
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    # ---- Restore -------------------------------------------------------------------------------
    checkpoints = Checkpoints(
        str(workdir / "checkpoints"),
        keep=config.checkpoint.keep,
        best_metric=task.metric if eval_splits else None,
    )
    stopper = EarlyStopping(config.checkpoint.patience)
    restored = checkpoints.restore(abstract)
    if restored is None:
        state, first, seconds = jax.jit(init, out_shardings=shardings)(), 0, 0.0
        if config.init.folder:
            params, stats = pretrained.with_encoder(state.params, state.model_state, config)
            ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay else {}
            state = state.replace(params=params, model_state=stats, ema=ema)
    else:
        state, first = restored.state, restored.data["next_batch"]
        seconds = restored.data["seconds"]
        stopper.from_dict(restored.stopper)
    programs = compile_steps(config, task, tx, abstract, buckets, mesh)
    experiment.record_config(workdir, config)  # all that can fail early has not
    batches = experiment.training_batches(config, corpus, buckets, first)
    report = Report(
        workdir,
        steps=steps,
        first=first,
        log_every=config.train.log_every,
        max_skipped=config.train.max_skipped,
        schedule=schedule,
        corpus=corpus,
        task=task,
    )
    parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    report.say(
        f"{corpus.seconds / 3600:.2f} h of speech in {len(corpus)} utterances, "
        f"{tokenizer.vocabulary_size if tokenizer else 'no'} labels, "
        f"{parameters / 1e6:.2f} M parameters, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, from update {first}"
    )

    # ---- Loop ----------------------------------------------------------------------------------
    with checkpoints, report, watchdog:
        for step in range(first + 1, steps + 1):
            if stopper.should_stop:
                break
            batch = next(batches)
            program = programs[batch["audio"].shape[1]]
            state, sums, finite = program.run(state, sharding.put_batch(batch, mesh))
            report.step(step, sums, finite, batch, program.flops)
            watchdog.beat()

            scores = {}
            if eval_splits and (step % config.train.eval_every == 0 or step == steps):
                with report.pause():
                    counts = score(evaluator, state, eval_splits)
                    scores = report.scores(step, counts)
                    stopper.update(scores[task.metric])
            leave = reached_preemption(step)
            if scores or leave or step % config.checkpoint.every == 0 or step == steps:
                with report.pause():
                    checkpoints.save(
                        step,
                        state,
                        data={"next_batch": step, "seconds": seconds + time.monotonic() - started},
                        stopper=stopper.to_dict(),
                        config=config.to_dict(),
                        metrics=scores,
                    )
            if leave:
                report.say(f"saved update {step}; the same command goes on from there")
                return None
        figures = report.finish()
    batches.close()

    # ---- Results -------------------------------------------------------------------------------
    best = evaluate.restore(config, workdir, mesh, task, abstract.params, abstract.model_state)
    with watchdog:
        scores = evaluate.score_splits(evaluator, *best, splits, workdir, report.say)
    seconds += time.monotonic() - started
    return evaluate.write_results(
        workdir,
        scores,
        training={
            "seconds": seconds,
            "steps": int(state.step),
            "parameters": parameters,
            **figures,
        },
        config=json.loads(config.to_json()),
        versions=versions(),
    )


class Program(NamedTuple):
    """A compiled step and its arithmetic."""

    run: Callable
    flops: float


def compile_steps(config: ConfigDict, task, tx, abstract, buckets, mesh) -> dict[int, Program]:
    """Compiles the step for every batch shape, keyed by samples: nothing is compiled later.

    A shape that does not fit in memory fails here, before the first update.
    """
    step = jit_step(config, task, tx, abstract, mesh)
    with jax.set_mesh(mesh):  # for what ops/partition.py says
        traced = [step.trace(abstract, batch_shapes(bucket, mesh)) for bucket in buckets]
        lowered = [program.lower() for program in traced]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    for bucket, program in zip(buckets, compiled, strict=True):
        _check_memory(bucket, program)
    return {
        bucket.samples: Program(run, flops.matmul_flops(program.jaxpr))
        for bucket, program, run in zip(buckets, traced, compiled, strict=True)
    }


def _check_memory(bucket, program) -> None:
    # An accelerator's compiler refuses by itself; a CPU's leaves it to the kernel to kill the run.
    if jax.devices()[0].platform != "cpu":
        return
    needed, there = hlo.memory_needed(program) * jax.local_device_count(), host_memory()
    if needed > there:
        raise TrainingError(
            f"a batch of {bucket.rows} x {bucket.samples} samples needs {needed / 2**30:.0f} GiB, "
            f"and this machine has {there / 2**30:.0f}: lower config.data.batch_seconds, raise "
            "config.train.accumulate, set config.model.remat=True or take a smaller model"
        )


def host_memory() -> int:
    """Bytes of this machine, or what its container may have of them."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such limit
        there = min(there, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def jit_step(config: ConfigDict, task, tx, abstract, mesh):
    """The step as one function over the mesh; it gives its state's memory to the next one."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = sharding.replicated(mesh)
    adversary = experiment.make_adversary(config)
    mask = groups.trainable(abstract.params, config.optimizer.frozen)
    make = lambda task: adversarial.gradients(task, adversary)
    step = make_step(
        accumulate(groups.gradients(make, task, mask), config.train.accumulate),
        tx,
        mask=mask,
        ema_decay=config.train.ema_decay,
        log_every=config.train.log_every,
    )
    return jax.jit(step, out_shardings=(shardings, everywhere, everywhere), donate_argnums=0)


def score(evaluator, state: TrainState, splits) -> dict:
    """Counts of each split with the averaged parameters, if there are any."""
    params = state.ema or state.params
    return {split: evaluator.score(params, state.model_state, split) for split in splits}


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = ("speech_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {name: importlib.metadata.version(name) for name in packages} | {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
