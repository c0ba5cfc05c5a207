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
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from speech_jax import experiment, files
from speech_jax.data.parts import Part
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import Utterance
from speech_jax.errors import UserError
from speech_jax.evaluators import Row
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
        self._warned: set[str] = set()
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

    def check(self, split: str) -> None:
        """Raises UserError where the utterances of a split lack what they are measured by."""
        corpus, evaluator = self.corpus(split), self.task.evaluator(self._parts)
        if check := getattr(evaluator, "check", None):
            try:
                check([corpus.source.utterances[index] for index in corpus.index])
            except UserError as error:
                raise UserError(f"{split}: {error}") from error

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
        corpus, evaluator = self.corpus(split), self.task.evaluator(self._parts)
        lines: list[str] = []

        def add(utterance: Utterance, example: Row, row: Row) -> None:
            line = evaluator.add(utterance, example, row)
            if predictions is not None:
                line = {"id": utterance.id, **line}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")

        def measure(heard: int) -> dict[str, Any]:
            if heard and predictions is not None:
                with files.writing(predictions):
                    files.write_atomically(predictions, "".join(lines))
                    if draw := getattr(evaluator, "draw", None):
                        draw(predictions.with_suffix(".png"))
            found = {"results": evaluator.results(), "line": evaluator.line()} if heard else {}
            return {"heard": heard, "skipped": corpus.skipped, **found}

        heard = self.each(params, state, corpus, add)
        content = sharding.from_first(lambda: measure(heard))
        return _score(split, corpus, evaluator.rates, self._warned, **content)

    def each(
        self,
        params: Any,
        state: Any,
        corpus: Corpus,
        add: Callable[[Utterance, Row, Row], None],
    ) -> int:
        """Hands an utterance, its row of the batch and that of the prediction to `add`, one by one.

        That is on the first process alone. Returns how many there were; elsewhere 0.

        Raises:
          UserError: that of `add`, on all processes.
        """
        reader = _Reader(corpus, add)
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
        sharding.from_first(reader.check)
        return reader.heard


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


class _Reader:
    """Brings predictions to the host and hands them on, on the first process."""

    def __init__(self, corpus: Corpus, add: Callable[[Utterance, Row, Row], None]):
        self.heard = 0
        self._corpus, self._add = corpus, add
        self._error: UserError | None = None

    def read(
        self,
        batch: Mapping[str, np.ndarray],
        found: Mapping[str, jax.Array],
        shared: Mapping[str, jax.Array],
    ) -> None:
        if jax.process_index() or self._error:
            jax.block_until_ready(found)  # the processes stay together, and leave together
            return
        prediction = {name: np.asarray(value.addressable_data(0)) for name, value in found.items()}
        shared = {name: np.asarray(value.addressable_data(0)) for name, value in shared.items()}
        try:
            for utterance, example, row in by_utterance(self._corpus, shared or batch, prediction):
                self._add(utterance, example, row)
                self.heard += 1
        except UserError as error:
            if jax.process_count() == 1:
                raise
            self._error = error  # it is raised where all processes are

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error:
            raise self._error


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


def _score(
    split: str,
    corpus: Corpus,
    rates: Iterable[str],
    warned: set[str],
    *,
    heard: int,
    skipped: Mapping[str, str],
    results: Mapping[str, Any] | None = None,
    line: str = "",
) -> Score:
    """The score of what the first process has measured; a warning in `warned` is not said again."""
    if results is None:
        first = next(iter(skipped.items()), ("", "it is empty"))
        raise UserError(f"{split}: no utterance could be read ({': '.join(first).strip(': ')})")
    total = len(corpus.source.utterances) + len(corpus.source.skipped)
    if heard < total:
        reasons = [*skipped.items(), *corpus.left_out.items()]
        named = "; ".join(f"{name}: {why}" for name, why in reasons[:3])
        lost = f"{split}: {total - heard} of {total} utterances are not in the score: {named}"
        if lost not in warned:
            warned.add(lost)
            logging.warning("%s", lost)
    of = f"{heard} utterances" if heard == total else f"{heard} of {total} utterances"
    results = {**results, "utterances": heard, "left_out": total - heard}
    return Score(results, {name: results[name] for name in rates}, f"{line}  ({of})")
