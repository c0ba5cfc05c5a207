"""The evaluation of a split: predictions on the device, measures on the host, neither waiting.

Batches are dispatched one after another; a thread of its own reads what comes back, so the device
has the next batch while the host works on the last one.
"""

import collections
import concurrent.futures
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from speech_jax import experiment, files
from speech_jax.data.parts import Part
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import Evaluator, Row
from speech_jax.tasks import Task
from speech_jax.training import costs, sharding
from speech_jax.training.stopping import Interrupted, Interruption
from speech_jax.workdir import Workdir

# Batches that may be on the device, or on their way back, while the next one is loaded.
_WAITING = 2


@contextlib.contextmanager
def alone(workdir: Workdir, splits: Iterable[str] = ()) -> Iterator[Callable[[], None]]:
    """The only command in a workdir, to evaluate `splits`; yields what to call after every batch.

    Raises:
      UserError: another run is there, it cannot be written, or the command was told to leave.
    """
    with Interruption() as interruption, workdir.locked():
        workdir.prepare(splits)
        try:
            yield interruption.check
        except Interrupted:
            raise UserError(
                "interrupted: nothing was written; run the same command again"
            ) from None


class Score(NamedTuple):
    """What was measured of a split.

    `results` is its entry in results.json, `rates` what is logged while training, `line` is for
    people; all say how many utterances they are of.
    """

    results: dict[str, float | None]
    rates: dict[str, float | None]
    line: str


class Evaluation:
    """Measures splits with a task's evaluator; shapes that were compiled once stay compiled."""

    def __init__(
        self,
        config: ConfigDict,
        task: Task,
        parts: Mapping[str, Part],
        mesh: Mesh,
        on_batch: Callable[[], None] = lambda: None,
    ):
        """`on_batch` is called after every batch; what it raises ends the evaluation."""
        self._config, self.task, self._parts, self._mesh = config, task, parts, mesh
        self._on_batch = on_batch
        self._corpora: dict[str, Corpus] = {}
        shared = jax.process_count() > 1

        def predict(params: Any, state: Any, batch: Mapping[str, jax.Array]) -> tuple:
            # A process holds only its own rows of a batch: those of the others come with the rest.
            return task.predict(params, state, batch), (batch if shared else {})

        self._predict = jax.jit(
            predict,
            in_shardings=(None, None, NamedSharding(mesh, sharding.BATCH)),
            out_shardings=sharding.replicated(mesh),
        )

    def corpus(self, split: str) -> Corpus:
        """The split's utterances, opened once."""
        if split not in self._corpora:
            found = experiment.evaluation_corpus(self._config, split, self._parts)
            self._corpora[split] = found
        return self._corpora[split]

    def check_memory(self, split: str, params: Any, state: Any, fits: int) -> None:
        """Raises UserError where the longest utterances of a split do not fit in memory.

        `params` and `state` may be shapes; batches up to the length `fits` are known to fit.
        """
        corpus = self.corpus(split)
        plan = experiment.evaluation_plan(self._config, corpus, self.task, self._mesh)
        if plan.buckets[-1].size(self.task.along) <= fits:
            return
        batch = experiment.batch_shapes(corpus.fields, plan.buckets[-1], self._mesh)
        with jax.set_mesh(self._mesh):
            program = self._predict.lower(params, state, batch)
        longest = corpus.source.utterances[corpus.index[corpus.lengths[self.task.along].argmax()]]
        costs.compile_within_memory(
            program,
            f"evaluating utterance {longest.id} of {split} ({longest.duration:.0f} s)",
            "cut it into utterances, lower config.data.batch_seconds or take a smaller model",
        )

    def run(
        self, params: Any, state: Any, split: str, predictions: pathlib.Path | None = None
    ) -> Score:
        """Measures a split; the lines of its utterances go to the file `predictions`.

        An evaluator that draws does so beside it.

        Raises:
          UserError: no utterance could be read, or the predictions cannot be written.
        """
        corpus = self.corpus(split)
        reader = _Reader(self.task.evaluator(self._parts), corpus, keep=predictions is not None)
        plan = experiment.evaluation_plan(self._config, corpus, self.task, self._mesh)
        batches = experiment.evaluation_batches(self._config, corpus, plan)
        waiting = collections.deque()
        with (
            contextlib.closing(batches),
            concurrent.futures.ThreadPoolExecutor(1) as thread,
            jax.set_mesh(self._mesh),
        ):
            for batch in batches:
                found = self._predict(params, state, sharding.put_batch(batch, self._mesh))
                waiting.append(thread.submit(reader.read, batch, *found))
                if len(waiting) > _WAITING:
                    waiting.popleft().result()
                self._on_batch()
            while waiting:
                waiting.popleft().result()
        if jax.process_index() == 0 and predictions is not None and reader.heard:
            with files.writing(predictions):
                files.write_atomically(predictions, "".join(reader.lines))
                if draw := getattr(reader.evaluator, "draw", None):
                    draw(predictions.with_suffix(".png"))
        return _agree(split, reader)


