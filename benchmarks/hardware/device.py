"""What the device is and can do: the ceilings that the other parts are read against."""

import argparse
import subprocess

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.hardware import Table, median_seconds, run_part
from benchmarks.report import _versions as versions


def run(table: Table, flags: argparse.Namespace) -> None:
    """Facts first, then rates."""
    device = jax.devices()[0]
    table.add("device", kind=device.device_kind, count=jax.device_count(), **versions())
    with table.attempt("backend"):
        version = getattr(device.client, "platform_version", "?")
        table.add("backend", version=" ".join(version.split()))
    if device.platform == "gpu":
        with table.attempt("driver"):
            query = (
                "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
            )
            answer = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
            )
            table.add("driver", nvidia_smi=answer.stdout.strip())
    size = 256 if flags.tiny else 8192
    for dtype, precision in (("bfloat16", None), ("float32", None), ("float32", "highest")):
        with table.attempt(f"product {dtype}"):
            keys = jax.random.split(jax.random.key(0))
            a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
            product = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
            seconds = median_seconds(
                lambda call=product, x=a, y=b: call(x, y).block_until_ready(), 10
            )
            rate = 2 * size**3 / seconds
            what = f"product of {size} squared, {dtype}, precision {precision}"
            table.add(what, TFLOPs=rate / 1e12)
    with table.attempt("copy"):
        x = jax.random.normal(jax.random.key(0), (2**16 if flags.tiny else 2**29,))
        copy = jax.jit(lambda x: x + 1)
        seconds = median_seconds(lambda: copy(x).block_until_ready(), 10)
        table.add("copy, read and written", GBps=2 * x.nbytes / seconds / 1e9)
    with table.attempt("latencies"):
        one = jnp.zeros((8, 128))
        add = jax.jit(lambda x: x + 1)
        seconds = median_seconds(lambda: add(one).block_until_ready(), 50)
        table.add("a call, waited for", us=1e6 * seconds)
        steps = 1000
        loop = jax.jit(lambda x: lax.fori_loop(0, steps, lambda i, y: jnp.sin(y) + x, x))
        seconds = median_seconds(lambda: loop(one).block_until_ready(), 5)
        table.add("a step of a loop in XLA", us=1e6 * seconds / steps)


if __name__ == "__main__":
    run_part("device", run)
