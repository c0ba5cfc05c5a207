"""Training steps as a run has them, from configurations: nothing else here knows their making."""

import time

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.hardware import recipe
from configs import finetune_wav2vec2, librispeech
from speech_jax import experiment, models
from speech_jax.data.batch import Bucket, Fields
from speech_jax.preflight import assumed
from speech_jax.setup import make_setup
from speech_jax.tasks import Task
from speech_jax.training import costs, sharding

RATE = 16_000


def config_of(name: str, tiny: bool, **changes: object) -> ConfigDict:
    """The recipe of a model, its encoder changed by `changes`; a small one of the kind if tiny."""
    kind, _, size = name.partition("-")
    if kind == "recipe":
        config = recipe.get_tiny_config() if tiny else recipe.get_config()
    elif kind == "conformer":
        config = librispeech.get_config("conformer_tiny" if tiny else f"conformer_{size}")
        config.model.dtype = "bfloat16"
    elif kind in ("deepspeech", "wavenet"):
        config = librispeech.get_config("conformer_tiny" if tiny else "conformer_s")
        config.model = models.settings(kind, "tiny" if tiny else size)
    elif name in ("wav2vec2-base", "wav2vec2-tiny"):
        config = finetune_wav2vec2.get_config("tiny" if tiny else "960h")
        config.model.dtype = "bfloat16"
        config.optimizer.frozen = ()
        config.model.feature_gradient = 1.0
        config.model.layer_drop = 0.0
    else:
        raise SystemExit(
            f"error: unknown model {name!r}: take conformer-s (-m, -l), wav2vec2-base, "
            "deepspeech-ds2, wavenet-base or recipe"
        )
    if tiny and kind in ("conformer", "wav2vec2"):
        config.model.update({"num_layers": 2, "scan": True})
    config.model.update(changes)
    config.train.ema_decay = 0.0
    return config


def make_task(config: ConfigDict, vocabulary_size: int) -> tuple[Task, Fields]:
    """The task, and the arrays of its batches."""
    parts = assumed.make_parts(config, vocabulary_size)
    return experiment.make_task(config, parts), assumed.fields_of(parts)


def make_bucket(rows: int, seconds: float, labels: int) -> Bucket:
    """The shape of a batch of full rows."""
    return Bucket(rows, (("samples", round(seconds * RATE)), ("labels", labels)))


def make_batch(
    fields: Fields, bucket: Bucket, mesh: Mesh, vocabulary_size: int = 29
) -> dict[str, np.ndarray]:
    """A full batch of noise."""
    return noise(experiment.batch_shapes(fields, bucket, mesh), vocabulary_size)


class Model:
    """A model in training: its state on the device, and its step for batches of any size."""

    def __init__(self, config: ConfigDict, vocabulary_size: int):
        self.mesh = sharding.make_mesh(**config.mesh)
        task, fields = make_task(config, vocabulary_size)
        bucket = make_bucket(1, 2.0, 8)
        self.setup = make_setup(config, task, fields, self.mesh, bucket)
        self.parameters = self.setup.parameters
        self.state = None

    def start(self) -> None:
        """Puts a fresh state on the device."""
        self.state = self.setup.fresh_state()

    def trace(self, rows: int, seconds: float, labels_per_second: float) -> "Step":
        """The step on full rows of so many seconds, traced and lowered."""
        bucket = make_bucket(rows, seconds, round(seconds * labels_per_second))
        shapes = self.setup.batch(bucket)
        with jax.set_mesh(self.mesh):
            traced = self.setup.step().trace(self.setup.abstract, shapes)
            return Step(self, rows, seconds, shapes, traced)


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

    @property
    def xla_flops(self) -> float:
        """The compiler's own count, in which a loop's body counts once."""
        return self._program.cost_analysis()["flops"]

    @property
    def text(self) -> str:
        """The compiled program."""
        return self._program.as_text()

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
