"""A model and what is exported of it: size, word errors and speed of each kind of file.

    python -m benchmarks.exported WORKDIR [--split S] [--root R] [--json FILE]

exports a workdir (or saved model) as .sjx with each kind of weights and as ONNX, transcribes a
split with each as `python -m speech_jax.transcribe` does, and prints megabytes, WER, how many of
the texts are those of the workdir, and seconds for the split, after everything is compiled.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import speech_jax
from benchmarks.table import report
from speech_jax import bundle, experiment
from speech_jax.data import audio
from speech_jax.deploy import export
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


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("--split", help="by default the first one that it was evaluated on")
    parser.add_argument("--root", help="of the data, if it has moved")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    spoken = list(recordings(arguments.workdir, arguments.split, arguments.root))
    texts, wer, seconds = measure(arguments.workdir, spoken)
    rows = [{"kind": "workdir", "MB": None, "WER %": wer, "same texts": len(texts), "s": seconds}]
    with tempfile.TemporaryDirectory() as folder:
        for kind in (*export.WEIGHTS, "onnx"):
            path = pathlib.Path(folder) / ("m.onnx" if kind == "onnx" else f"{kind}.sjx")
            flags = [] if kind == "onnx" else [f"--weights={kind}"]
            if export.main([arguments.workdir, str(path), *flags]):
                sys.exit(f"{kind} was refused")
            found, wer, seconds = measure(path, spoken)
            same = sum(a == b for a, b in zip(found, texts, strict=True))
            size = path.stat().st_size / 1e6
            row = {"kind": path.name, "MB": size, "WER %": wer, "same texts": same, "s": seconds}
            rows.append(row)
    report(rows, file=arguments.json)


if __name__ == "__main__":
    main()
