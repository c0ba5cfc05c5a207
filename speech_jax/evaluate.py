"""Scores of a split, whatever the task; padding and filler rows never count."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from speech_jax import experiment
from speech_jax.config import split_names
from speech_jax.errors import UserError
from speech_jax.training import checkpoint, sharding

_PREDICTIONS = "predictions"


class Evaluator:
    """Scores splits with a task; shapes that were compiled once stay compiled."""

    def __init__(self, config: ConfigDict, task, tokenizer, mesh, on_batch=lambda: None):
        """`on_batch` is called after every batch."""
        self._config, self._mesh = config, mesh
        self._task, self._tokenizer = task, tokenizer
        self._on_batch = on_batch
        self._predict = jax.jit(
            task.predict, in_shardings=(None, None, NamedSharding(mesh, sharding.BATCH))
        )
        self._corpora = {}

    def corpus(self, split: str):
        """The split's utterances, opened once."""
        if split not in self._corpora:
            self._corpora[split] = experiment.evaluation_corpus(self._config, split)
        return self._corpora[split]

    def predict(self, params, state, split: str) -> Iterator[tuple[int, dict]]:
        """(place in the source, row of the task's prediction); the same on every process."""
        batches = experiment.evaluation_batches(self._config, self.corpus(split), self._mesh)
        for batch in batches:
            index = _everywhere(sharding.put_batch({"index": batch["index"]}, self._mesh))["index"]
            with jax.set_mesh(self._mesh):
                found = self._predict(params, state, sharding.put_batch(batch, self._mesh))
            found = _everywhere(found)
            self._on_batch()
            yield from by_utterance(index, found)

    def score(self, params, state, split: str, *, predictions: pathlib.Path | None = None):
        """Counts of a split (metrics.py); details go to `predictions`, a line an utterance."""
        utterances = self.corpus(split).source.utterances
        total, lines = None, []
        for place, row in self.predict(params, state, split):
            counts, details = self._task.score(row, utterances[place], self._tokenizer)
            total = counts if total is None else total + counts
            line = {"id": utterances[place].id, **details}
            lines.append(json.dumps(line, ensure_ascii=False))
        skipped = self.corpus(split).skipped
        if skipped:
            logging.warning("%s: %d utterances could not be read: %s", split, len(skipped), skipped)
        if predictions and jax.process_index() == 0:
            predictions.parent.mkdir(exist_ok=True)
            predictions.write_text("\n".join(lines) + "\n")
        if total is None:
            raise UserError(f"{split}: no utterance could be read")
        return total


def run(config: ConfigDict, workdir: pathlib.Path, report: Callable[[str], None] = print) -> dict:
    """Evaluates the best checkpoint of a workdir on `config.data.eval_splits`.

    Adds the splits to the workdir's results.json and returns all of it.
    """
    experiment.check_workdir(workdir, config, trained=True)
    mesh = sharding.make_mesh(**config.mesh)
    task, tokenizer, params, state = open_model(config, workdir, mesh)
    evaluator = Evaluator(config, task, tokenizer, mesh)
    splits = score_splits(
        evaluator, params, state, split_names(config.data.eval_splits), workdir, report
    )
    return write_results(workdir, splits)


def by_utterance(index, found) -> Iterator[tuple[int, dict]]:
    """(place in the source, row) of a batch's predictions; filler rows are left out."""
    for number, place in enumerate(index):
        if place >= 0:
            yield int(place), {name: rows[number] for name, rows in found.items()}


def open_model(config: ConfigDict, workdir: pathlib.Path, mesh):
    """(task, tokenizer or None, parameters, model state) of the best checkpoint of a workdir."""
    task, tokenizer = experiment.open_task(config, workdir)
    shapes = jax.eval_shape(task.init, jax.random.key(0), probe(config, mesh))
    return task, tokenizer, *restore(config, workdir, mesh, task, *shapes)


class Run(NamedTuple):
    """A trained model: its configuration, its task, and the best parameters as numpy arrays."""

    config: ConfigDict
    task: Any
    tokenizer: Any  # None for a task without transcripts
    params: Any
    state: Any


def open_run(workdir: pathlib.Path) -> Run:
    """The best model of a workdir, as it was trained."""
    config = experiment.recorded_config(workdir)
    task, tokenizer, *found = open_model(config, workdir, sharding.make_mesh())
    return Run(
        config, task, tokenizer, *jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), found)
    )


def probe(config: ConfigDict, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a small batch, to initialize from."""
    rows, samples = sharding.batch_shards(mesh), config.data.sample_rate
    shapes = {
        "audio": ((rows, samples), "int16"),
        "audio_length": ((rows,), "int32"),
        "labels": ((rows, 8), "int32"),
        "labels_length": ((rows,), "int32"),
        "weight": ((rows,), "float32"),
        "index": ((rows,), "int32"),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def restore(config: ConfigDict, workdir: pathlib.Path, mesh, task, params, state):
    """The (averaged, if so trained) parameters and the model state of the best checkpoint."""
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        sharding.shard_params(params, mesh, task.rules),
    )
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), state
    )
    prefix = "ema" if config.train.ema_decay else "params"
    found = checkpoint.restore_params(
        str(workdir / "checkpoints"), {prefix: abstract, "model_state": whole}, prefix=""
    )
    return found[prefix], found["model_state"]


def score_splits(evaluator, params, state, splits, workdir, report) -> dict[str, dict]:
    """results.json's entry of each split; details go to workdir/predictions/SPLIT.jsonl."""
    results = {}
    for split in splits:
        path = workdir / _PREDICTIONS / f"{split}.jsonl"
        counts = evaluator.score(params, state, split, predictions=path)
        results[split] = counts.results()
        report(f"{split}: {counts}  ({counts.utterances} utterances)")
    return results


def write_results(workdir: pathlib.Path, splits: dict, **others) -> dict:
    """Merges into workdir/results.json; splits are added, other entries replaced."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"splits": {}}
    results["splits"].update(splits)
    results.update(others)
    if jax.process_index() == 0:
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(results, indent=2) + "\n")
        scratch.replace(path)
    return results


def _everywhere(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Global arrays as numpy on every process."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)
