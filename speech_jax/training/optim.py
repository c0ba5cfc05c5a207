"""Learning-rate schedules counted in steps; optimizers with rules for decay and freezing."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from speech_jax import registry
from speech_jax.errors import UserError


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

    A scale s for width d in the paper's notation is a peak of s / sqrt(d * warmup).
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
    fractions: Sequence[float] = (0.1, 0.4, 0.5),
    start: float = 0.01,
    final: float = 0.05,
) -> optax.Schedule:
    """Warm up from `start` * peak, hold, decay exponentially to `final` * peak.

    `fractions` are the three stages' shares of `steps` (Baevski et al. 2020, fine-tuning).
    """
    if len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"tri_stage fractions must be three shares that add up to 1: {fractions}")
    warmup, hold = (round(fraction * steps) for fraction in fractions[:2])
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


def make_schedule(name: str, **kwargs) -> optax.Schedule:
    """The schedule `name`: a function from the step (0, 1, ...) to the learning rate."""
    return registry.call(
        registry.lookup("schedule", SCHEDULES, name), kwargs, what=f"schedule ({name})"
    )


OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadamw": optax.nadamw,
    "sgd": optax.sgd,
    "lion": optax.lion,
}


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    params,
    *,
    clip_norm: float | None = None,
    no_decay: str = "",
    frozen: Sequence[tuple[str, int]] = (),
    **kwargs,
) -> optax.GradientTransformation:
    """An optax chain: clip by global norm, the optimizer, freezing.

    Args:
      name: adam, adamw, nadamw, sgd or lion; `kwargs` are its own (b1, b2, weight_decay, ...).
      params: the parameters, or their shapes: rules are checked against their paths.
      clip_norm: the largest global norm of a gradient; None does not clip.
      no_decay: a regular expression of the parameters that weight decay leaves alone.
      frozen: (regular expression, updates): those parameters stand still until so many updates
        are done; -1 is for ever.

    Raises:
      UserError: for an unknown name or argument, and a rule that matches no parameter.
    """
    constructor = registry.lookup("optimizer", OPTIMIZERS, name)
    if kwargs.get("weight_decay") and no_decay:
        kwargs["mask"] = jax.tree.map(lambda hit: not hit, matching(params, no_decay))
    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    chain.append(
        registry.call(
            constructor, {"learning_rate": schedule, **kwargs}, what=f"optimizer ({name})"
        )
    )
    for pattern, updates in frozen:
        chain.append(freeze(matching(params, pattern), updates))
    return optax.chain(*chain)


def freeze(mask, updates: int) -> optax.GradientTransformation:
    """Zeroes the updates of the masked parameters until `updates` steps are done (-1: always)."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(changes, state, params=None):
        del params
        thawed = (state.count >= updates) & (updates >= 0)
        changes = jax.tree.map(
            lambda change, masked: jnp.where(thawed, change, 0) if masked else change, changes, mask
        )
        return changes, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def path_name(path) -> str:
    """A pytree path as text: 'encoder/layers/attention/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matching(params, pattern: str):
    """A tree of bools: does the regular expression occur in the parameter's path?

    Raises:
      UserError: if it occurs in none, naming some paths.
    """
    hits = jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(pattern, path_name(path)) is not None, params
    )
    if not any(jax.tree.leaves(hits)):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise UserError(f"no parameter matches {pattern!r}; there are {', '.join(paths[:8])}, ...")
    return hits
