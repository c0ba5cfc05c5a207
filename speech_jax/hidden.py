"""The hidden states of a frozen encoder, computed once: training a head then takes seconds.

    task, parts = hidden.replace_audio(config, task, parts, mesh, source, on_batch)

gives the task on batches that hold hidden states in the place of audio. They are in the cache of
the data, a folder for the training data and one for each split that is evaluated, under a digest of
the encoder, its front end, and the utterances and their audio. Nothing random is done to the input
then: no noise, speeds, SpecAugment or adversary, and no dropout or masks within the encoder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax import experiment, files, models, rules
from speech_jax.bundle import start
from speech_jax.data.audio import File, Segment
from speech_jax.data.parts import Part
from speech_jax.data.parts import hidden as kept
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import Source, Utterance, default_cache
from speech_jax.errors import UserError
from speech_jax.evaluators import Row
from speech_jax.evaluators.loop import Evaluation
from speech_jax.ops.augment import CHANGES
from speech_jax.tasks import Pytree, Task
from speech_jax.training import groups, sharding


class OnHidden:
    """A task whose batches hold hidden states; its parameters are those of the whole model."""

    along = "frames"

    def __init__(self, task: Task, rate: int, encoder: Pytree):
        """`encoder` are the parameters that made the states."""
        self._task, self._rate, self._encoder = task, rate, encoder

    def check_encoder(self, params: Pytree) -> None:
        """Raises UserError where the states are of another encoder than that of `params`."""
        same = lambda *both: jax.tree.map(lambda a, b: (a == b).all(), *both)
        if not all(jax.tree.leaves(jax.jit(same)(self._encoder, params["encoder"]))):
            raise UserError(
                "what config.init.folder names has changed since this run began, and hidden states "
                "would be of another encoder than the run's: bring it back, or use another "
                "--workdir"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def init(self, rng: jax.Array, batch: Any) -> tuple[Pytree, Pytree]:
        """As the task itself does, of silence."""
        del batch
        return self._task.init(rng, _silence(self._rate))

    def unusable(self, sizes: Any) -> dict[int, str]:
        """None: of what is too short to learn from there are no states."""
        del sizes
        return {}


class _Encoding:
    """What predicts the hidden states of audio: [B, T', ...] float32 and their lengths."""

    along = "samples"

    def __init__(self, task: Task):
        self._task = task

    def predict(self, params: Pytree, state: Pytree, batch: Any) -> dict[str, jax.Array]:
        states, lengths = self._task.encode(params, state, batch)
        return {"states": states.astype(jnp.float32), "frames": lengths}


def replace_audio(
    config: ConfigDict,
    task: Task,
    parts: Mapping[str, Part],
    mesh: Mesh,
    source: Source,
    on_batch: Callable[[], None],
) -> tuple[Task, dict[str, Part]]:
    """The task and its parts with hidden states in the place of audio, which are made if need be.

    Both are as they were where config.data.cache_hidden is off.

    Args:
      source: the training data.
      on_batch: is called after every batch; what it raises ends this.

    Raises:
      UserError: something learns or is random where the states are taken from, the task has no
        use for them, or they cannot be written.
    """
    if not config.data.cache_hidden:
        return task, dict(parts)
    check(config)
    if not hasattr(task, "encode"):
        raise UserError(
            f"config.data.cache_hidden: the task {config.task.name!r} does not end in a head on "
            "hidden states; set it to False"
        )
    params, state = _weights(config, task, mesh)
    own = _digest(config, task, params["encoder"], state)
    audio = {"audio": parts["audio"]}
    evaluation = Evaluation(config, _Encoding(task), audio, mesh, on_batch)
    corpora = {kept.TRAINING: experiment.training_corpus(config, source, audio, task)}
    for split in experiment.evaluated_splits(config):
        corpora[split] = evaluation.corpus(split)
    cache = files.expand(config.data.cache) if config.data.cache else default_cache()
    folders = {}
    for split, corpus in corpora.items():
        name = sharding.from_first(lambda corpus=corpus: _audio_digest(own, corpus))
        folders[split] = folder = cache / "hidden" / name[:24]
        if not sharding.from_first(lambda folder=folder: kept.is_there(folder)):
            _write(evaluation, params, state, corpus, folder)
    counts, sizes = zip(*map(kept.shape, folders.values()), strict=True)
    seconds = sum(corpus.seconds for corpus in corpora.values())
    part = kept.Hidden(folders, sizes[0], sum(counts) / seconds)
    rest = {name: part for name, part in parts.items() if name != "audio"}
    return OnHidden(task, config.data.sample_rate, params["encoder"]), {"hidden": part, **rest}


def check(config: ConfigDict) -> None:
    """Raises UserError where the input of the encoder is to be changed at random."""
    masks = any(config.spec_augment[name] for name in CHANGES)
    random = {
        "config.data.noise_root": config.data.noise_root,
        "config.data.speeds": tuple(config.data.speeds) != (1.0,),
        "config.spec_augment": masks and models.listens(config.model.name) == "log_mel",
        "config.adversarial.method": config.adversarial.method != "none",
        "config.task.mixup": config.task.get("mixup"),
    }
    for name, asked in random.items():
        if asked:
            raise UserError(
                f"config.data.cache_hidden keeps what the encoder made of the audio as it is, and "
                f"{name} changes it at random: switch one of the two off"
            )


def _weights(config: ConfigDict, task: Task, mesh: Mesh) -> tuple[Pytree, Pytree]:
    """Parameters and state of a task whose encoder is frozen for ever, as a run begins with."""
    init = lambda: task.init(jax.random.key(config.seed), _silence(config.data.sample_rate))
    params, state = jax.jit(init, out_shardings=sharding.replicated(mesh))()
    learns = groups.trainable(params, experiment.frozen(config))
    moving = [n for n in rules.names(groups.split(params, learns)[0]) if n.startswith("encoder/")]
    if moving:
        raise UserError(
            f"config.data.cache_hidden needs an encoder that is frozen for ever, and {moving[0]} "
            "learns: set config.optimizer.frozen to (('encoder/.*', -1),)"
        )
    if config.init.folder:
        params, state, _ = start.with_bundle(params, state, config)
    return params, state


def _silence(rate: int) -> dict[str, jax.Array]:
    """A batch of one second."""
    return {"audio": jnp.zeros((1, rate), jnp.int16), "audio_length": jnp.full(1, rate, jnp.int32)}


def _digest(config: ConfigDict, task: Task, encoder: Any, state: Any) -> str:
    """Of all that the states of an utterance depend on, but for its audio."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": encoder, "state": state}):
        digest.update(rules.path_name(path).encode() + np.asarray(leaf).tobytes())
    settings = [files.plain(config[name]) for name in ("model", "features", "lora")]
    described = [*settings, config.data.sample_rate, getattr(task, "layer_sum", False)]
    digest.update(json.dumps(described, sort_keys=True).encode())
    for values in (task.frontend.mean, task.frontend.std):
        digest.update(b"" if values is None else np.asarray(values).tobytes())
    return digest.hexdigest()


def _audio_digest(own: str, corpus: Corpus) -> str:
    """Of the utterances of a corpus and what they are heard in, behind `own`.

    A file is known by its size and when it changed, bytes by themselves.
    """
    digest = hashlib.sha256(f"{own} {corpus.fingerprint()}".encode())
    for index in corpus.index:
        digest.update(_identity(corpus.source, int(index)))
    return digest.hexdigest()


def _identity(source: Source, index: int) -> bytes:
    try:
        file, place = source.open(index), ""
        if isinstance(file, Segment):
            file, place = file.file, f"{file.offset!r} {file.duration!r}"
        return f"{_of_file(file)} {place}\0".encode("utf-8", "surrogatepass")
    except (OSError, UserError) as error:  # it is named where it is read
        return f"{error}\0".encode("utf-8", "surrogatepass")


def _of_file(file: File) -> str:
    if isinstance(file, str | os.PathLike):
        status = os.stat(file)
        return f"{os.fspath(file)} {status.st_size} {status.st_mtime_ns}"
    with contextlib.closing(file) as opened:
        return hashlib.sha256(opened.read()).hexdigest()


def _write(
    evaluation: Evaluation, params: Pytree, state: Pytree, corpus: Corpus, folder: pathlib.Path
) -> None:
    """Writes the states of a corpus; the first process does, with the help of all of them."""
    with kept.Writer(folder) if not jax.process_index() else contextlib.nullcontext() as writer:

        def add(utterance: Utterance, example: Row, row: Row) -> None:
            del example
            writer.add(utterance.id, row["states"][: row["frames"]])

        evaluation.each(params, state, corpus, add)
        sharding.from_first(lambda: writer.finish({**corpus.left_out, **corpus.skipped}))
