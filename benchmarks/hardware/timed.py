"""Training on real speech that ends with the clock.

The step, the loader and the evaluation are those of speech_jax.main, in a loop of its own. Nobody
knows how many updates fit. So the schedule of the learning rate is one of COUNTS counts, and before
each update its count is set to the part of the time that is gone. Everything is compiled while the
steps are measured, and waits for the file `go` (accelerator.py) or for --only seconds.
"""

import argparse
import json
import pathlib
import shutil
import tarfile
import time

import jax
import numpy as np
import optax

from benchmarks.hardware import Table, compiling, forms, left, recipe, run_part
from speech_jax import bundle, experiment
from speech_jax.data.batch import signature
from speech_jax.evaluators.loop import Evaluation
from speech_jax.ops import attention
from speech_jax.setup import make_setup
from speech_jax.training import costs, sharding

COUNTS = 10_000  # of the schedule
EVALUATIONS = 3
END = 17.0  # seconds for the last evaluation and the model
PIECE = 14 << 20  # bytes of a file that comes back
SPLIT = "dev-clean-5"
LOGGED = 50  # updates between lines of metrics.jsonl


class Training:
    """A run: what it is made of, compiled."""

    def __init__(self, table: Table, flags: argparse.Namespace):
        self.table, self.flags = table, flags
        self.workdir = flags.work / "run"
        self.config = config = _config(flags)
        self.mesh = sharding.make_mesh(**config.mesh)
        source = experiment.open_training(config)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.parts = experiment.make_parts(config, self.workdir, source)
        self.task = experiment.make_task(config, self.parts)
        self.corpus = experiment.training_corpus(config, source, self.parts, self.task)
        self.plan = experiment.training_plan(config, self.corpus, self.task, self.mesh)
        self.setup = make_setup(
            config, self.task, self.corpus.fields, self.mesh, self.plan.buckets[0]
        )
        self.evaluation = Evaluation(config, self.task, self.parts, self.mesh)
        start = time.perf_counter()
        with compiling(flags.work):
            self.programs = self.setup.compile(self.plan.buckets)
            took = time.perf_counter() - start
            self.state = self.setup.fresh_state()
            self.evaluate(0, 0.0)
        table.add(
            "compiled", s=took, shapes=len(self.plan.buckets),
            with_an_evaluation_s=time.perf_counter() - start, utterances=len(self.corpus),
            hours=self.corpus.seconds / 3600, M_parameters=self.setup.parameters / 1e6,
        )  # fmt: skip

    def run(self) -> None:
        """Trains until the time ends."""
        config = self.config
        start = time.monotonic()
        total = left(self.flags) - END
        due = [total * (i + 1) / EVALUATIONS for i in range(EVALUATIONS - 1)]
        batches = experiment.training_batches(config, self.corpus, self.plan, 0)
        step, waited, samples, flops, clock = 0, 0.0, 0.0, 0.0, start
        paused = 0.0  # seconds of evaluations
        file = (self.workdir / "metrics.jsonl").open("a")
        while (gone := time.monotonic() - start) < total:
            before = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - before
            program = self.programs.at(step + 1, signature(batch))
            state = self.state.replace(
                opt_state=_at(self.state.opt_state, round(COUNTS * gone / total), self.mesh)
            )
            self.state, sums, _ = program.run(state, sharding.put_batch(batch, self.mesh))
            step += 1
            samples += float(batch["audio_length"].sum())
            flops += program.flops
            if step % LOGGED == 0:
                sums = jax.device_get(sums)
                now = time.monotonic()
                took = now - clock
                line = {
                    "step": step, "seconds": now - start, "loss": sums["loss"] / sums["weight"],
                    "grad_norm": sums["grad_norm"] / max(sums["steps"], 1),
                    "skipped": sums["skipped"], "wait": waited / took,
                    "audio_seconds_per_second": samples / config.data.sample_rate / took,
                    "mfu": flops / took / costs.peak_flops(),
                    "learning_rate": float(self.setup.schedule(round(COUNTS * gone / total))),
                }  # fmt: skip
                line = {name: float(value) for name, value in line.items()}
                file.write(json.dumps(line) + "\n")
                file.flush()
                if step % (LOGGED * 10) == 0:
                    self.table.add(f"update {step}", **line)
                waited, samples, flops, clock = 0.0, 0.0, 0.0, time.monotonic()
            if due and gone > due[0]:
                due.pop(0)
                before = time.monotonic()
                self.evaluate(step, before - start)
                self.keep()
                paused += time.monotonic() - before
                clock = time.monotonic()
                waited, samples, flops = 0.0, 0.0, 0.0
        jax.block_until_ready(self.state)
        took = time.monotonic() - start - paused
        self.table.add("training", updates=step, s=took, updates_per_s=step / took)
        batches.close()
        self.evaluate(step, time.monotonic() - start)

    def evaluate(self, step: int, seconds: float) -> None:
        """Scores the averaged parameters; writes results, predictions and the model."""
        predictions = self.workdir / "predictions" / f"{SPLIT}.jsonl"
        predictions.parent.mkdir(exist_ok=True)
        before = time.monotonic()
        score = self.evaluation.run(
            self.state.evaluated, self.state.model_state, SPLIT, predictions
        )
        if not step:
            return
        line = {"step": step, "seconds": seconds} | {
            f"{SPLIT}/{name}": value for name, value in score.rates.items() if value is not None
        }
        with (self.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        results = {"splits": {SPLIT: score.results}, "training": line}
        (self.workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self.table.add(
            f"update {step}, {SPLIT}", **score.rates, evaluation_s=time.monotonic() - before
        )

    def keep(self) -> None:
        """The model as a bundle of float16, and what was written, in files beside the table."""
        half = lambda tree: jax.tree.map(_half, jax.device_get(tree))
        model = bundle.Bundle(
            self.config, self.parts, half(self.state.evaluated), half(self.state.model_state)
        )
        shutil.rmtree(self.workdir / "model", ignore_errors=True)
        bundle.save(model, self.workdir / "model")
        whole = self.workdir.with_suffix(".tar")
        with tarfile.open(whole, "w") as tar:
            for name in ("model", "metrics.jsonl", "results.json", "predictions"):
                if (self.workdir / name).exists():
                    tar.add(self.workdir / name, f"training/{name}")
        content = whole.read_bytes()
        for number, start in enumerate(range(0, len(content), PIECE)):
            piece = self.flags.out.parent / f"training.tar.{number:02d}"
            piece.write_bytes(content[start : start + PIECE])
        self.table.add("kept", MiB=len(content) / 2**20)

    def heard(self) -> None:
        """Some lines of the predictions."""
        lines = (self.workdir / "predictions" / f"{SPLIT}.jsonl").read_text().splitlines()
        for line in lines[:: max(len(lines) // 6, 1)][:6]:
            shown = json.loads(line)
            self.table.add("heard", **{k: shown[k] for k in ("reference", "hypothesis")})


def run(table: Table, flags: argparse.Namespace) -> None:
    """Compiles, waits, trains and keeps."""
    until = time.monotonic() + float(flags.only or 0)
    try:
        training = Training(table, flags)
    except Exception as error:
        table.fail("compilation, with attention in one kernel", error)
        attention._has_kernel = lambda query: False
        training = Training(table, flags)
    while not (flags.work / "go").exists() and time.monotonic() < until:
        time.sleep(0.1)
    table.add("go", left_s=left(flags))
    try:
        training.run()
    finally:
        training.keep()
        with table.attempt("heard"):
            training.heard()


def _config(flags: argparse.Namespace):
    config = recipe.get_tiny_config() if flags.tiny else recipe.get_config()
    with config.unlocked():
        config.model.update(forms.choose(flags.forms))
        config.data.root = str(_speech(flags))
        config.data.cache = str(flags.work / "cache")
        config.data.buckets = 1 if flags.tiny else 2
        config.train.steps = COUNTS
        config.train.ema_decay = 0.9 if flags.tiny else 0.999
        config.train.log_every = LOGGED
        config.schedule = {"name": "cosine", "peak": 1.2e-3, "warmup": COUNTS // 12}
        config.spec_augment.start_step = 0 if flags.tiny else 300
        if not flags.tiny:
            config.model.dropout = 0.2
    return config


def _speech(flags: argparse.Namespace) -> pathlib.Path:
    """What speech.py has decoded, or the speech as it is given."""
    folder, until = flags.work / "speech", time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < until:
        time.sleep(0.1)
    return folder if (folder / "ready").exists() else flags.data / "LibriSpeech"


def _at(opt_state, count: int, mesh):
    """The optimizer's state, its schedule at this count."""
    kind = optax.ScaleByScheduleState
    place = sharding.replicated(mesh)

    def moved(leaf):
        if not isinstance(leaf, kind):
            return leaf
        return kind(count=jax.device_put(np.int32(count), place))

    return jax.tree.map(moved, opt_state, is_leaf=lambda leaf: isinstance(leaf, kind))


def _half(x) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float16) if x.dtype == np.float32 else x


if __name__ == "__main__":
    run_part("training", run)
