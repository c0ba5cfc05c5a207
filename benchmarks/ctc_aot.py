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

from benchmarks.report import report
from speech_jax.ops.ctc import ctc_loss

SHAPES = ((16, 400, 60, 1024), (16, 400, 150, 32), (8, 1500, 200, 1024), (32, 400, 100, 128))

# XLA's GpuTargetConfigProto of an H200, in text.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H200"
"""


def topology(platform):
    """Descriptions of the devices to compile for."""
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=H200
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
