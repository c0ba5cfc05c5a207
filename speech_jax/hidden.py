"""The hidden states of a frozen encoder, computed once: training a head then takes seconds.

    task, parts = hidden.replace_audio(config, task, parts, mesh)

gives the task on batches that hold hidden states in the place of audio. They are in the cache of
the data, under a digest of the encoder, its front end, and the utterances and their files. Nothing
random is done to the input then: no noise, speeds, SpecAugment or adversary, and no dropout or
masks within the encoder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax import experiment, files, models, rules
from speech_jax.bundle import start
from speech_jax.config import split_names
from speech_jax.data.parts import Part
from speech_jax.data.parts import hidden as kept
from speech_jax.data.pipeline import Corpus
from speech_jax.data.sources import default_cache
from speech_jax.errors import UserError
from speech_jax.evaluators.loop import by_utterance
from speech_jax.tasks import Pytree, Task
from speech_jax.training import groups, sharding


class OnHidden:
    """A task whose batches hold hidden states; its parameters are those of the whole model."""

    along = "frames"

    def __init__(self, task: Task, rate: int):
        self._task, self._rate = task, rate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def init(self, rng: jax.Array, batch: Any) -> tuple[Pytree, Pytree]:
        """As the task itself does, of silence."""
        del batch
        return self._task.init(rng, _silence(self._rate))

    def unusable(self, sizes: Any) -> dict[int, str]:
        """None: of what is too short there are no states."""
        del sizes
        return {}


def replace_audio(
    config: ConfigDict, task: Task, parts: Mapping[str, Part], mesh: Mesh
) -> tuple[Task, dict[str, Part]]:
    """The task and its parts with hidden states in the place of audio, which are made if need be.

    Raises:
      UserError: something learns or is random where the states are taken from, the task has no
        use for them, or they cannot be written.
    """
    check(config)
    if jax.process_count() > 1:
        raise UserError("config.data.cache_hidden is for one process: set it to False")
    if not hasattr(task, "encode"):
        raise UserError(
            f"config.data.cache_hidden: the task {config.task.name!r} does not end in a head on "
            "hidden states; set it to False"
        )
    task_init = lambda: task.init(jax.random.key(config.seed), _silence(config.data.sample_rate))
    params, state = jax.jit(task_init, out_shardings=sharding.replicated(mesh))()
    learns = groups.trainable(params, experiment.frozen(config))
    moving = [n for n in rules.names(groups.split(params, learns)[0]) if n.startswith("encoder/")]
    if moving:
        raise UserError(
            f"config.data.cache_hidden needs an encoder that is frozen for ever, and {moving[0]} "
            "learns: set config.optimizer.frozen to (('encoder/.*', -1),)"
        )
    if config.init.folder:
        params, state, _ = start.with_bundle(params, state, config)
    encode = jax.jit(lambda batch: task.encode(params, state, batch))
    own = _digest(config, task, params["encoder"], state)
    folders, seconds = [], 0.0
    for names in dict.fromkeys(_splits(config)):
        corpus = experiment.evaluation_corpus(
            config, names, {"audio": parts["audio"]}, task.unusable
        )
        seconds += corpus.seconds
        folders.append(_folder(config, own, corpus))
        if not kept.is_there(folders[-1]):
            with files.writing(folders[-1]):
                _write(config, task, mesh, corpus, encode, folders[-1])
    frames, size = kept.shape(folders)
    part = kept.Hidden(tuple(folders), size, frames / seconds)
    rest = {name: part for name, part in parts.items() if name != "audio"}
    return OnHidden(task, config.data.sample_rate), {"hidden": part, **rest}


def check(config: ConfigDict) -> None:
    """Raises UserError where the input of the encoder is to be changed at random."""
    names = ("time_masks", "frequency_masks", "time_warp", "vocal_tract")
    masks = any(config.spec_augment[name] for name in names)
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


def _silence(rate: int) -> dict[str, jax.Array]:
    """A batch of one second."""
    return {"audio": jnp.zeros((1, rate), jnp.int16), "audio_length": jnp.full(1, rate, jnp.int32)}


def _splits(config: ConfigDict) -> list[str]:
    names = (config.data.train_splits, config.data.eval_splits, config.data.test_splits)
    return [name for listed in names for name in split_names(listed)]


def _digest(config: ConfigDict, task: Task, encoder: Any, state: Any) -> str:
    """Of all that the states of an utterance depend on, but for its audio."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": encoder, "state": state}):
        digest.update(rules.path_name(path).encode() + np.asarray(leaf).tobytes())
    settings = [files.plain(config[name]) for name in ("model", "features")]
    described = [*settings, config.data.sample_rate, getattr(task, "layer_sum", False)]
    digest.update(json.dumps(described, sort_keys=True).encode())
    for values in (task.frontend.mean, task.frontend.std):
        digest.update(b"" if values is None else np.asarray(values).tobytes())
    return digest.hexdigest()


def _folder(config: ConfigDict, own: str, corpus: Corpus) -> pathlib.Path:
    digest = hashlib.sha256(own.encode())
    digest.update(corpus.fingerprint().encode())
    for index in corpus.index:
        file = corpus.source.open(int(index))
        with contextlib.suppress(OSError, TypeError, AttributeError):  # bytes: no file to ask
            path = os.fspath(getattr(file, "path", file))
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    cache = files.expand(config.data.cache) if config.data.cache else default_cache()
    return cache / "hidden" / digest.hexdigest()[:24]


def _write(
    config: ConfigDict, task: Task, mesh: Mesh, corpus: Corpus, encode: Any, folder: pathlib.Path
) -> None:
    plan = experiment.evaluation_plan(config, corpus, task, mesh)
    found: dict[str, np.ndarray] = {}
    with contextlib.closing(experiment.evaluation_batches(config, corpus, plan)) as batches:
        for batch in batches:
            with jax.set_mesh(mesh):
                hidden, lengths = encode(sharding.put_batch(batch, mesh))
            rows = {"hidden": np.asarray(hidden), "length": np.asarray(lengths)}
            for utterance, _, row in by_utterance(corpus, batch, rows):
                found[utterance.id] = np.asarray(row["hidden"][: row["length"]], np.float32)
    if not found:
        raise UserError("config.data.cache_hidden: no utterance of a split could be read")
    kept.write(folder, found, [corpus.source.utterances[index].id for index in corpus.index])
