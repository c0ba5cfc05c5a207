"""What pretraining is worth: a task from a pretrained encoder, a random one, and from scratch.

  python -m benchmarks.transfer RECIPE --root=DATA --encoder=RUN --out=FOLDER \\
      [--seeds=3] [--only=A,B] [--json=FILE] [-- --config.KEY=VALUE ...]

RECIPE is speaker_id, accent, emotion or verification. The rows are

  pretrained   all learns, from RUN
  head         the head alone, on RUN as it is
  layers       the head alone, on a learned sum of all layers of RUN
  random       the head alone, on a random encoder of the same shape
  random_sum   the head alone, on a learned sum of all layers of the random encoder
  scratch      all learns, from random weights
  logmel       logistic regression on the mean and standard deviation of log-mel frames
  means        logistic regression on the mean of log-mel frames

Each is a run of its own in FOLDER, with each seed; a run that is there already is read, so that the
same command goes on where it was. Further flags go to all runs.
"""

import argparse
import contextlib
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.table import report
from speech_jax import bundle, experiment
from speech_jax.bundle.format import Bundle
from speech_jax.models.frontend import FrontEnd
from speech_jax.tasks.classify import Classify
from speech_jax.training import sharding

STILL = (
    "--config.data.cache_hidden=True",
    "--config.optimizer.rates=()",
    "--config.optimizer.frozen=(('encoder/.*', -1),)",
)
SUM = "--config.task.layer_sum=True"
# Row -> (what it starts from, further flags).
ROWS = {
    "pretrained": ("encoder", ()),
    "head": ("encoder", STILL),
    "layers": ("encoder", (*STILL, SUM)),
    "random": ("random", STILL),
    "random_sum": ("random", (*STILL, SUM)),
    "scratch": ("encoder", ("--config.init.folder=", "--config.optimizer.rates=()")),
    "logmel": ("", ()),
    "means": ("", ()),
}
MEASURES = ("accuracy", "balanced_accuracy", "macro_f1", "eer", "eer_normalized")


