"""A model and what is exported of it: size, word errors and speed of each kind of file.

    python -m benchmarks.exported WORKDIR [--split S] [--root R] [--python BARE/bin/python]

exports a workdir (or saved model) as .sjx with each kind of weights and as ONNX, transcribes a
split with each as `python -m speech_jax.transcribe` does, and prints megabytes, WER, how many of
the texts are those of the workdir, and seconds for the split, after everything is compiled.

With --python, the interpreter of a virtual environment that has jax and numpy only (python -m venv
BARE && BARE/bin/pip install jax numpy) opens the .sjx files too, with sjx.py copied to an empty
folder; `alone` is the largest difference of its logits from those of the training code, on ragged
batches of the split (of int8 and bfloat16: what rounding changes). --json FILE keeps the table.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

import speech_jax
from benchmarks.table import report
from speech_jax import bundle, experiment
from speech_jax.data import audio
from speech_jax.deploy import acoustic, export, sjx
from speech_jax.evaluators.errors import ErrorCounts, count_errors


def recordings(folder, split, root):
    """(samples int16 [T], normalized text) of each utterance of a split."""
    model = bundle.open(folder)
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.root = root or config.data.root
    source = experiment.open_splits(config, split or config.data.eval_splits.split(",")[0])
    for index, utterance in enumerate(source.utterances):
        samples = audio.decode(source.open(index), config.data.sample_rate)
        yield samples, model.parts["labels"].text(utterance)


def measure(path, spoken):
    """(texts, WER in per cent, seconds) of a model on recordings."""
    model = speech_jax.load(path)
    for samples, _ in spoken:  # compiles
        model.transcribe(samples)
    start = time.perf_counter()
    texts = [model.transcribe(samples).text for samples, _ in spoken]
    seconds = time.perf_counter() - start
    pairs = zip(spoken, texts, strict=True)
    errors = sum((count_errors(said, text) for (_, said), text in pairs), ErrorCounts())
    return texts, 100 * errors.wer, seconds


_ALONE = """
import sys, numpy as np, sjx
model, given, found = sjx.load("m.sjx"), np.load("given.npz"), {}
for key in {name[1:] for name in given}:
    found["l" + key], found["f" + key] = model.logits(given["s" + key], given["n" + key])
np.savez("found.npz", **found)
assert not {"flax", "flatbuffers", "speech_jax"} & set(sys.modules)
"""
_BATCHES, _ROWS = 4, 5


def alone(python, path, workdir, spoken):
    """The largest difference of logits between a file, opened by `python`, and the workdir."""
    heard = acoustic.open_acoustic(workdir)
    by_length = sorted((samples for samples, _ in spoken), key=len)
    with tempfile.TemporaryDirectory() as folder:
        folder, given, wanted = pathlib.Path(folder), {}, {}
        for number in range(_BATCHES):
            rows = by_length[number :: len(by_length) // _ROWS][:_ROWS]
            lengths = np.asarray([len(row) for row in rows], np.int32)
            samples = np.zeros((len(rows), lengths.max() + 1_000 * number), np.int16)
            for row, each in zip(samples, rows, strict=True):
                row[: len(each)] = each
            given |= {f"s{number}": samples, f"n{number}": lengths}
            wanted[number] = heard.logits(samples, lengths)
        np.savez(folder / "given.npz", **given)
        shutil.copy(sjx.__file__, folder / "sjx.py")
        shutil.copy(path, folder / "m.sjx")
        (folder / "alone.py").write_text(_ALONE)
        subprocess.run([python, "-E", "alone.py"], cwd=folder, check=True)
        found = np.load(folder / "found.npz")
        worst = 0.0
        for number, (logits, frames) in wanted.items():
            assert (found[f"f{number}"] == frames).all()
            for row, count in enumerate(frames):
                difference = found[f"l{number}"][row, :count] - logits[row, :count]
                worst = max(worst, float(np.abs(difference).max()))
    return worst


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("--split", help="by default the first one that it was evaluated on")
    parser.add_argument("--root", help="of the data, if it has moved")
    parser.add_argument("--python", help="an interpreter that has jax and numpy only")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    spoken = list(recordings(arguments.workdir, arguments.split, arguments.root))
    texts, wer, seconds = measure(arguments.workdir, spoken)
    nothing = {"MB": None, "alone": None}
    rows = [{"kind": "workdir", "WER %": wer, "same texts": len(texts), "s": seconds} | nothing]
    with tempfile.TemporaryDirectory() as folder:
        for kind in (*export.WEIGHTS, "onnx"):
            path = pathlib.Path(folder) / ("m.onnx" if kind == "onnx" else f"{kind}.sjx")
            flags = [] if kind == "onnx" else [f"--weights={kind}"]
            if export.main([arguments.workdir, str(path), *flags]):
                sys.exit(f"{kind} was refused")
            found, wer, seconds = measure(path, spoken)
            same = sum(a == b for a, b in zip(found, texts, strict=True))
            size = path.stat().st_size / 1e6
            row = {"kind": path.name, "WER %": wer, "same texts": same, "s": seconds, "MB": size}
            bare = arguments.python if kind != "onnx" else None
            row["alone"] = bare and alone(bare, path, arguments.workdir, spoken)
            rows.append(row)
    report(rows, file=arguments.json)


if __name__ == "__main__":
    main()
