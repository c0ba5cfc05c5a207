"""A long recording: times real time, peak memory, and what chunks of other lengths change.

    python -m benchmarks.transcribe --model WORKDIR --root LibriSpeech --split dev-clean-5

Utterances of a split (LibriSpeech's layout, or --source) are joined, in an order drawn with a seed
and with pauses of 0.3 to 1.5 s of faint noise, until they last --minutes. Each chunk length
transcribes the file in a process of its own, for its peak memory; the first one is what the others
are compared with, word by word.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import rapidfuzz
import soundfile

from benchmarks.table import report
from speech_jax.data import audio, sources

_RATE = 16_000

_ONE = """
import json, resource, sys, time
import speech_jax
model = speech_jax.load(sys.argv[1], chunk_seconds=float(sys.argv[2]))
model.transcribe(sys.argv[4])
start = time.perf_counter()
found = model.transcribe(sys.argv[3])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([found.text, found.seconds / seconds, peak, len(found.segments)]))
"""


def _join(source, minutes: float, folder: pathlib.Path) -> str:
    """Writes the long recording, and its first minute for the warm-up; returns its text."""
    rng, texts, written = np.random.default_rng(0), [], 0
    order: list[int] = []
    with (
        soundfile.SoundFile(folder / "long.flac", "w", _RATE, 1, "PCM_16") as long,
        soundfile.SoundFile(folder / "short.flac", "w", _RATE, 1, "PCM_16") as short,
    ):
        while written < minutes * 60 * _RATE:
            order = order or list(rng.permutation(len(source.utterances)))
            index = int(order.pop())
            samples = audio.decode(source.open(index), _RATE)
            noise = rng.integers(-3, 4, round(rng.uniform(0.3, 1.5) * _RATE)).astype(np.int16)
            for file in (long, short)[: 1 + (written < 60 * _RATE)]:
                file.write(samples)
                file.write(noise)
            written += len(samples) + len(noise)
            texts.append(source.utterances[index].text)
    return " ".join(texts)


def _distance(one: str, other: str) -> float:
    """Word errors of `other` as a share of the words of `one`."""
    words = one.split()
    return rapidfuzz.distance.Levenshtein.distance(words, other.split()) / max(1, len(words))


def main() -> None:
    """Prints a row for each chunk length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--split", default="dev-clean-5")
    parser.add_argument("--source", default="librispeech")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--chunks", type=float, nargs="+", default=[30, 20, 10])
    parser.add_argument("--json")
    args = parser.parse_args()
    source = sources.open_source(
        args.source, root=args.root, split=args.split, on_error="skip", cache=None
    )
    rows, texts = [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        reference = _join(source, args.minutes, folder)
        for chunk in args.chunks:
            line = [sys.executable, "-c", _ONE, args.model, str(chunk)]
            files = [str(folder / "long.flac"), str(folder / "short.flac")]
            done = subprocess.run([*line, *files], stdout=subprocess.PIPE, check=True, text=True)
            text, speed, peak, segments = json.loads(done.stdout)
            texts.append(text)
            rows.append(
                {
                    "chunk s": chunk,
                    "x real time": speed,
                    "peak MiB": peak,
                    "segments": segments,
                    "WER %": 100 * _distance(reference, text),
                    "differing words %": 100 * _distance(texts[0], text),
                }
            )
    report(rows, file=args.json)


if __name__ == "__main__":
    main()
