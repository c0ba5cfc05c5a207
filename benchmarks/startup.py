"""How long a command takes until it has made its first update: without kept programs, and with.

  python -m benchmarks.startup
  python -m benchmarks.startup --config=configs/spoken_digits.py --json FILE \\
      -- --config.data.root=/data/SpokenDigits

Each row is a process of its own: `import` of what training needs, and the command, timed from its
start to the line that says that update 1 of 1 is done, after which it is ended. The corpus is there
before (a run makes it). "cold" has an empty folder of compiled programs, "warm" the one that the
cold run has left; without more repeats than one, what the operating system has read before differs
too. Nothing else should run beside it.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import table

DONE = "step 1/1"  # in the line of the first update
IMPORT = "from speech_jax import train"


def first_update(config: str, programs: pathlib.Path, more: Sequence[str]) -> tuple[float, float]:
    """Seconds from a command to its first update, and those of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "speech_jax.main", f"--config={config}",
            f"--workdir={folder}/run", "--config.train.steps=1", "--config.train.log_every=1",
            *more,
        ]  # fmt: skip
        start, said = time.perf_counter(), []
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs)},
        )
        for line in process.stderr:
            said.append(line)
            if DONE in line:
                break
        else:
            raise SystemExit("".join(said) + "the command ended before its first update")
        took = time.perf_counter() - start
        process.send_signal(signal.SIGKILL)
        used = os.wait4(process.pid, 0)[2]
        process.returncode = -signal.SIGKILL
        process.stderr.close()
    return took, used.ru_utime + used.ru_stime


def imports() -> tuple[float, float]:
    """Seconds to import what training needs, and those of the processor."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", IMPORT])
    used = os.wait4(process.pid, 0)[2]
    process.returncode = 0
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("more", nargs="*", help="flags of the command, after --")
    chosen = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"import": [], "cold": [], "warm": []}
    for _ in range(chosen.repeats):
        found["import"].append(imports())
        with tempfile.TemporaryDirectory() as programs:
            for name in ("cold", "warm"):
                found[name].append(first_update(chosen.config, pathlib.Path(programs), chosen.more))
    rows = [
        {
            "what": name,
            "seconds": min(took for took, _ in times),
            "worst": max(took for took, _ in times),
            "seconds of the processor": min(used for _, used in times),
        }
        for name, times in found.items()
    ]
    table.report(rows, file=chosen.json)


if __name__ == "__main__":
    main()
