"""What adversarial training costs: an update of each method against a clean one.

  python -m benchmarks.adversarial --json adversarial.json
  python -m benchmarks.adversarial --model conformer:s --rows 8 --seconds 12

GFLOP are of matrix products and convolutions, counted from the program (a loop's body as often as
it runs); `XLA` is the compiler's own count, in which a loop's body counts once. `temporary` is the
memory that the compiled step needs beside state and batch. Times are medians of runs that take
turns.
"""

import argparse

import jax
import numpy as np

from benchmarks.report import interleaved_medians, report
from speech_jax import config as defaults
from speech_jax import experiment, models, train
from speech_jax.data.plan import Bucket
from speech_jax.training import optim, sharding

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
    samples = int(flags.seconds * config.data.sample_rate)
    bucket = Bucket(samples, labels=int(8 * flags.seconds), rows=flags.rows)
    steps = {name: _Step(config, changes, bucket) for name, changes in METHODS.items()}
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

    def __init__(self, config, changes, bucket):
        config = config.copy_and_resolve_references()
        config.adversarial.update(changes)
        mesh = sharding.make_mesh()
        task = experiment.make_task(config, VOCABULARY)
        schedule = optim.make_schedule(steps=config.train.steps, **config.schedule)
        shapes = train.batch_shapes(bucket, mesh)
        abstract, init, tx = train.abstract_state(config, task, schedule, mesh, shapes)
        program = train.compile_steps(config, task, tx, abstract, [bucket], mesh)[bucket.samples]
        self._run = program.run
        self._state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
        self._batch = sharding.put_batch(_noise(bucket), mesh)
        self.flops = program.flops
        self.xla_flops = program.run.cost_analysis()["flops"]
        self.temporary = program.run.memory_analysis().temp_size_in_bytes

    def __call__(self):
        self._state, *_ = jax.block_until_ready(self._run(self._state, self._batch))


def _noise(bucket):
    rng = np.random.default_rng(0)
    rows, samples, labels = bucket.rows, bucket.samples, bucket.labels
    return {
        "audio": (1000 * rng.standard_normal((rows, samples))).astype(np.int16),
        "audio_length": np.full(rows, samples, np.int32),
        "labels": rng.integers(1, VOCABULARY, (rows, labels), dtype=np.int32),
        "labels_length": np.full(rows, labels, np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


if __name__ == "__main__":
    main()
