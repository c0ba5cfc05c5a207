"""What every benchmark shares: interleaved timing, one table, one JSON format."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from speech_jax.versions import versions


def interleaved_medians(calls, *, repeats=15, warmup=2):
    """Median seconds of each callable: {name: function} -> {name: seconds}.

    The callables take turns, so that whatever else the machine does falls on all of them alike.
    A callable blocks until its result is ready (jax.block_until_ready).
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def report(rows, *, file=None, device=None):
    """Print the rows (dicts with the same keys) as a table; with `file` also write them as JSON.

    The file holds {"device", "versions", "commit", "command", "rows"}.
    """
    columns = list(rows[0])
    cells = [columns] + [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if file:
        result = {
            "device": device or _device(),
            "versions": versions("numpy", "torch", "transformers", "libtpu"),
            "commit": _commit(),
            "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
            "rows": rows,
        }
        Path(file).write_text(json.dumps(result, indent=1) + "\n")


def _text(value):
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _module():
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


def _device():
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    import os

    return f"CPU, {os.cpu_count()} cores: {name}"


def _commit():
    here = Path(__file__).parent
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
