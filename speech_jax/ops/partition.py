"""What the compiler is told of how a batch lies on a mesh; nothing where no mesh is set.

The mesh is that of `jax.set_mesh`, with the axes of sharding.py, data and fsdp being the batch's.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.sharding import PartitionSpec

_ROWS = PartitionSpec(("data", "fsdp"))
_SEVERAL = contextvars.ContextVar("several platforms", default=False)


def split_rows(x: jax.Array) -> jax.Array:
    """Says that the rows of an activation x [B, ...] stay on the devices that the batch is on.

    Told of the inputs and the parameters alone, the compiler may split activations as the
    parameters are, and send them around in every layer.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _ROWS)


def is_split() -> bool:
    """Whether a program is traced for a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def platform() -> str:
    """Of the devices that a program is traced for: 'cpu', 'gpu' or 'tpu'.

    They are those of the mesh, which may be of another machine, or else JAX's own.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device else jax.default_backend()


@contextlib.contextmanager
def several_platforms() -> Iterator[None]:
    """What is traced within is for several platforms: `by_platform` keeps both of its forms."""
    token = _SEVERAL.set(True)
    try:
        yield
    finally:
        _SEVERAL.reset(token)


def for_several() -> bool:
    """Whether what is traced is for several platforms."""
    return _SEVERAL.get()


def by_platform(
    other: Callable[..., jax.Array], **special: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """A function for platforms that are named ('cpu', 'gpu' or 'tpu'), and `other` elsewhere.

    A program for several platforms chooses where it runs, not where it was made.
    """

    def computed(*arrays):
        if for_several():
            forms = {"cuda" if name == "gpu" else name: form for name, form in special.items()}
            return jax.lax.platform_dependent(*arrays, default=other, **forms)
        return special.get(platform(), other)(*arrays)

    return computed


def by_rows(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of arrays [B, ...], computed by each device for its rows alone.

    For what works row by row without the compiler knowing: it would send all rows everywhere.
    """

    def computed(*arrays):
        if jax.sharding.get_abstract_mesh().empty:
            return function(*arrays)
        return jax.shard_map(function, in_specs=_ROWS, out_specs=_ROWS)(*arrays)

    return computed
