"""How fast a model of the next sample makes sound, one row and several at a time.

  python -m benchmarks.generate [--model=RUN] [--seconds=2] [--rows=1,8] [--json=FILE]

RUN is a workdir or a saved model of the task next_sample; without it, the two kinds of
configs/pretrain_wavenet.py with random weights, which take as long. For figures of one core, let
the process have one: `taskset -c 0 python -m benchmarks.generate`.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from benchmarks.table import report
from configs import pretrain_wavenet
from speech_jax import bundle, experiment
from speech_jax.data.parts.audio import Crop


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    asked = parser.parse_args()
    kinds = {asked.model: _trained} if asked.model else dict.fromkeys(("plain", "mel"), _random)
    rows = [
        {"model": name, **_speed(*make(name), int(count), asked)}
        for name, make in kinds.items()
        for count in asked.rows.split(",")
    ]
    report(rows, file=asked.json)


def _trained(folder: str) -> tuple:
    model = bundle.open(folder)
    return model.task(), model.params, model.config.data.sample_rate


def _random(kind: str) -> tuple:
    config = pretrain_wavenet.get_config(kind)
    task, rate = experiment.make_task(config, {"audio": Crop()}), config.data.sample_rate
    params, _ = jax.jit(task.init)(jax.random.key(0), _batch(1, rate))
    return task, params, rate


def _batch(rows: int, samples: int) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).integers(-3_000, 3_000, (rows, samples))
    return {
        "audio": noise.astype(np.int16),
        "audio_length": np.full(rows, samples, np.int32),
        "speaker": np.zeros(rows, np.int32),
    }


def _speed(task, params, rate: int, rows: int, asked: argparse.Namespace) -> dict[str, float]:
    batch = _batch(rows, round(asked.seconds * rate))
    made = jax.jit(task.generate).lower(params, {}, batch, jax.random.key(0)).compile()
    seconds = []
    for number in range(asked.repeats):
        started = time.perf_counter()
        made(params, {}, batch, jax.random.key(number)).block_until_ready()
        seconds.append(time.perf_counter() - started)
    samples = rows * batch["audio"].shape[1] / statistics.median(seconds)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "parameters": size, "rows": rows, "samples/s": samples, "audio s/s": samples / rate,
    }  # fmt: skip


if __name__ == "__main__":
    main()
