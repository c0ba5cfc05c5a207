"""Learning-rate schedules counted in steps; optimizers with rules for rates, decay and freezing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from speech_jax import registry, rules
from speech_jax.errors import UserError
from speech_jax.rules import Rules
from speech_jax.training import groups


def constant(*, peak: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """Linear warm-up to `peak`, then `peak`."""
    del steps
    return _after_warmup(optax.constant_schedule(peak), peak, warmup)


def cosine(*, peak: float, steps: int, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `final` * peak at `steps`."""
    decay = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=final)
    return _after_warmup(decay, peak, warmup)


def exponential(
    *, peak: float, steps: int, warmup: int = 0, hold: int = 0, final: float = 0.01
) -> optax.Schedule:
    """Linear warm-up to `peak`, `hold` steps of it, then exponentially to `final` * peak."""
    decay = optax.exponential_decay(
        peak, max(1, steps - warmup - hold), final, transition_begin=hold, end_value=peak * final
    )
    return _after_warmup(decay, peak, warmup)


def polynomial(
    *, peak: float, steps: int, warmup: int = 0, power: float = 1.0, final: float = 0.0
) -> optax.Schedule:
    """Linear warm-up to `peak`, then down to `final` * peak at `steps`; of power 1, a line."""
    decay = optax.polynomial_schedule(peak, peak * final, power, max(1, steps - warmup))
    return _after_warmup(decay, peak, warmup)


def noam(*, peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then down with the inverse root of the step (Vaswani et al. 2017).

    In the paper's notation, a scale s for a width d is a peak of s / sqrt(d * warmup).
    """
    del steps
    if warmup < 1:
        raise UserError(f"the noam schedule needs a warm-up of at least 1 step, got {warmup}")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32) + 1.0
        return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

    return schedule


def tri_stage(
    *,
    peak: float,
    steps: int,
    warmup: int = 0,
    fractions: Sequence[float] = (0.1, 0.4, 0.5),
    start: float = 0.01,
    final: float = 0.05,
) -> optax.Schedule:
    """Warm up from `start` * peak, hold, decay exponentially to `final` * peak.

    `fractions` are the three stages' shares of `steps` (Baevski et al. 2020, fine-tuning); a
    `warmup` in steps takes the place of the first.
    """
    if len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"tri_stage fractions must be three shares that add up to 1: {fractions}")
    warmup = warmup or round(fractions[0] * steps)
    hold = round(fractions[1] * steps)
    decay = optax.exponential_decay(
        peak, max(1, steps - warmup - hold), final, transition_begin=hold, end_value=peak * final
    )
    ramp = optax.linear_schedule(peak * start, peak, max(1, warmup))
    return optax.join_schedules([ramp, decay], [warmup])


def _after_warmup(schedule: optax.Schedule, peak: float, warmup: int) -> optax.Schedule:
    if not warmup:
        return schedule
    # The first update already has a rate above zero.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, schedule], [warmup])


SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "exponential": exponential,
    "noam": noam,
    "polynomial": polynomial,
    "tri_stage": tri_stage,
}


def make_schedule(
    name: str, *, defaults: Mapping[str, Any] | None = None, **kwargs: Any
) -> optax.Schedule:
    """The schedule `name`: a function from the step (0, 1, ...) to the learning rate.

    `defaults` are settings that nobody chose: one that this schedule does not take is left out.

    Raises:
      UserError: an unknown name or argument, or one that is missing.
    """
    constructor = registry.lookup("schedule", SCHEDULES, name)
    return registry.call(constructor, kwargs, what=f"schedule ({name})", defaults=defaults)


OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadamw": optax.nadamw,
    "sgd": optax.sgd,
    "lion": optax.lion,
}
# They have no weight decay of their own: it is added to the gradient (L2).
_WITHOUT_DECAY = ("adam", "sgd")
# What is set elsewhere: the learning rate by the schedule, the mask by the rules.
_RESERVED = {"learning_rate": "config.schedule", "mask": "config.optimizer.decay"}


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    params: Any,
    *,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    decay: Rules = (),
    rates: Rules = (),
    layer_decay: float = 1.0,
    above: str = "",
    frozen: Sequence[tuple[str, int]] = (),
    defaults: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Clips by the global norm, then the optimizer, then the rates of the parameters.

    It works on the parameters that learn: `groups.split(params, groups.trainable(params, frozen))`,
    the whole tree where nothing is frozen for ever. Rules are those of rules.py, and the first that
    matches holds.

    Args:
      name: adam, adamw, nadamw, sgd or lion; `kwargs` are its own (b1, b2, ...).
      params: all parameters, or their shapes: rules are checked against their paths.
      clip_norm: the largest global norm of a gradient; 0 or None does not clip.
      weight_decay: decoupled from the gradient for adamw, nadamw and lion; for adam and sgd it is
        added to the gradient (L2).
      decay: what multiplies the weight decay of a parameter.
      rates, layer_decay, above: what multiplies its learning rate, see groups.rate_factors.
      frozen: (regular expression, updates): the parameters stand still until so many updates are
        done, with moments that begin then and without a part in the clip; -1 is for ever.
      defaults: settings that nobody chose: one that this optimizer does not take is left out.

    Raises:
      UserError: for an unknown name or argument, and a rule that matches no parameter.
    """
    constructor = registry.lookup("optimizer", OPTIMIZERS, name)
    for key in kwargs.keys() & _RESERVED:
        raise UserError(f"optimizer ({name}): {key} is not set here but in {_RESERVED[key]}")
    mask = groups.trainable(params, frozen)
    learned = lambda tree: groups.split(tree, mask)[0]
    decayed = bool(weight_decay and decay)
    chosen = (lambda tree: _decayed(tree, decay)) if decayed else None

    def make(schedule: optax.Schedule) -> optax.GradientTransformation:
        settings = {"learning_rate": schedule, **kwargs}
        before = []
        if name not in _WITHOUT_DECAY:
            settings |= {"weight_decay": weight_decay} | ({"mask": chosen} if decayed else {})
        elif weight_decay:
            before = [optax.add_decayed_weights(weight_decay, chosen)]
        made = registry.call(constructor, settings, what=f"optimizer ({name})", defaults=defaults)
        return optax.chain(*before, made) if before else made

    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    until = learned(groups.thaw(params, frozen))
    if any(jax.tree.leaves(until)):
        tx = _in_turn(clip, make, schedule, until)
    else:
        tx = optax.chain(*clip, make(schedule))
    factors = learned(groups.decay_factors(params, decay))
    if weight_decay and set(jax.tree.leaves(factors)) - {0.0, 1.0}:
        tx = _scaled_decay(tx, factors)
    factors = learned(groups.rate_factors(params, rates, layer_decay, above))
    if any(jnp.ndim(factor) or factor != 1.0 for factor in jax.tree.leaves(factors)):
        tx = _scaled(tx, factors)
    return tx


def _decayed(tree: Any, decay: Rules) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: rules.first(decay, rules.path_name(path), 1.0) != 0, tree
    )


