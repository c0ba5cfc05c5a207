"""Nonnegative numbers with an exponent of their own, for products of many probabilities.

A number is mantissa * 2**exponent, the mantissa float32. Adding and multiplying takes no exp and no
log, no sum ever underflows however peaked the factors are, and the error is that of float32
products (about 1e-7 a factor), while log-space rounds each factor to the precision of a
log-likelihood of thousands of nats.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Products between two calls of `normalized`: a step of CTC grows a mantissa at most 3 * sqrt(2)
# times, so that after 16 it is below 2**34.
CHUNK = 16

ZERO_EXPONENT = -(2**29)  # the exponent of 0: below any that a product of probabilities reaches
LOG2_E = 1 / math.log(2)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is log(2); n * high is exact


class Wide(NamedTuple):
    """A nonnegative number mantissa * 2**exponent, elementwise; float32 and int32 arrays.

    The exponent may also be a whole float32, which holds it exactly up to 2**24.
    """

    mantissa: jax.Array
    exponent: jax.Array


def power_of_two(n: jax.Array) -> jax.Array:
    """2.0**n as float32 for whole n at most 127; 0 for n below -126."""
    bits = (jnp.maximum(n, -127).astype(jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def wide_exp(x: jax.Array, exponent_type: type = jnp.int32) -> Wide:
    """exp(x) as a Wide, exact to float32 for any finite x; 0 for -inf."""
    x = x.astype(jnp.float32)
    # 2**20 bounds the exponent of one frame, so that a sum over frames stays within int32.
    n = jnp.clip(jnp.round(x * LOG2_E), -(2.0**20), 2.0**20)
    return Wide(jnp.exp((x - n * LN2_HIGH) - n * LN2_LOW), n.astype(exponent_type))


def wide_sum(*terms: Wide) -> Wide:
    """The sum of Wide numbers of mantissas below 2**100."""
    exponent = terms[0].exponent
    for term in terms[1:]:
        exponent = jnp.maximum(exponent, term.exponent)
    mantissa = sum(term.mantissa * power_of_two(term.exponent - exponent) for term in terms)
    return Wide(mantissa, exponent)


def wide_times(a: Wide, b: Wide) -> Wide:
    """The product of two Wide numbers."""
    return Wide(a.mantissa * b.mantissa, a.exponent + b.exponent)


def normalized(x: Wide) -> Wide:
    """The same Wide number with its mantissa in [1, 2), or 0."""
    bits = lax.bitcast_convert_type(x.mantissa, jnp.int32)
    shift = lax.shift_right_logical(bits, 23) - 127
    exponent = x.exponent + shift.astype(x.exponent.dtype)
    exponent = jnp.where(x.mantissa == 0, ZERO_EXPONENT, exponent)
    return Wide(x.mantissa * power_of_two(-shift), exponent)


def wide_where(condition: jax.Array, x: Wide) -> Wide:
    """The number where the condition holds, 0 elsewhere."""
    exponent = jnp.where(condition, x.exponent, ZERO_EXPONENT)
    return Wide(jnp.where(condition, x.mantissa, 0), exponent)


def wide_zeros(shape: tuple[int, ...]) -> Wide:
    """Zeros of this shape."""
    return Wide(jnp.zeros(shape), jnp.full(shape, ZERO_EXPONENT, jnp.int32))


def wide_indicator(condition: jax.Array) -> Wide:
    """1 where the condition holds, 0 elsewhere."""
    return Wide(condition.astype(jnp.float32), jnp.where(condition, 0, ZERO_EXPONENT))


def wide_pad(x: Wide, *widths: tuple[int, int]) -> Wide:
    """The numbers with zeros around them, as jnp.pad takes the widths."""
    return Wide(
        jnp.pad(x.mantissa, widths), jnp.pad(x.exponent, widths, constant_values=ZERO_EXPONENT)
    )


def wide_nats(x: Wide) -> jax.Array:
    """-log(x), float32; +inf of 0."""
    nats = -jnp.log(x.mantissa) - x.exponent.astype(jnp.float32) / LOG2_E
    return jnp.where(x.mantissa == 0, jnp.inf, nats)


def wide_over(x: Wide, total: Wide) -> jax.Array:
    """X / total, float32 [..., B, N]: x [..., B, N], total [B]; 0 where a total is 0."""
    there = total.mantissa > 0
    scale = jnp.where(there, 1 / jnp.where(there, total.mantissa, 1), 0)
    shape = *(1,) * (x.mantissa.ndim - 2), -1, 1
    scale, exponent = scale.reshape(shape), total.exponent.reshape(shape)
    return x.mantissa * scale * power_of_two(jnp.minimum(x.exponent - exponent, 127))
