"""What makes fewer errors from few hours, at equal minutes: a table, a training a row and seed.

  python -m benchmarks.fewer --root=DATA/LibriSpeech --out=FOLDER --minutes=25 \\
      [--seeds=2] [--only=ROW,ROW] [--json=FILE] [--list]

Each row is configs/librispeech.py:conformer_tiny with a task and the changes of ROWS, trained on
train-clean-5 and evaluated on dev-clean-5, by the best of its six checkpoints there: as the recipe
searches (greedily, but for an attention decoder), and, on the half that its weights are not tuned
on, greedily and with n-grams of the training transcripts (of an attention decoder, its CTC both
times).

Equal minutes: updates of a row and of the baseline take turns, one of each batch shape, and the row
gets --minutes over its mean time for an update. FOLDER/rates.json keeps these times, as if the
baseline made --rate updates a second (0: as fast as it was when its row was measured): work beside
the trainings changes neither what they compute nor how long they are. Compilation, evaluations and
waits for data come on top.

What FOLDER holds already is read, so that the same command goes on where it was.
"""

import argparse
import collections
import contextlib
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from statistics import mean
from typing import Any

import jax

from benchmarks import table
from configs import librispeech
from speech_jax import experiment, files, main
from speech_jax.data import sources
from speech_jax.data.batch import signature
from speech_jax.setup import make_setup
from speech_jax.training import sharding

TRAIN, DEV = "train-clean-5", "dev-clean-5"
EVALUATIONS = 6  # while a row trains
BASELINE = "baseline"
UPDATES = 15  # that are timed

OVER_TIME = {"model.subsampling_kind": "time"}
PIECES = {"text.tokenizer": "sentencepiece", "text.vocabulary_size": 256}
EIGHT = PIECES | {"model.subsampling": 8}
TIME = EIGHT | OVER_TIME
CHEAP = TIME | {"model.subsampling_channels": 128}
WIDE = TIME | {"model.width": 192, "model.num_layers": 6, "model.subsampling_channels": 192}

# On the transducer.
IDEAS: dict[str, Mapping[str, Any]] = {
    "context_3": {"task.context": 3},
    "context_6": {"task.context": 6},
    "recurrent": {"task.predictor": "recurrent"},
    "b2": {"optimizer.b2": 0.999},
    "peak": {"schedule.peak": 2e-3},
    "dropout": {"model.dropout": 0.1},
    "few_masks": {"spec_augment.frequency_width": 10, "spec_augment.time_fraction": 0.02},
    "batch": {"data.batch_seconds": 60.0, "schedule.peak": 2e-3},
    "speeds": {"data.speeds": (0.9, 1.0, 1.1)},
    "ema": {"train.ema_decay": 0.999},
    "short_first": {"data.short_first": 4},
    "vocal_tract": {"spec_augment.vocal_tract": 0.1},
    "layer_drop": {"model.layer_drop": 0.1},
    "decay": {"optimizer.weight_decay": 0.1},
    "ramp": {
        "spec_augment.time_masks": 4,
        "spec_augment.frequency_masks": 2,
        "spec_augment.ramp": 4_000,
    },
}
# Of CTC alone.
IDEAS_OF_CTC: dict[str, Mapping[str, Any]] = {
    "inter_ctc": {"task.inter_ctc": 0.3},
    "consistency": {
        "task.consistency": 0.2,
        "data.batch_seconds": 20.0,
        "spec_augment.time_masks": 4,
        "spec_augment.frequency_masks": 2,
    },
}

# Row -> what it changes.
ROWS: dict[str, Mapping[str, Any]] = {
    BASELINE: {},
    # Other decoders, the same encoder (see TASKS).
    "attend": {},
    "transduce": {},
    # Cheaper frames, the same layers.
    "over_time": OVER_TIME | {"model.subsampling_channels": 128},
    "eight": EIGHT | {"model.subsampling_channels": 16},
    "separable": EIGHT | {"model.subsampling_kind": "separable"},
    "time": CHEAP,
    "time_128": CHEAP | {"text.vocabulary_size": 128},
    # What they pay for.
    "wide": WIDE,
    "wide_plane": EIGHT
    | {"model.width": 192, "model.num_layers": 6, "model.subsampling_channels": 16},
    "deep": TIME | {"model.width": 144, "model.num_layers": 10, "model.subsampling_channels": 144},
    "wide_over_time": OVER_TIME
    | {"model.width": 192, "model.num_layers": 6, "model.subsampling_channels": 192},
    "wide_128": WIDE | {"text.vocabulary_size": 128},
    # The same with a transducer.
    "transduce_over_time": OVER_TIME | {"model.subsampling_channels": 128},
    "transduce_time": CHEAP,
    "transduce_time_128": CHEAP | {"text.vocabulary_size": 128},
    "transduce_wide": WIDE,
    "transduce_xs": {"model.width": 192, "model.num_layers": 6, "task.context": 3},
    "transduce_deep": TIME
    | {"model.width": 144, "model.num_layers": 10, "model.subsampling_channels": 144},
    # One idea each.
    **{f"time+{name}": CHEAP | changes for name, changes in IDEAS_OF_CTC.items()},
    **{f"transduce+{name}": changes for name, changes in IDEAS.items()},
}
TASKS = ("attend", "transduce")


