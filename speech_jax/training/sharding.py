"""The mesh, where each parameter lives on it, and how host batches become global arrays.

Axes: `data` (batch), `fsdp` (batch, and parameters split among its devices), `tensor` (heads,
feed-forward width, vocabulary). A batch is split over data and fsdp together.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from speech_jax.errors import UserError
from speech_jax.training.optim import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# (regular expression over a parameter's path, mesh axes of its last dimensions). The first that
# matches holds; dimensions in front, such as the layers of a scan, are not split.
RULES = (
    (r"attention/qkv?/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/qkv?/bias$", (None, "tensor", None)),
    (r"attention/(position|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/(content_bias|position_bias|value/bias)$", ("tensor", None)),
    (r"attention/project/kernel$", ("tensor", None, "fsdp")),
    (r"feed_forward(_\d)?/expand/kernel$", ("fsdp", "tensor")),
    (r"feed_forward(_\d)?/expand/bias$", ("tensor",)),
    (r"feed_forward(_\d)?/project/kernel$", ("tensor", "fsdp")),
    (r"convolution/gate/kernel$", ("fsdp", None, "tensor")),
    (r"convolution/gate/bias$", (None, "tensor")),
    (r"convolution/depthwise/kernel$", (None, "tensor")),
    (r"convolution/depthwise/bias$", ("tensor",)),
    (r"convolution/project/kernel$", ("tensor", "fsdp")),
    (r"subsampling/convolution_\d/kernel$", (None, None, None, "fsdp")),
    (r"subsampling/project/kernel$", ("fsdp", None)),
    (r"extractor/kernel_\d$", (None, None, "fsdp")),
    (r"extractor/(bias|scale|shift)_\d$", ()),
    (r"projection/kernel$", ("fsdp", None)),
    (r"mask_embedding$", ()),
    (r"position/direction$", (None, None, "fsdp")),
    (r"position/magnitude$", ()),
    (r"quantizer/codebook$", ()),
    (r"(project_hidden|project_target|quantizer/project|codes)/kernel$", ("fsdp", None)),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"head/bias$", ("tensor",)),
    (r"(scale|bias|mean|variance)$", ()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
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


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_params(params, mesh: Mesh, rules=RULES):
    """The sharding of every parameter (arrays or shapes) by the first rule that matches its path.

    A mesh axis is left out for a dimension that it does not divide (a vocabulary of 29 over 2).

    Raises:
      UserError: for a parameter that no rule matches.
    """

    def sharding(path, leaf):
        name = path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _spec(leaf.shape, axes, mesh, name))
        raise UserError(f"no sharding rule matches parameter {name} {leaf.shape}: add one")

    return jax.tree_util.tree_map_with_path(sharding, params)


def _spec(shape, axes, mesh, name):
    if len(axes) > len(shape):
        raise UserError(f"the sharding rule {axes} has more dimensions than {name} {shape}")
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    fits = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, axes, strict=True)
    ]
    return PartitionSpec(*fits)


def shard_optimizer(tx: optax.GradientTransformation, params, shardings, mesh: Mesh):
    """The sharding of the optimizer's state: moments as their parameters, counters replicated."""
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch to global arrays, split over the batch axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