class _Reader:
    """Brings predictions to the host and hands them to an evaluator, on the first process."""

    def __init__(self, evaluator: Evaluator, corpus: Corpus, keep: bool):
        self.evaluator, self.corpus, self.heard = evaluator, corpus, 0
        self.lines: list[str] = []
        self._keep = keep

    def read(
        self,
        batch: Mapping[str, np.ndarray],
        found: Mapping[str, jax.Array],
        shared: Mapping[str, jax.Array],
    ) -> None:
        if jax.process_index():
            jax.block_until_ready(found)  # the processes stay together, and leave together
            return
        prediction = {name: np.asarray(value.addressable_data(0)) for name, value in found.items()}
        shared = {name: np.asarray(value.addressable_data(0)) for name, value in shared.items()}
        for utterance, example, row in by_utterance(self.corpus, shared or batch, prediction):
            line = self.evaluator.add(utterance, example, row)
            self.heard += 1
            if self._keep:
                line = {"id": utterance.id, **line}
                self.lines.append(json.dumps(line, ensure_ascii=False) + "\n")


def by_utterance(
    corpus: Corpus, batch: Mapping[str, np.ndarray], prediction: Mapping[str, np.ndarray]
) -> Iterator[tuple[Utterance, Row, Row]]:
    """(utterance, its row of the batch, its row of the prediction); filler rows are left out."""
    for number, index in enumerate(batch["index"]):
        if index >= 0:
            rows = (
                {name: array[number] for name, array in of.items()} for of in (batch, prediction)
            )
            yield corpus.source.utterances[index], *rows


def _agree(split: str, reader: _Reader) -> Score:
    """The score, the same on every process."""
    corpus, evaluator = reader.corpus, reader.evaluator
    content: dict[str, Any] = {"heard": reader.heard, "skipped": corpus.skipped}
    if reader.heard:
        content |= {"results": evaluator.results(), "line": evaluator.line()}
    content = _from_first_process(content)
    if not content["heard"]:
        first = next(iter(content["skipped"].items()), ("", "it is empty"))
        raise UserError(f"{split}: no utterance could be read ({': '.join(first).strip(': ')})")
    heard, total = content["heard"], len(corpus.source.utterances) + len(corpus.source.skipped)
    if heard < total:
        reasons = [*content["skipped"].items(), *corpus.left_out.items()]
        named = "; ".join(f"{name}: {why}" for name, why in reasons[:3])
        logging.warning(
            "%s: %d of %d utterances are not in the score: %s", split, total - heard, total, named
        )
    of = f"{heard} utterances" if heard == total else f"{heard} of {total} utterances"
    results = content["results"] | {"utterances": heard, "left_out": total - heard}
    rates = {name: results[name] for name in evaluator.rates}
    return Score(results, rates, f"{content['line']}  ({of})")


def _from_first_process(content: dict[str, Any]) -> dict[str, Any]:
    if jax.process_count() == 1:
        return content
    text = json.dumps(content).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