def main() -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=("speaker_id", "accent", "emotion", "verification"))
    for name in ("root", "encoder", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--json")
    own = sys.argv[1:]
    place = own.index("--") if "--" in own else len(own)
    asked = parser.parse_args(own[:place])
    asked.flags = own[place + 1 :]  # for all runs
    rows = []
    for name in asked.only.split(","):
        scores = [_scores(asked, name, seed) for seed in range(asked.seeds)]
        rows.append({"start": name, **dict(_summary(scores)), "runs": len(scores)})
    report(rows, file=asked.json)


def _scores(asked: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """What the run of a row measured on the test split."""
    if name in ("logmel", "means"):
        return _logistic_regression(asked, seed, spread=name == "logmel")
    start, flags = ROWS[name]
    workdir = pathlib.Path(asked.out) / asked.recipe / f"{name}_{seed}"
    results = workdir / "results.json"
    if not results.exists():
        folder = asked.encoder
        if start == "random":
            folder = _random(asked, seed)
        recipe = f"configs/{asked.recipe}.py:{folder}"
        own = ["--config.train.compare=False", f"--config.seed={seed}", *flags, *asked.flags]
        command = [sys.executable, "-m", "speech_jax.main", f"--config={recipe}"]
        command += [f"--workdir={workdir}", f"--config.data.root={asked.root}", *own]
        subprocess.run(command, check=True)
    found = json.loads(results.read_text())
    began = found["config"]["init"]["folder"]
    if name not in ("scratch", "random", "random_sum") and began != asked.encoder:
        sys.exit(f"{workdir} started from {began}, not from {asked.encoder}: name another --out")
    config = found["config"]["data"]
    split = config["test_splits"] or config["eval_splits"]
    return {k: v for k, v in found["splits"][split].items() if k in MEASURES}


def _random(asked: argparse.Namespace, seed: int) -> pathlib.Path:
    """A model like the pretrained one, with the weights that a training begins with."""
    folder = pathlib.Path(asked.out) / f"random_{pathlib.Path(asked.encoder).name}_{seed}"
    if not folder.exists():
        model = bundle.open(asked.encoder)
        task, rate = model.task(), model.config.data.sample_rate
        batch = {"audio": np.zeros((1, rate), np.int16), "audio_length": np.full(1, rate, np.int32)}
        for name, part in model.parts.items():
            if part.count:
                batch |= {name: np.ones((1, 1), np.int32), f"{name}_length": np.ones(1, np.int32)}
        params, state = jax.device_get(jax.jit(task.init)(jax.random.key(seed), batch))
        bundle.save(Bundle(model.config, model.parts, params, state), folder)
    return folder


def _logistic_regression(asked: argparse.Namespace, seed: int, spread: bool) -> dict[str, float]:
    from sklearn import linear_model, metrics, pipeline, preprocessing

    config = importlib.import_module(f"configs.{asked.recipe}").get_config()
    config.data.root = asked.root
    for flag in asked.flags:  # which splits, for a corpus that is not the recipe's
        name, _, value = flag.removeprefix("--config.").partition("=")
        if name.startswith("data.") and isinstance(config.data[name[5:]], str):
            config.data[name[5:]] = value
    config.features.normalize = "none"  # or an utterance would have no mean of its own
    if config.task.verify:
        return {}
    source = experiment.open_training(config)
    folder = pathlib.Path(asked.out) / asked.recipe / "logmel"
    parts = experiment.make_parts(config, folder, source)
    task = experiment.make_task(config, parts)
    splits = (config.data.train_splits, config.data.test_splits)
    fitted, tested = (list(_features(config, task.frontend, parts, split)) for split in splits)
    regression = linear_model.LogisticRegression(
        max_iter=2_000, class_weight="balanced" if config.task.balance else None, random_state=seed
    )
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    used = None if spread else task.frontend.log_mel["mels"]  # the means come first
    (heard, labels), (inputs, truth) = (
        [np.stack(column) for column in zip(*rows, strict=True)] for rows in (fitted, tested)
    )
    said = model.fit(heard[:, :used], labels).predict(inputs[:, :used])
    return {
        "accuracy": metrics.accuracy_score(truth, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, said),
        "macro_f1": metrics.f1_score(truth, said, average="macro", zero_division=0),
    }


def _features(config, frontend: FrontEnd, parts, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """(mean and standard deviation of the log-mel frames [2 M], class) of each utterance."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    corpus = experiment.evaluation_corpus(config, split, parts)
    plan = experiment.evaluation_plan(config, corpus, Classify, mesh)
    statistics_of = jax.jit(lambda batch: _mean_and_spread(*frontend(batch)))
    with contextlib.closing(experiment.evaluation_batches(config, corpus, plan)) as batches:
        for batch in batches:
            rows = np.asarray(statistics_of({k: v for k, v in batch.items() if k != "index"}))
            for row, index, target in zip(rows, batch["index"], batch["target"], strict=True):
                if index >= 0:
                    yield row, int(target)


def _mean_and_spread(frames: jax.Array, lengths: jax.Array) -> jax.Array:
    mask = (jax.numpy.arange(frames.shape[1])[None] < lengths[:, None])[:, :, None]
    count = jax.numpy.maximum(lengths, 1)[:, None]
    mean = (frames * mask).sum(1) / count
    spread = (((frames - mean[:, None]) * mask) ** 2).sum(1) / count
    return jax.numpy.concatenate([mean, jax.numpy.sqrt(spread + 1e-5)], -1)


def _summary(scores: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
    """Mean, and half of the distance from the least to the most, over the seeds, in per cent."""
    for name in MEASURES:
        values = [100 * one[name] for one in scores if one.get(name) is not None]
        spread = f" +- {(max(values) - min(values)) / 2:.1f}" if values else ""
        yield name, f"{statistics.mean(values):.1f}{spread}" if values else "-"


if __name__ == "__main__":
    main()
