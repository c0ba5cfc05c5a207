"""What of a model learns, how fast and with how much decay: rules to trees, and a table of them.

A parameter that is frozen for ever is taken out of the tree that the optimizer and the gradient
see: `split` puts None in its place, which a pytree does not count as a leaf. So it has no moments,
no part in the norm that gradients are clipped by, and nothing is differentiated with respect to it:

    until = groups.thaw(params, config.optimizer.frozen)
    mask = groups.trainable(params, config.optimizer.frozen)
    make = lambda task: adversarial.gradients(task, adversary)
    # Of all parameters; returns the gradient of those that learn.
    function = groups.gradients(make, task, until, done=0)
    gradient, loss = function(params, state, batch, rng, step)
    learned, still = groups.split(params, mask)
    updates, opt_state = tx.update(gradient, opt_state, learned)
    params = groups.join(optax.apply_updates(learned, updates), still)

Where nothing is frozen, `split` returns the tree as it is, and `still` without a leaf.

The statistics of a module (batch norm's) stand still as long as all of its parameters do, and it
normalizes by them: it learns as it is evaluated.

What is frozen for some updates has moments that wait for it, and costs no more: a step is compiled
for each time at which something thaws (`starts`). Branches of one step would do as well, but on a
CPU what is in a branch runs on one core.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax import rules
from speech_jax.errors import UserError
from speech_jax.rules import Rules, path_name
from speech_jax.training import peft

# Biases, norms, and the magnitudes of a weight norm: pulled towards 0 they lose their meaning.
NO_DECAY = r"\w*(bias|scale|shift)(_\d+)?|magnitude"

FOREVER = -1
# The collection by which a module knows that its statistics stand still (models/layers.py).
HELD = "held"


def thaw(params: Any, frozen: Sequence[tuple[str, int]]) -> Any:
    """A tree of ints: the updates for which each parameter stands still; -1 is for ever.

    The first rule (regular expression, updates) that matches holds; without one it is 0.

    Raises:
      UserError: a rule that matches no parameter, or a number below -1.
    """
    rules.check_used(frozen, params, "optimizer.frozen")
    for pattern, updates in frozen:
        if updates < FOREVER:
            raise UserError(
                f"config.optimizer.frozen: {updates} updates for {pattern!r} must be -1 (for "
                "ever) or more"
            )
    return _by_name(params, lambda name: int(rules.first(frozen, name, 0)))


def trainable(params: Any, frozen: Sequence[tuple[str, int]]) -> Any:
    """A tree of bools: False for what is frozen for ever. Raises as `thaw`."""
    mask = jax.tree.map(lambda updates: updates != FOREVER, thaw(params, frozen))
    if not any(jax.tree.leaves(mask)):
        raise UserError(f"config.optimizer.frozen={tuple(frozen)} leaves nothing to train")
    return mask


def split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """(where the mask holds, where it does not): trees with None in place of the other's leaves."""
    kept = jax.tree.map(lambda keep, x: x if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, x: None if keep else x, mask, tree)
    return kept, rest


def join(learned: Any, still: Any) -> Any:
    """The tree that was split."""
    none = lambda x: x is None
    return jax.tree.map(lambda a, b: b if a is None else a, learned, still, is_leaf=none)


def starts(until: Any) -> list[int]:
    """The numbers of updates after which something begins to learn, of a tree of `thaw`."""
    return sorted(set(jax.tree.leaves(until)) - {FOREVER})


def gradients(make: Callable[[Any], Callable], task: Any, until: Any, done: int) -> Callable:
    """A gradient function of all parameters whose gradient is of those that learn.

    `make(task)` returns a gradient function (training/step.py), which differentiates with respect
    to whatever parameters it is given: nothing is computed backwards below the lowest of them.

    Args:
      until: the tree of `thaw`.
      done: how many updates are done, at the least: the gradient of what thaws later is 0.
    """
    learns = jax.tree.map(lambda updates: updates != FOREVER, until)
    thawed = jax.tree.map(lambda updates: FOREVER < updates <= done, until)

    def function(
        params: Any, state: Any, batch: Any, rng: jax.Array, step: jax.Array | int
    ) -> tuple[Any, Any]:
        learned, still = split(params, thawed)
        held = _Held(task, still, thawed)
        gradient, loss = make(held)(learned, state, batch, rng, step)
        zeros = jax.tree.map(jnp.zeros_like, split(params, learns)[0])
        return join(gradient, zeros), loss

    return function


class _Held:
    """A task of the parameters that learn, with the others and their statistics held still."""

    def __init__(self, task: Any, still: Any, thawed: Any):
        self._task, self._still, self._thawed = task, still, thawed

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        return self._logits if name == "logits" else found

    def loss(self, learned: Any, state: Any, *rest: Any) -> tuple:
        """As the task's."""
        total, weight, aux = self._task.loss(join(learned, self._still), self._held(state), *rest)
        return total, weight, {**aux, "state": _without_held(aux["state"])}

    def _logits(self, learned: Any, state: Any, *rest: Any) -> tuple:
        found = self._task.logits(join(learned, self._still), self._held(state), *rest)
        *found, state = found
        return *found, _without_held(state)

    def _held(self, state: Any) -> Any:
        """`state` with the statistics that stand still in a collection `HELD` too."""
        statistics = flax.traverse_util.flatten_dict(state.get("batch_stats", {}))
        held = {path: value for path, value in statistics.items() if self._stands(path)}
        return {**state, HELD: flax.traverse_util.unflatten_dict(held)} if held else state

    def _stands(self, path: tuple[str, ...]) -> bool:
        """Whether no parameter of a statistic's module, or of the one that it is in, learns."""
        place = self._thawed
        for name in path[:-1]:
            if name not in place:
                break
            place = place[name]
        return not any(jax.tree.leaves(place))


