"""Weak scaling of Conformer-L on TPU slices that are not here: what preflight says of each.

    python -m benchmarks.scaling --chips 1 4 16 64 256

Each chip keeps the same rows of 20 s, so its arithmetic should stay the same, and what it sends
should not grow. Compiles for the slices (extra tpu-aot); no figure here is a measurement.
"""

import argparse

from benchmarks.table import report
from configs import librispeech
from speech_jax.preflight import compile as preflight

SLICES = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}


def main():
    """Prints a row for each slice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["v5e", "v6e"], default="v5e")
    parser.add_argument("--chips", type=int, nargs="+", choices=list(SLICES), default=list(SLICES))
    parser.add_argument("--rows", type=int, default=16, help="rows of 20 s for each chip")
    parser.add_argument("--fsdp", type=int, default=1, help="chips of the fsdp axis, or -1 for all")
    parser.add_argument("--tensor", type=int, default=1, help="chips of the tensor axis")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [_row(args, chips) for chips in args.chips]
    report(rows, file=args.json, device=f"none: compiled for TPU {args.kind}")


def _row(args, chips: int) -> dict:
    config = librispeech.get_config("conformer_l")
    config.model.remat = True
    config.data.speeds = (1.0,)
    config.data.batch_seconds = config.data.max_seconds * args.rows * chips
    config.mesh.fsdp, config.mesh.tensor = args.fsdp, args.tensor
    config.mesh.data = 1 if args.fsdp == -1 else -1
    where = preflight.find_devices(f"{args.kind}:{SLICES[chips]}")
    figures = preflight.measure(config, where)
    if not figures["fits"]:
        raise SystemExit(f"{where.name} does not fit: {figures['why']}")
    sent = sum(moved["bytes"] for moved in figures["collectives"].values())
    return {
        "chips": chips,
        "mesh": "x".join(str(size) for size in figures["mesh"].values()),
        "TFLOP/chip": figures["flops"] / 1e12,
        "GiB/chip": figures["total"] / 2**30,
        "sent MB/chip": sent / 1e6,
        "arithmetic ms": 1e3 * figures["arithmetic_seconds"],
        "memory ms": 1e3 * figures["memory_seconds"],
        "collective ms": 1e3 * figures["collective_seconds"],
        "bound by": figures["bound"],
        "MFU": figures["mfu"],
        "audio h/s": figures["audio_hours_per_second"],
    }


if __name__ == "__main__":
    main()
