"""What a run learns from, and is measured on."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax import experiment, hidden
from speech_jax.bundle import start
from speech_jax.data.parts import Part
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.pipeline import Corpus
from speech_jax.data.plan import Plan
from speech_jax.data.sources import Source
from speech_jax.errors import UserError
from speech_jax.evaluators.loop import Evaluation
from speech_jax.setup import Setup
from speech_jax.tasks import Task
from speech_jax.training import sharding
from speech_jax.workdir import Workdir


class TrainingError(UserError):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run learns from, in which order, and is measured on; `note` is said of the plan."""

    mesh: Mesh
    source: Source
    parts: Mapping[str, Part]
    task: Task
    corpus: Corpus
    plan: Plan
    note: str
    evaluation: Evaluation

    def left_out(self, splits: Iterable[str]) -> dict[str, dict[str, str]]:
        """Why utterances are not used, by their ids, in the training data and in splits."""
        corpora = {"training": self.corpus}
        corpora |= {split: self.evaluation.corpus(split) for split in splits}
        return {name: {**corpus.left_out, **corpus.skipped} for name, corpus in corpora.items()}


def open_data(config: ConfigDict, workdir: Workdir, on_batch: Callable[[], None]) -> RunData:
    """Opens what a run learns from, and the splits that it is measured on.

    `on_batch` is called for each batch that is heard on the way. Raises UserError for what is
    missing or does not fit.
    """
    mesh = sharding.make_mesh(**config.mesh)
    source = experiment.open_training(config)
    parts = _parts(config, workdir, source)
    task = experiment.make_task(config, parts)
    task, parts = hidden.replace_audio(config, task, parts, mesh, source, on_batch)
    corpus = experiment.training_corpus(config, source, parts, task)
    plan, note = _plan(config, workdir, corpus, task, mesh)
    evaluation = Evaluation(config, task, parts, mesh, on_batch)
    for split in experiment.evaluated_splits(config):
        evaluation.check(split)  # what is missing is said before the training, not after it
    return RunData(mesh, source, parts, task, corpus, plan, note, evaluation)


def _parts(config: ConfigDict, workdir: Workdir, source: Source) -> dict[str, Part]:
    """The parts of a run: those of its first start, those of its base, or new ones."""
    if workdir.config.exists():
        return experiment.restore_parts(config, workdir.folder)
    if config.init.folder and config.init.take == "model":
        return start.parts(config, workdir.folder)
    # What a start that failed has left may be of other settings.
    return experiment.make_parts(config, workdir.folder, source)


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


def opening(data: RunData, setup: Setup, first: int) -> Iterator[str]:
    """What is trained on what, and what is lost of it."""
    counts = [f"{part.count} {name}" for name, part in data.parts.items() if part.count]
    yield ", ".join(
        [
            f"{data.corpus.seconds / 3600:.2f} h of speech in {len(data.corpus)} utterances",
            *counts,
            f"{setup.parameters / 1e6:.2f} M parameters",
            sharding.described(),
            f"from update {first}",
        ]
    )
    if count := len(data.corpus.left_out):
        yield f"{count} training utterances are left out: left_out.json says which, and why"
    yield data.note
    yield from _lost(data.parts, data.source)


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
