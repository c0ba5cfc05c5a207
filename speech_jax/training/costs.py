"""What a program costs: its arithmetic, its memory, and the rates that devices can do it at."""

import contextlib
import functools
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError


class Chip(NamedTuple):
    """What one device can do, at most."""

    flops: float  # bfloat16 FLOP/s, without sparsity
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: (
        float  # bytes/s that it sends to the other devices of a slice or a host, all links at once
    )
    network: float = 0.0  # bytes/s that it sends to other hosts, where that is another way


# By a part of `device_kind`; the first that matches holds. TPUs: cloud.google.com/tpu/docs/v4,
# v5e, v5p, v6e (half of the "bidirectional" interconnect bandwidth). GPUs: NVIDIA's data sheets of
# the SXM boards (half of the NVLink bandwidth, which is both ways), and the adapter of each GPU in
# DGX systems: 200 Gbit/s with A100, 400 Gbit/s with H100 and H200.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.228e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.819e12, 200e9),
    "TPU v5e": Chip(197e12, 16 * 2**30, 0.819e12, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
    "TPU v6": Chip(918e12, 32 * 2**30, 1.638e12, 400e9),
    "A100": Chip(312e12, 80e9, 2.039e12, 300e9, 25e9),
    "H100": Chip(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9, 50e9),
}


# What XLA's compiler wants to know of a GPU besides (GpuTargetConfigProto), by generation.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
_HOPPER = {
    "major": 9, "cores": 132, "fpus": 128, "clock": 1.98, "shared": 233472, "optin": 232448,
    "cache": 52428800,
}  # fmt: skip
_AMPERE = {
    "major": 8, "cores": 108, "fpus": 64, "clock": 1.41, "shared": 167936, "optin": 166912,
    "cache": 41943040,
}  # fmt: skip
GPUS = {"a100": _AMPERE, "h100": _HOPPER, "h200": _HOPPER}


def gpu_target(kind: str) -> str:
    """XLA's description of a GPU of GPUS, to compile for where there is none."""
    name = kind.upper()
    rates = CHIPS[name]
    memory, bandwidth = int(rates.memory), int(rates.bandwidth)
    return _TARGET.format(name=name, memory=memory, bandwidth=bandwidth, **GPUS[kind])


def chip(device_kind: str) -> Chip | None:
    """The rates of a kind of device; None for one that is not in the table."""
    kind = device_kind.lower()
    return next((rates for name, rates in CHIPS.items() if name.lower() in kind), None)


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a (closed) jaxpr.

    A loop's body counts as often as it runs, which XLA's own cost analysis does not do. A program
    under remat counts what it recomputes, and a gradient that nobody asks for counts where it is
    written by hand.
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr))


def _count(jaxpr: Any) -> float:
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


def _bodies(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(item, "jaxpr", item)
            if hasattr(body, "eqns"):
                yield body


@functools.cache
def peak_flops() -> float:
    """FLOP/s of one local device: its data sheet's, or what a matrix product gets here.

    The product is of float32 on a CPU and of bfloat16 on an accelerator, as training is there. It
    runs on the device: call this before there is other work on it.
    """
    device = jax.local_devices()[0]
    if rates := chip(device.device_kind):
        return rates.flops
    on_cpu = device.platform == "cpu"
    size = 1024 if on_cpu else 8192
    x = jnp.ones((size, size), jnp.float32 if on_cpu else jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Virtual CPU devices share the cores that the product ran on.
    sharing = jax.local_device_count() if on_cpu else 1
    return 2.0 * size**3 / float(np.median(seconds)) / sharing


def memory_needed(compiled: Any) -> int:
    """Bytes that a compiled program takes on each device: arguments, results, temporaries, code."""
    sizes = compiled.memory_analysis()
    if sizes is None:  # a backend that does not say
        return 0
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
    )


def compile_within_memory(lowered: Any, what: str, cure: str) -> Any:
    """The compiled program of a jitted function that was lowered.

    Raises:
      UserError: it needs more memory than there is. A compiler for TPUs finds so itself; for others
        that would end the run in the middle of a step, or have the kernel kill it.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{what} does not fit in the memory of a device: {cure}") from error
    device, needed = jax.local_devices()[0], memory_needed(program)
    if device.platform == "cpu":  # its devices share the memory of the machine
        needed, there, owner = needed * jax.local_device_count(), host_memory(), "this machine"
    else:
        there, owner = (device.memory_stats() or {}).get("bytes_limit"), f"a {device.device_kind}"
    if there and needed > there:
        raise UserError(
            f"{what} needs {needed / 2**30:.0f} GiB, and {owner} has {there / 2**30:.0f}: {cure}"
        )
    return program


def host_memory() -> int:
    """Bytes of this machine, or what its container may have of them."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such limit
        there = min(there, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return there
