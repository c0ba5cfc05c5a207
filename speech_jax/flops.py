"""Arithmetic of a program, counted from its jaxpr, and the rates that devices can do it at."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

# Peak bfloat16 FLOP/s of a device, without sparsity, by a part of its `device_kind`
# (cloud.google.com/tpu/docs; NVIDIA data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def matmul_flops(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a (closed) jaxpr.

    A loop's body counts as often as it runs, which XLA's own cost analysis does not do. A program
    under remat counts what it recomputes.
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr))


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
        else:
            times = params["length"] if name == "scan" else 1
            inner = [_count(body) for body in _bodies(params)]
            if inner:
                total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _bodies(params):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(item, "jaxpr", item)
            if hasattr(body, "eqns"):
                yield body


@functools.cache
def peak_flops() -> float:
    """FLOP/s of one local device: its data sheet's, or what a float32 matrix product gets here."""
    device = jax.local_devices()[0]
    for kind, peak in PEAK_FLOPS.items():
        if kind.lower() in device.device_kind.lower():
            return peak
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Virtual CPU devices share the cores that the product ran on.
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    return 2.0 * size**3 / float(np.median(seconds)) / sharing
