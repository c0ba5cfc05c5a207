"""The step of a run: `Setup` is what it is made of, made once and passed whole."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from speech_jax.config import default
from speech_jax.data.batch import Bucket, Fields, signature
from speech_jax.experiment import above, batch_shapes, frozen
from speech_jax.tasks import Task
from speech_jax.training import adversarial, costs, groups, optim, sharding
from speech_jax.training import step as steps
from speech_jax.training.programs import Program, Programs


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training step is made of.

    Attributes:
      fields: the arrays of a batch.
      tx: the optimizer; schedule: its learning rate by update.
      abstract: the TrainState as shapes with shardings; init: the function that makes it.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    fields: Fields
    schedule: Callable[[Any], Any]
    tx: Any
    abstract: steps.TrainState
    init: Callable[[], steps.TrainState]

    @property
    def shardings(self) -> steps.TrainState:
        """Where each leaf of the state lives."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(x.size for x in jax.tree.leaves(self.abstract.params))

    def fresh_state(self) -> steps.TrainState:
        """A state to start from, on the devices."""
        return jax.jit(self.init, out_shardings=self.shardings)()

    def batch(self, bucket: Bucket) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch of a bucket, as shapes with shardings."""
        return batch_shapes(self.fields, bucket, self.mesh)

    def step(self, done: int | None = None):
        """The step as one jitted function; it gives its state's memory to the next one.

        `done` is how many updates are done, at the least: what thaws later costs nothing. None:
        everything has thawed.
        """
        config, everywhere = self.config, sharding.replicated(self.mesh)
        adversary = make_adversary(config)
        make = lambda task: adversarial.gradients(task, adversary)
        done = max(self.starts) if done is None else done
        gradients = groups.gradients(make, self.task, self.until, done)
        step = steps.make_step(
            steps.accumulate(gradients, config.train.accumulate),
            self.tx,
            mask=groups.trainable(self.abstract.params, frozen(config)),
            measured=steps.measured(self.fields),
            ema_decay=config.train.ema_decay,
            log_every=config.train.log_every,
        )
        return jax.jit(
            step, out_shardings=(self.shardings, everywhere, everywhere), donate_argnums=0
        )

    @property
    def until(self) -> Any:
        """For how many updates each parameter stands still (groups.thaw)."""
        return groups.thaw(self.abstract.params, frozen(self.config))

    @property
    def starts(self) -> list[int]:
        """The numbers of updates after which another step is used, for something thaws."""
        starts = groups.starts(self.until)
        return [start for start in starts if start < self.config.train.steps] or starts[:1]

    def compile(self, buckets: Sequence[Bucket], soonest: Mapping[str, Any] = {}) -> Programs:
        """The step for every batch shape, and for every time at which something thaws.

        They are compiled while the caller goes on, the one for the batch `soonest` first.
        """
        late = lambda bucket: signature(self.batch(bucket)) != signature(soonest)
        buckets = sorted(buckets, key=late)
        wanted = [(start, bucket) for start in self.starts for bucket in buckets]
        first, *others = (functools.partial(self._trace, *one) for one in wanted)
        traced = first()  # in this thread, where what is wrong with a model is seen best
        makers = [functools.partial(self._compile, make) for make in (lambda: traced, *others)]
        return Programs(
            (start, signature(self.batch(bucket)), make)
            for (start, bucket), make in zip(wanted, makers, strict=True)
        )

    def _trace(self, done: int, bucket: Bucket) -> tuple[Bucket, Any, Any]:
        with jax.set_mesh(self.mesh):  # for what ops/partition.py says
            traced = self.step(done).trace(self.abstract, self.batch(bucket))
            return bucket, traced, traced.lower()

    def _compile(self, trace: Callable[[], tuple[Bucket, Any, Any]]) -> Program:
        bucket, traced, lowered = trace()
        run = costs.compile_within_memory(
            lowered,
            f"a batch of {bucket}",
            "lower config.data.batch_seconds, raise config.train.accumulate, set "
            "config.model.remat=True where the encoder has it, or take a smaller model",
        )
        return Program(run, costs.matmul_flops(traced.jaxpr))


def make_setup(config: ConfigDict, task: Task, fields: Fields, mesh: Mesh, bucket: Bucket) -> Setup:
    """The step of a configuration; `bucket` is a batch shape to initialize from."""
    probe = batch_shapes(fields, bucket, mesh)
    schedule = optim.make_schedule(
        steps=config.train.steps, defaults=default().schedule, **config.schedule
    )
    params, model_state = jax.eval_shape(task.init, jax.random.key(config.seed), probe)
    settings = {**config.optimizer, "frozen": frozen(config), "above": above(task)}
    tx = optim.make_optimizer(
        schedule=schedule, params=params, defaults=default().optimizer, **settings
    )
    mask = groups.trainable(params, frozen(config))
    learned = lambda tree: groups.split(tree, mask)[0]
    sums = jax.eval_shape(task.loss, params, model_state, probe)[2]["sums"]

    def init() -> steps.TrainState:
        blank = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in probe.items()}
        params, model_state = task.init(jax.random.key(config.seed), blank)
        return steps.TrainState(
            step=jnp.zeros((), jnp.int32),
            rng=jax.random.key(config.seed + 1),
            params=params,
            model_state=model_state,
            opt_state=tx.init(learned(params)),
            ema=learned(params) if config.train.ema_decay else {},
            sums={name: jnp.zeros(()) for name in (*steps.SUMS, *sums)},
        )

    shapes = jax.eval_shape(init)
    split = sharding.shard_params(params, mesh, task.rules)
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), shapes).replace(
        params=split,
        opt_state=sharding.shard_optimizer(tx, learned(params), learned(split), mesh),
        ema=learned(split) if config.train.ema_decay else {},
    )
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return Setup(config, task, mesh, fields, schedule, tx, abstract, init)


def make_adversary(config: ConfigDict) -> adversarial.Adversary:
    """What is done to the inputs in training."""
    return adversarial.Adversary(**config.adversarial)
