"""Compile the transducer's loss for a TPU v5e or an H200, with no device at hand.

`python -m benchmarks.transducer_aot tpu [--json FILE]` with the extra `tpu-aot`, or `... gpu` with
the extra `gpu`. Prints the temporary bytes of each contestant of benchmarks/transducer.py: nothing
runs, so there are no times.
"""

import argparse
import time

from benchmarks.ctc_aot import topology  # isort: skip, it says which platform jax is to use

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks.table import report
from benchmarks.transducer import CONTESTANTS, LARGE, SHAPES, compiled, problem


def main():
    """Compile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("platform", choices=["tpu", "gpu"])
    parser.add_argument("--json")
    args = parser.parse_args()
    device = topology(args.platform).devices[0]
    sharding = SingleDeviceSharding(device)
    rows = []
    for shape in (SHAPES[-1], LARGE):
        arrays = jax.eval_shape(lambda shape=shape: problem(*shape))
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
        for name, loss in CONTESTANTS.items():
            start = time.perf_counter()
            program = compiled(loss, arrays)
            rows.append(
                {
                    "B,T,U,D,K": ",".join(map(str, shape)),
                    "implementation": name,
                    "temporary MB": program.memory_analysis().temp_size_in_bytes / 1e6,
                    "compile s": time.perf_counter() - start,
                }
            )
    report(rows, file=args.json, device=f"ahead of time: {device.device_kind}")


if __name__ == "__main__":
    main()
