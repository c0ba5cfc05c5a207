"""The mesh, where each parameter lives on it, and how host batches become global arrays.

Axes: `data` (batch), `fsdp` (batch, and parameters split among its devices), `tensor` (heads,
feed-forward width, vocabulary). A batch is split over data and fsdp together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from speech_jax.errors import UserError
from speech_jax.rules import Rules, only, path_name

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices (or of `devices`); one axis may be -1, which takes what is left.

    Raises:
      UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} "
            "devices: the sizes must multiply to that number, and one of them may be -1"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def described() -> str:
    """How many devices there are, and of what kind."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_params(params: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every parameter (arrays or shapes), by the rule that matches its path.

    A rule's value names the mesh axes of the last dimensions; dimensions in front, such as the
    layers of a scan, are not split. An axis is left out for a dimension that it does not divide (a
    vocabulary of 29 over 2).

    Args:
      rules: (regular expression, axes), see rules.py: those of a task, whose encoder has most.

    Raises:
      UserError: for a parameter that no rule matches, or several.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        axes = only(rules, name, "sharding")
        return NamedSharding(mesh, _spec(leaf.shape, axes, mesh, name))

    return jax.tree_util.tree_map_with_path(sharding, params)


def _spec(
    shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh, name: str
) -> PartitionSpec:
    if len(axes) > len(shape):
        raise UserError(f"the sharding rule {axes} has more dimensions than {name} {shape}")
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    fits = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, axes, strict=True)
    ]
    return PartitionSpec(*fits)


def shard_optimizer(
    tx: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """The sharding of the optimizer's state: moments as their parameters, counters replicated.

    `params` and `shardings` are those that the optimizer works on (groups.split).
    """
    masked = lambda x: isinstance(x, optax.MaskedNode)
    return optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=masked,
    )


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process of the run, on all of them: something for JSON.

    Raises:
      UserError: that of `make`, on all processes, so that none waits for the first one.
    """
    if jax.process_count() == 1:
        return make()
    content: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            content["found"] = make()
        except UserError as error:
            content["error"] = str(error)
    text = json.dumps(content).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    content = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if "error" in content:
        raise UserError(content["error"])
    return content["found"]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch to global arrays, split over the batch axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
