"""What adversarial training costs: an update of each method against a clean one.

  python -m benchmarks.adversarial --json adversarial.json
  python -m benchmarks.adversarial --model conformer:s --rows 8 --seconds 12

GFLOP are of matrix products and convolutions, counted from the program (a loop's body as often as
it runs); `XLA` is the compiler's own count, in which a loop's body counts once. `temporary` is the
memory that the compiled step needs beside state and batch. Times are medians of runs that take
turns.
"""

import argparse

from ml_collections import ConfigDict

from benchmarks.hardware.build import Model
from benchmarks.table import interleaved_medians, report
from speech_jax import config as defaults
from speech_jax import models

METHODS = {
    "clean": {},
    "fgsm": {"method": "fgsm"},
    "fgsm, alpha 1": {"method": "fgsm", "alpha": 1.0},
    "pgd-3": {"method": "pgd", "steps": 3},
}
VOCABULARY = 29


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="conformer:tiny", help="an encoder and its variant")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.75)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the table here")
    flags = parser.parse_args()

    config = defaults.default()
    config.model = models.settings(*flags.model.split(":"))
    config.schedule = {"name": "constant", "peak": 1e-4}
    steps = {
        name: _Step(config, changes, flags.rows, flags.seconds) for name, changes in METHODS.items()
    }
    seconds = interleaved_medians(steps, repeats=flags.repeats)

    clean, rows = steps["clean"], []
    for name, step in steps.items():
        update = seconds[name]
        rows.append(
            {
                "method": name,
                "GFLOP": step.flops / 1e9,
                "x": step.flops / clean.flops,
                "XLA GFLOP": step.xla_flops / 1e9,
                "XLA x": step.xla_flops / clean.xla_flops,
                "temporary MiB": step.temporary / 2**20,
                "temporary x": step.temporary / clean.temporary,
                "ms": 1e3 * update,
                "time x": update / seconds["clean"],
            }
        )
    report(rows, file=flags.json)


class _Step:
    """The compiled step of training with some method, on a batch of noise."""

    def __init__(self, config: ConfigDict, changes: dict, rows: int, seconds: float):
        config = config.copy_and_resolve_references()
        config.adversarial.update(changes)
        model = Model(config, VOCABULARY)
        model.start()
        self._step = model.trace(rows, seconds, labels_per_second=8).compile()
        self._step.load()
        self.flops, self.temporary = self._step.flops, self._step.temporary
        self.xla_flops = self._step.xla_flops

    def __call__(self) -> None:
        self._step()


if __name__ == "__main__":
    main()
