"""Compile the CTC kernels with the compilers of a TPU v5e or an H200, with no device at hand.

`python -m benchmarks.ctc_aot tpu [--json FILE]` with the extra `tpu-aot`, or `... gpu` with the
extra `gpu`. Prints, for each shape of benchmarks/ctc.py, the temporary bytes of the programs with
the kernel and with XLA: nothing runs, so there are no times.
"""

import argparse
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.ctc import SHAPES
from benchmarks.table import report
from speech_jax.ops.ctc import ctc_loss
from speech_jax.training import costs


def topology(platform):
    """Descriptions of the devices to compile for."""
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=costs.gpu_target("h200")
    )


def main():
    """Compile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("platform", choices=["tpu", "gpu"])
    parser.add_argument("--json")
    args = parser.parse_args()
    device = topology(args.platform).devices[0]
    sharding = SingleDeviceSharding(device)
    shape = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
    rows = []
    for B, T, N, K in SHAPES:
        arrays = shape(B, T, K, dtype=jnp.float32), shape(B), shape(B, N), shape(B)
        for implementation in (f"pallas_{args.platform}", "xla"):
            loss = lambda *args, name=implementation: ctc_loss(
                *args, implementation=name, interpret=False
            )
            total = lambda *args, loss=loss: loss(*args).sum()
            for name, function in (("value", loss), ("value+gradient", jax.value_and_grad(total))):
                start = time.perf_counter()
                compiled = jax.jit(function).lower(*arrays).compile()
                rows.append(
                    {
                        "B,T,N,K": f"{B},{T},{N},{K}",
                        "implementation": implementation,
                        "program": name,
                        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                        "compile s": time.perf_counter() - start,
                    }
                )
    report(rows, file=args.json, device=f"ahead of time: {device.device_kind}")


if __name__ == "__main__":
    main()
