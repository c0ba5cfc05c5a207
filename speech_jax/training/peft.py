"""Parameter-efficient fine-tuning: LoRA (Hu et al. 2022) as a transform of a task's parameters.

Beside a kernel W that is a target stands `kernel_lora`, two factors: A [rows, rank], random, and
B [rank, columns], zero. Every function of the task sees W + alpha / rank * A B, so that LoRA works
for any encoder, task and kernel, and begins as the model that it starts from, to the last bit:

    task = peft.Adapted(task, peft.LoRA(rank=4))
    params, state = task.init(rng, batch)       # with the factors in their places
    task.loss(params, state, batch, rng, step)  # of peft.merged(params, lora)

It costs a small product a kernel, and no memory of the optimizer for W, which is frozen
(training/groups.py). It does not spare the gradient of W, of which those of A and B are made: a
step costs about what one of full fine-tuning does. Nor is there LoRA's own dropout, which would
hide parts of a layer's input from A B alone: the encoder's dropout acts on both.

Bottleneck adapters change a layer's function, not a kernel: they are a setting of the encoders
(`adapter`, see models/layers.py). What this module knows of them is that they learn, too.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from speech_jax import rules
from speech_jax.errors import UserError
from speech_jax.rules import Rules

_FACTORS = "_lora"  # ends the name that stands beside a kernel's
# What is added to a model that is fine-tuned, by the end of its path: factors and adapters.
ADDED = rf"\w+{_FACTORS}/[ab]|adapter/\w+/\w+"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels get a change of low rank: the section `lora` of a configuration.

    Attributes:
      rank: of the change; 0: none.
      alpha: the change is alpha / rank * A B, so that another rank needs no other learning rate.
      targets: the end of the paths of the kernels, see rules.py.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = (
        r"((cross_)?attention|feed_forward(_\d)?)/\w+/kernel"
        r"|layer_\d+/((inputs|project|skip)/kernel|recurrent)"
    )


# What tasks do with parameters as their first argument, but for `init`.
_OF_PARAMS = (
    "loss", "logits", "predict", "encode", "generate", "heard", "searched", "project", "search",
)  # fmt: skip


class Adapted:
    """A task whose parameters hold factors beside some of its kernels."""

    def __init__(self, task: Any, lora: LoRA):
        self._task, self._lora = task, lora

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh: the factors are small, and whole on every device."""
        return (*self._task.rules, (rf"\w+{_FACTORS}/[ab]", ()))

    def init(self, rng: jax.Array, batch: Any) -> tuple[Any, Any]:
        """The task's parameters with new factors, and its state."""
        params, state = self._task.init(rng, batch)
        return extended(params, self._lora, rng), state

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        if name not in _OF_PARAMS:
            return found
        return lambda params, *rest: found(merged(params, self._lora), *rest)


def extended(params: Mapping[str, Any], lora: LoRA, rng: jax.Array) -> dict[str, Any]:
    """`params` with factors beside the kernels that are targets.

    Raises:
      UserError: no kernel is a target.
    """
    named = [(name, leaf) for name, leaf in _leaves(params) if rules.matches(lora.targets, name)]
    if not named:
        raise UserError(
            f"config.lora.targets={lora.targets!r} matches no parameter; it is the end of a path, "
            f"as of {', '.join([name for name, _ in _leaves(params) if 'kernel' in name][:6])}, ..."
        )
    grown = jax.tree.map(lambda leaf: leaf, params)
    for name, leaf in named:
        *folders, last = name.split("/")
        place = grown
        for folder in folders:
            place = place[folder]
        key = jax.random.fold_in(rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        place[f"{last}{_FACTORS}"] = _factors(key, leaf, lora.rank, _is_stacked(name))
    return grown


def merged(params: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """`params` without factors, each kernel with its change: what the task itself knows.

    Parameters without factors come back as they are, so a merged model stays one.
    """
    plain = {}
    for name, value in params.items():
        if name.endswith(_FACTORS):
            continue
        factors = params.get(f"{name}{_FACTORS}")
        if factors is not None:
            scale = lora.alpha / factors["a"].shape[-1]
            # In full precision, so that it does not matter where it is done; the product is small.
            change = jnp.matmul(factors["a"], factors["b"], precision="highest")
            value = value + (scale * change).reshape(value.shape)
        plain[name] = merged(value, lora) if isinstance(value, Mapping) else value
    return plain


def _factors(rng: jax.Array, kernel: Any, rank: int, stacked: bool) -> dict[str, jax.Array]:
    """A and B of a kernel, with an axis of layers in front where they are `stacked`."""
    layers, shape = (kernel.shape[:1], kernel.shape[1:]) if stacked else ((), kernel.shape)
    rows, columns = _sides(shape)
    a = jax.random.normal(rng, (*layers, rows, rank), kernel.dtype) / math.sqrt(rows)
    return {"a": a, "b": jnp.zeros((*layers, rank, columns), kernel.dtype)}


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a kernel as a matrix: cut where the two add up to the least.

    That is between what comes in and what goes out: [in, out], [in, heads, width], [heads, width,
    out], and of convolutions [taps, ..., in, out] behind what comes in.
    """
    sides = [(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape))]
    if not sides:
        raise UserError(
            f"config.lora.targets matches a parameter of the shape {list(shape)}, which is no "
            "kernel: name kernels alone"
        )
    return min(sides, key=sum)


def _is_stacked(name: str) -> bool:
    """Whether a parameter has an axis of layers in front, as a scanned encoder's have."""
    return name.startswith("encoder/layers/")


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [(rules.path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params)]