def _without_held(state: Any) -> Any:
    return {name: tree for name, tree in state.items() if name != HELD}


def decay_factors(params: Any, decay: Rules) -> Any:
    """A tree of what multiplies the weight decay of each parameter: the first rule's value, or 1.

    Raises:
      UserError: a factor below 0.
    """
    _check_factors(decay, "optimizer.decay")
    return _by_name(params, lambda name: float(rules.first(decay, name, 1.0)))


def rate_factors(params: Any, rates: Rules = (), layer_decay: float = 1.0, above: str = "") -> Any:
    """A tree of what multiplies the learning rate of each parameter.

    That is a float, or for the stacked layers of a scanned encoder an array [layers, 1, ...] that
    broadcasts over the parameter. It is the first rule that matches, or 1, times `layer_decay` to
    the power of how far a parameter lies below the head: 1 for the last layer, the number of layers
    for the first, and one more for what is before the layers (ELECTRA, Clark et al. 2020). What is
    behind them, by the expression `above` (models/__init__.py), learns as fast as the head.

    Raises:
      UserError: a rule that matches no parameter, a factor that is not above 0, or no layers.
    """
    rules.check_used(rates, params, "optimizer.rates")
    _check_factors(rates, "optimizer.rates", above=True)
    if layer_decay <= 0:
        raise UserError(f"config.optimizer.layer_decay={layer_decay} must be greater than 0")
    depth = _count_layers(params) if layer_decay != 1.0 else 0

    def rate(path: tuple, leaf: Any) -> float | np.ndarray:
        name = path_name(path)
        factor = float(rules.first(rates, name, 1.0))
        if not depth or not name.startswith("encoder/"):
            return factor
        if above and rules.matches(f"encoder/({above})", name):
            return factor
        if name.startswith("encoder/layers/"):
            below = np.arange(depth, 0, -1).reshape(-1, *[1] * (len(leaf.shape) - 1))
            return (factor * layer_decay**below).astype(np.float32)
        layer = re.match(r"encoder/layer_(\d+)/", name)
        below = depth - int(layer[1]) if layer else depth + 1
        return factor * layer_decay**below

    return jax.tree_util.tree_map_with_path(rate, params)


def _count_layers(params: Any) -> int:
    encoder = params.get("encoder", {})
    if "layers" in encoder:
        return jax.tree.leaves(encoder["layers"])[0].shape[0]
    count = sum(name.startswith("layer_") for name in encoder)
    if not count:
        raise UserError("config.optimizer.layer_decay needs an encoder with layers: leave it at 1")
    return count


def _check_factors(factors: Rules, key: str, above: bool = False) -> None:
    for pattern, value in factors:
        if value < 0 or (above and value == 0):
            cure = "greater than 0 (config.optimizer.frozen holds still)" if above else "0 or more"
            raise UserError(f"config.{key}: the factor {value} of {pattern!r} must be {cure}")


def _by_name(params: Any, function: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: function(path_name(path)), params)


# ---- The table ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """Parameters of one part of a model that learn alike."""

    group: str  # the first two names of their paths; layers are one, and what LoRA adds its own
    parameters: int
    trainable: str  # 'yes', 'no' or 'after N updates'
    rate: str  # what multiplies the learning rate: '1', or '0.1 to 0.9' over stacked layers
    decay: str  # what multiplies the weight decay


def table(
    params: Any,
    *,
    decay: Rules = (),
    rates: Rules = (),
    frozen: Sequence[tuple[str, int]] = (),
    layer_decay: float = 1.0,
    above: str = "",
) -> list[Row]:
    """The rows of the table that a run's log begins with, in the order of the parameters."""
    names_and_shapes = jax.tree_util.tree_leaves_with_path(params)
    columns = (
        thaw(params, frozen),
        rate_factors(params, rates, layer_decay, above),
        decay_factors(params, decay),
    )
    found: dict[tuple[str, str], list[tuple]] = {}
    for (path, leaf), until, rate, factor in zip(
        names_and_shapes, *map(jax.tree.leaves, columns), strict=True
    ):
        when = {0: "yes", FOREVER: "no"}.get(until, f"after {until} updates")
        found.setdefault((_group(path), when), []).append((leaf.size, rate, factor))
    rows = []
    for (group, when), members in found.items():
        sizes, rates, factors = zip(*members, strict=True)
        spans = ("", "") if when == "no" else (_span(rates), _span(factors))
        rows.append(Row(group, sum(sizes), when, *spans))
    return rows


def shown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table, and one that says how much of a model learns."""
    cells = [("group", "parameters", "trainable", "rate", "decay")]
    cells += [(row.group, f"{row.parameters:,}", *row[2:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for group, size, *rest in cells:
        first = f"{group:<{widths[0]}}  {size:>{widths[1]}}"
        others = (f"{cell:<{width}}" for cell, width in zip(rest, widths[2:], strict=True))
        lines.append("  ".join((first, *others)).rstrip())
    whole = sum(row.parameters for row in rows)
    learns = sum(row.parameters for row in rows if row.trainable != "no")
    return [*lines, f"{learns:,} of {whole:,} parameters learn ({100 * learns / whole:.3g}%)"]


def _group(path: tuple) -> str:
    name = re.sub(r"\blayer_\d+\b", "layers", path_name(path))
    group = "/".join(name.split("/")[:2][: max(1, len(path) - 1)])
    return f"{group} (added)" if rules.matches(peft.ADDED, name) else group


def _span(values: Sequence[float | np.ndarray]) -> str:
    low, high = min(map(np.min, values)), max(map(np.max, values))
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
