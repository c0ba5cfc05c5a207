"""Training steps as a run has them, from configurations: nothing else here knows their making."""

import time

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.hardware import recipe
from configs import finetune_wav2vec2, librispeech
from speech_jax import experiment, train
from speech_jax.data.plan import Bucket
from speech_jax.training import costs, optim, sharding

RATE = 16_000


def config_of(name: str, tiny: bool, **changes: object) -> ConfigDict:
    """The recipe of a model, its encoder changed by `changes`; a small one of the kind if tiny."""
    kind, _, size = name.partition("-")
    if kind == "recipe":
        config = recipe.get_tiny_config() if tiny else recipe.get_config()
    elif kind == "conformer":
        config = librispeech.get_config("conformer_tiny" if tiny else f"conformer_{size}")
        config.model.dtype = "bfloat16"
    else:
        config = finetune_wav2vec2.get_config("tiny" if tiny else "960h")
        config.model.dtype = "bfloat16"
        config.optimizer.frozen = ()
        config.model.feature_gradient = 1.0
        config.model.layer_drop = 0.0
    if tiny and kind != "recipe":
        config.model.update({"num_layers": 2, "scan": True})
    config.model.update(changes)
    config.train.ema_decay = 0.0
    return config


class Model:
    """A model in training: its state on the device, and its step for batches of any size."""

    def __init__(self, config: ConfigDict, vocabulary_size: int):
        self.config = config
        self.mesh = sharding.make_mesh(**config.mesh)
        self.task = experiment.make_task(config, vocabulary_size)
        schedule = optim.make_schedule(steps=config.train.steps, **config.schedule)
        probe = train.batch_shapes(make_bucket(1, 2.0, 8), self.mesh)
        made = train.abstract_state(config, self.task, schedule, self.mesh, probe)
        self.abstract, self._init, self._tx = made
        self.parameters = sum(x.size for x in jax.tree.leaves(self.abstract.params))
        self.state = None

    def start(self) -> None:
        """Puts a fresh state on the device."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.state = jax.jit(self._init, out_shardings=shardings)()

    def trace(self, rows: int, seconds: float, labels_per_second: float) -> "Step":
        """The step on full rows of so many seconds, traced and lowered."""
        bucket = make_bucket(rows, seconds, round(seconds * labels_per_second))
        shapes = train.batch_shapes(bucket, self.mesh)
        step = train.jit_step(self.config, self.task, self._tx, self.abstract, self.mesh)
        with jax.set_mesh(self.mesh):
            traced = step.trace(self.abstract, shapes)
            return Step(self, rows, seconds, shapes, traced)


def make_bucket(rows: int, seconds: float, labels: int) -> Bucket:
    """The shape of a batch of full rows."""
    return Bucket(samples=round(seconds * RATE), labels=labels, rows=rows)


class Step:
    """A step for one batch shape; a call makes one update of the model's state, and blocks."""

    def __init__(self, model: Model, rows: int, seconds: float, shapes: dict, traced):
        self.model, self.rows, self.seconds, self._shapes = model, rows, seconds, shapes
        self._lowered, self.flops = traced.lower(), costs.matmul_flops(traced.jaxpr)
        self._program, self._batch = None, None
        self.compile_seconds, self.temporary = 0.0, 0

    def compile(self) -> "Step":
        """Compiles it, in any thread."""
        start = time.perf_counter()
        self._program = self._lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary = self._program.memory_analysis().temp_size_in_bytes
        return self

    def load(self) -> None:
        """Puts a batch of noise on the device."""
        self._batch = sharding.put_batch(noise(self._shapes), self.model.mesh)

    def __call__(self) -> dict[str, jax.Array]:
        self.model.state, sums, finite = self._program(self.model.state, self._batch)
        jax.block_until_ready(self.model.state)
        return {"finite": finite, **sums}

    def release(self) -> None:
        """Gives its memory back."""
        self._batch = self._program = self._lowered = None


def noise(shapes: dict[str, jax.ShapeDtypeStruct], vocabulary: int = 29) -> dict[str, np.ndarray]:
    """A full batch of noise in the shapes of a batch."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, wanted in shapes.items():
        whole = shapes.get("audio" if name.startswith("audio") else "labels")
        if name == "audio":
            value = 1000 * rng.standard_normal(wanted.shape)
        elif name.endswith("_length"):
            value = np.full(wanted.shape, whole.shape[1])
        elif name == "labels":
            value = rng.integers(1, vocabulary, wanted.shape)
        elif name == "index":
            value = np.arange(wanted.shape[0])
        else:
            value = np.ones(wanted.shape)
        batch[name] = value.astype(wanted.dtype)
    return batch
