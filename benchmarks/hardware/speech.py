"""Decodes the speech to WAV in --work/speech, and measures the loader on both. Needs no device.

A hundred epochs of five hours would otherwise decode the same Opus a hundred times.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import time

import soundfile

from benchmarks.hardware import Table, run_part
from benchmarks.hardware.shapes import BATCH_SECONDS
from speech_jax.data import audio, pipeline, sources
from speech_jax.data.parts.audio import Audio
from speech_jax.data.plan import Plan

RATE = 16_000
SPLITS = ("train-clean-5", "dev-clean-5")


def run(table: Table, flags: argparse.Namespace) -> None:
    """Copies transcripts, decodes what is audio, and says `ready` by a file of that name."""
    start = time.perf_counter()
    target = flags.work / "speech"
    jobs = []
    for path in sorted((flags.data / "LibriSpeech").rglob("*")):
        if path.is_file() and path.relative_to(flags.data).parts[1] in SPLITS:
            there = target / path.relative_to(flags.data / "LibriSpeech")
            there.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".txt":
                shutil.copy(path, there)
            else:
                jobs.append((path, there.with_suffix(".wav")))
    if flags.tiny:
        keep = {job[1].parent for job in jobs if "dev" in str(job[1])}
        jobs = [job for job in jobs if job[1].parent not in keep or job[1].stem.endswith("0")]
        jobs = [job for job in jobs if "dev" in str(job[1]) or job[1].stem[-1] in "05"]
    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        seconds = sum(pool.map(_decode, jobs))
    (target / "ready").touch()
    took = time.perf_counter() - start
    table.add(
        "decode to WAV", hours=seconds / 3600, s=took, audio_s_per_s=seconds / took, threads=threads
    )
    if flags.only == "decode":
        return
    for name, root in (("as given", flags.data / "LibriSpeech"), ("WAV", target)):
        for speeds in ((1.0,), (0.9, 1.0, 1.1)):
            with table.attempt(f"loader, {name}, speeds {speeds}"):
                rate = loader_rate(root, flags, speeds, threads)
                table.add(f"loader, {name}, speeds {speeds}", audio_s_per_s=rate, threads=threads)


def _decode(job: tuple[pathlib.Path, pathlib.Path]) -> float:
    samples = audio.decode(str(job[0]), RATE)
    soundfile.write(job[1], samples, RATE, subtype="PCM_16")
    return len(samples) / RATE


def loader_rate(root: pathlib.Path, flags: argparse.Namespace, speeds, threads: int) -> float:
    """Audio seconds a second through the loader of training, for some seconds."""
    source = sources.open_source(
        "librispeech",
        root=str(root),
        split="train-clean-5",
        on_error="skip",
        cache=str(flags.work / "cache"),
    )
    corpus = pipeline.make_corpus(source, {"audio": Audio(sample_rate=RATE)}, on_error="skip")
    buckets = corpus.buckets(
        along="samples", count=3, budget=BATCH_SECONDS * RATE, round_to=RATE // 10, speeds=speeds
    )
    plan = Plan(corpus.lengths, "samples", buckets, speeds=speeds, stretched=corpus.stretched)
    batches = pipeline.batches(corpus, plan, threads=threads, on_error="skip")
    next(batches)
    start, end = time.perf_counter(), time.perf_counter() + (1 if flags.tiny else 4)
    samples = 0
    while time.perf_counter() < end:
        samples += int(next(batches)["audio_length"].sum())
    rate = samples / RATE / (time.perf_counter() - start)
    batches.close()
    return rate


if __name__ == "__main__":
    run_part("speech", run)