def run() -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="the folder of LibriSpeech's splits")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="for the trainings")
    parser.add_argument("--minutes", type=float, default=25.0, help="of updates, for each row (25)")
    parser.add_argument("--rate", type=float, default=0.0, help="updates of the baseline a second")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row (1)")
    parser.add_argument("--only", default=",".join(ROWS), help="names of rows, joined by commas")
    parser.add_argument("--json", help="a file for the table")
    parser.add_argument("--list", action="store_true", help="say the rows and their flags, no more")
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"error: unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")
    if asked.list:
        for name in names:
            print(name, *_flags(ROWS[name]))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(asked.seeds):  # a whole table with one seed comes first
        for name in names:
            rows.append({"row": name, "seed": seed, **_trained(asked, name, seed)})
            print(json.dumps(rows[-1]), flush=True)
    table.report([*_table(rows)], file=asked.json)


def _flags(changes: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in changes.items()]


# ---- A row -------------------------------------------------------------------------------------


def _trained(asked: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """What the training of a row ended with."""
    workdir = asked.out / f"{name}_{seed}"
    results = workdir / "results.json"
    seconds = _seconds(asked, name)
    steps = max(EVALUATIONS, round(60 * asked.minutes / seconds))
    if not results.exists():
        every = -(-steps // EVALUATIONS)
        changes = {
            "data.root": asked.root, "data.train_splits": TRAIN, "data.eval_splits": DEV,
            "seed": seed, "train.steps": steps, "train.eval_every": every,
            "checkpoint.every": every, **ROWS[name],
        }  # fmt: skip
        _command(name, workdir, *_flags(changes))
    found = files.read_json(results)
    scores, training = found["splits"][DEV], found["training"]
    if training["steps"] != steps:
        sys.exit(
            f"error: {workdir} has {training['steps']} updates, and {steps} are asked for: take "
            "the --minutes and --rate of before, or another --out"
        )
    row = {
        "M parameters": training["parameters"] / 1e6,
        "updates": training["steps"],
        "ms": 1e3 * seconds,
        "minutes": training["seconds"] / 60,
        "CER": 100 * scores["cer"],
        "WER": 100 * scores["wer"],
    }
    return row | _with_transcripts(asked, name, workdir)


def _with_transcripts(
    asked: argparse.Namespace, name: str, workdir: pathlib.Path
) -> dict[str, float]:
    """WER and CER of half of the split, without and with n-grams of the training transcripts."""
    said = workdir / "tuned.txt"
    if not said.exists():
        text, grams = asked.out / "transcripts.txt", workdir / "transcripts.arpa"
        _transcripts(asked, text)
        pieces = files.read_json(workdir / "config.json")["text"]["tokenizer"] == "sentencepiece"
        order = "4" if pieces else "6"
        build = [sys.executable, "-m", "speech_jax.decoding.lm", "build", text, grams]
        subprocess.run([*build, "--order", order, "--model", workdir], check=True)
        search = "transducer_beam" if _task(name) == "transduce" else "beam"
        decoder = {"decoder.name": search, "decoder.lm": grams, "decoder.width": 8}
        flags = _flags({"data.root": asked.root, "data.eval_splits": DEV, **decoder})
        output = _command(name, workdir, "--mode=tune", *flags, quiet=True)
        files.write_atomically(said, output)
    found = {}
    for line in said.read_text().splitlines():
        kind, _, figures = line.strip().partition(": ")
        if kind in ("greedy", "transducer", "tuned"):
            words = figures.replace(",", " ").split()
            for measure in ("WER", "CER"):
                label = f"{measure}, half, LM" if kind == "tuned" else f"{measure}, half"
                found[label] = float(words[words.index(measure) + 1].rstrip("%"))
    return found


def _task(name: str) -> str:
    """The task of a row, where it is not CTC: the first word of its name."""
    first = name.partition("+")[0].partition("_")[0]
    return first if first in TASKS else ""


def _recipe(name: str) -> str:
    task = _task(name)
    return f"conformer_tiny+{task}" if task else "conformer_tiny"


def _command(name: str, workdir: pathlib.Path, *flags: str, quiet: bool = False) -> str:
    """Runs speech_jax.main with the recipe of a row; what it printed, if it is quiet."""
    words = [sys.executable, "-m", "speech_jax.main"]
    words += [f"--config=configs/librispeech.py:{_recipe(name)}", f"--workdir={workdir}", *flags]
    output = subprocess.PIPE if quiet else None
    return subprocess.run(words, check=True, text=True, stdout=output).stdout


def _transcripts(asked: argparse.Namespace, file: pathlib.Path) -> None:
    source = sources.open_source("librispeech", root=asked.root, split=TRAIN)
    text = "".join(f"{utterance.text}\n" for utterance in source.utterances)
    files.write_atomically(file, text)


# ---- Equal minutes -----------------------------------------------------------------------------


def _seconds(asked: argparse.Namespace, name: str) -> float:
    """Seconds of an update of a row, on a machine where the baseline makes so many a second."""
    file = asked.out / "rates.json"
    kept = files.read_json(file) if file.exists() else {}
    if name not in kept:
        print(f"{name}: measuring its update", flush=True)
        taken = _update_times(asked, {BASELINE: {}, name: ROWS[name]})
        kept.setdefault(BASELINE, 1 / asked.rate if asked.rate else taken[BASELINE])
        kept[name] = kept[BASELINE] * taken[name] / taken[BASELINE]
        files.write_atomically(file, files.dump_json(kept))
    return kept[name]


def _update_times(asked: argparse.Namespace, rows: Mapping[str, Mapping]) -> dict[str, float]:
    """Mean seconds of an update of each, over the batches of an epoch; taken in turns."""
    main.keep_memory()  # as trainings do
    updates, counts = {}, {}
    for name, changes in rows.items():
        for shape, (count, update) in enumerate(_updates(asked, name, changes)):
            updates[name, shape], counts[name, shape] = update, count
    medians = table.interleaved_medians(updates, repeats=UPDATES, warmup=2)
    of = lambda name: [key for key in counts if key[0] == name]
    total = lambda name: sum(counts[key] * medians[key] for key in of(name))
    return {name: total(name) / sum(counts[key] for key in of(name)) for name in rows}


def _updates(
    asked: argparse.Namespace, name: str, changes: Mapping
) -> Iterator[tuple[int, Callable[[], None]]]:
    """For each batch shape of a row, how many an epoch has, and a function that makes an update."""
    config = librispeech.get_config(_recipe(name))
    data = {"data.root": asked.root, "data.train_splits": TRAIN}
    config.update_from_flattened_dict({**data, **changes})
    source, mesh = experiment.open_training(config), sharding.make_mesh(**config.mesh)
    parts = experiment.make_parts(config, asked.out / "measured" / name, source)
    task = experiment.make_task(config, parts)
    corpus = experiment.training_corpus(config, source, parts, task)
    plan = experiment.training_plan(config, corpus, task, mesh)
    counts = collections.Counter(planned.bucket for planned in plan.epoch(0))
    setup = make_setup(config, task, corpus.fields, mesh, plan.buckets[-1])
    programs, state = setup.compile(list(counts)), setup.fresh_state()
    found = {}
    with contextlib.closing(experiment.training_batches(config, corpus, plan, 0)) as batches:
        while len(found) < len(counts):
            batch = next(batches)
            found.setdefault(signature(batch), sharding.put_batch(batch, mesh))

    def update(batch: Any) -> None:
        nonlocal state
        state, sums, _ = programs.at(1, signature(batch)).run(state, batch)
        jax.block_until_ready(sums)

    for bucket, count in counts.items():
        yield count, functools.partial(update, found[signature(setup.batch(bucket))])


def _table(rows: list[dict]) -> Iterator[dict]:
    """A line for each row: means over the seeds, and half of the range of the error rates."""
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row for row in rows if row["row"] == name]
        line = {"row": name, "seeds": len(same)}
        for key in same[0].keys() - {"row", "seed"}:
            values = [row[key] for row in same]
            spread = (max(values) - min(values)) / 2
            rate = key.startswith(("WER", "CER"))
            line[key] = mean(values)
            if rate and len(values) > 1:
                line[key] = f"{mean(values):.1f} +- {spread:.1f}"
        yield {key: line[key] for key in ("row", "seeds", *same[0]) if key in line}


if __name__ == "__main__":
    run()