def _times(tree: Any, factors: Any) -> Any:
    return jax.tree.map(lambda x, factor: x * jnp.asarray(factor, x.dtype), tree, factors)


def _scaled(tx: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """Multiplies the updates of each parameter, which multiplies its learning rate."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changes, state = tx.update(gradient, state, params)
        return _times(changes, factors), state

    return optax.GradientTransformation(tx.init, update)


def _scaled_decay(tx: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """Multiplies the weight decay of each parameter: an optimizer looks at them for that alone."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(gradient, state, _times(params, factors))

    return optax.GradientTransformation(tx.init, update)


class _InTurn(NamedTuple):
    count: jax.Array  # updates that were made
    groups: Any  # the states of the optimizers, one for all parameters that thaw at the same time


def _in_turn(
    clip: Sequence[optax.GradientTransformation],
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    schedule: optax.Schedule,
    until: Any,
) -> optax.GradientTransformation:
    """Optimizers that start one after the other, as the parameters thaw; one schedule for all.

    `until` is a tree of ints: the updates for which a parameter stands still.
    """
    starts = sorted(set(jax.tree.leaves(until)))
    # An optimizer counts from where it starts.
    each = {n: make(lambda count, n=n: schedule(count + n)) for n in starts}
    together = optax.multi_transform(each, until)
    clip = optax.chain(optax.identity(), *clip)

    def init(params: Any) -> _InTurn:
        return _InTurn(jnp.zeros((), jnp.int32), together.init(params))

    def update(gradient: Any, state: _InTurn, params: Any = None) -> tuple[Any, _InTurn]:
        waits = {n: state.count < n for n in starts}
        still = lambda tree: jax.tree.map(lambda x, n: jnp.where(waits[n], 0, x), tree, until)
        gradient = clip.update(still(gradient), clip.init(params))[0]
        changes, new = together.update(gradient, state.groups, params)
        states = {
            n: jax.tree.map(lambda a, b, n=n: jnp.where(waits[n], b, a), state_, before)
            for (n, state_), before in zip(
                new.inner_states.items(), state.groups.inner_states.values(), strict=True
            )
        }
        return still(changes), _InTurn(state.count + 1, new._replace(inner_states=states))

    return optax.GradientTransformation(init, update)
