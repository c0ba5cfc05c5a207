"""What makes fewer errors from few hours, at equal minutes: a table, a training a row and seed.

  python -m benchmarks.fewer --root=DATA/LibriSpeech --out=FOLDER --minutes=25 \\
      [--seeds=2] [--only=ROW,ROW] [--json=FILE] [--list] [-- --config.KEY=VALUE ...]

Each row is configs/librispeech.py with the changes of ROWS, trained on train-clean-5 and evaluated
on dev-clean-5: greedy, and (on the half that its weights are not tuned on) greedy and with n-grams of
the training transcripts. Further flags go to all trainings.

Equal minutes: an update of a row and one of the baseline take turns on the same utterances, and the
row gets --minutes over its time for an update. FOLDER/rates.json keeps these times, as if the
baseline made --rate updates a second (0: as fast as it was when its row was measured): work beside
the trainings changes neither what they compute nor how long they are. Compilation, evaluations and
waits for data come on top.

What FOLDER holds already is read, so that the same command goes on where it was.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import mean, median
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.table import report
from configs import librispeech
from speech_jax import experiment, files
from speech_jax import main as command
from speech_jax.data.sources import base
from speech_jax.training import sharding

TRAIN, DEV = "train-clean-5", "dev-clean-5"
EVALUATIONS = 6  # while a row trains
BASELINE = "baseline"

PIECES = {"text.tokenizer": "sentencepiece", "text.vocabulary_size": 256}
EIGHT = PIECES | {"model.subsampling": 8}
TIME = EIGHT | {"model.subsampling_kind": "time"}
WIDE = TIME | {"model.width": 192, "model.num_layers": 6, "model.subsampling_channels": 192}

# Row -> what it changes.
ROWS: dict[str, Mapping[str, Any]] = {
    BASELINE: {},
    # Cheaper frames, the same layers.
    "eight": EIGHT | {"model.subsampling_channels": 16},
    "separable": EIGHT | {"model.subsampling_kind": "separable"},
    "time": TIME | {"model.subsampling_channels": 128},
    # What they pay for.
    "wide": WIDE,
    "wide_plane": EIGHT
    | {"model.width": 192, "model.num_layers": 6, "model.subsampling_channels": 16},
    "deep": TIME | {"model.width": 144, "model.num_layers": 10, "model.subsampling_channels": 144},
    "wide_128": WIDE | {"text.vocabulary_size": 128},
}


def main() -> None:
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
    own = sys.argv[1:]
    place = own.index("--") if "--" in own else len(own)
    asked = parser.parse_args(own[:place])
    asked.flags = own[place + 1 :]
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
    report([*_table(rows)], file=asked.json)


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
        _command(workdir, *_flags(changes), *asked.flags)
    found = files.read_json(results)
    scores, training = found["splits"][DEV], found["training"]
    row = {
        "M parameters": training["parameters"] / 1e6,
        "updates": training["steps"],
        "ms": 1e3 * seconds,
        "minutes": training["seconds"] / 60,
        "CER": 100 * scores["cer"],
        "WER": 100 * scores["wer"],
    }
    return row | _with_transcripts(asked, workdir)


def _with_transcripts(asked: argparse.Namespace, workdir: pathlib.Path) -> dict[str, float]:
    """WER and CER of half of the split, without and with n-grams of the training transcripts."""
    said = workdir / "tuned.txt"
    if not said.exists():
        text, grams = asked.out / "transcripts.txt", workdir / "transcripts.arpa"
        _transcripts(asked, text)
        order = (
            "6"
            if files.read_json(workdir / "config.json")["text"]["tokenizer"] == "characters"
            else "4"
        )
        build = [sys.executable, "-m", "speech_jax.decoding.lm", "build", text, grams]
        subprocess.run([*build, "--order", order, "--model", workdir], check=True)
        flags = _flags(
            {
                "data.root": asked.root,
                "data.eval_splits": DEV,
                "decoder.name": "beam",
                "decoder.lm": grams,
                "decoder.width": 16,
            }  # fmt: skip
        )
        output = _command(workdir, "--mode=tune", *flags, quiet=True)
        files.write_atomically(said, output)
    found = {}
    for line in said.read_text().splitlines():
        kind, _, figures = line.strip().partition(": ")
        if kind in ("greedy", "tuned"):
            words = figures.replace(",", " ").split()
            for measure in ("WER", "CER"):
                label = f"{measure}, half" if kind == "greedy" else f"{measure}, half, LM"
                found[label] = float(words[words.index(measure) + 1].rstrip("%"))
    return found
