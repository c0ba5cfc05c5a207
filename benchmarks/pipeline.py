"""The loader against its peers: utterances and seconds of audio decoded and batched a second.

    python -m benchmarks.pipeline --source librispeech --root DIR --split train-clean-5

Ours plans, decodes, batches and prefetches with grain. The peers load the same batches (the plan
is given to them): a thread pool around soundfile, and torch's DataLoader in worker processes, where
torch is installed. All read the same files through the operating system's cache.
"""

import argparse
import concurrent.futures
import importlib.util
import os

import numpy as np
import soundfile

from benchmarks.table import interleaved_medians, report
from speech_jax.data import pipeline, sources
from speech_jax.data.parts.audio import Audio
from speech_jax.data.plan import Plan

_RATE = 16000


class _Planned:
    """The peers' data set: item i is batch i, loaded row by row."""

    def __init__(self, source, batches, read):
        self._source, self._batches, self._read = source, batches, read

    def __len__(self):
        return len(self._batches)

    def __getitem__(self, i):
        bucket, ids, _ = self._batches[i]
        samples = np.zeros((bucket.rows, bucket.size("samples")), np.int16)
        lengths = np.zeros(bucket.rows, np.int32)
        for row, place in enumerate(ids[ids >= 0]):
            decoded = self._read(self._source.open(int(place)))
            lengths[row] = len(decoded)
            samples[row, : len(decoded)] = decoded
        return samples, lengths


def _soundfile(file):
    return soundfile.read(file, dtype="int16")[0]


def _drain(batches):
    return sum(int(lengths.sum()) for _, lengths in batches)


def _ours(corpus, plan, threads):
    iterator = pipeline.batches(corpus, plan, repeat=False, threads=threads)
    total = sum(int(batch["audio_length"].sum()) for batch in iterator)
    iterator.close()
    return total


def _thread_pool(planned, workers):
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return _drain(pool.map(planned.__getitem__, range(len(planned))))


def _torch_loader(planned, workers):
    from torch.utils.data import DataLoader

    loader = DataLoader(
        planned,
        batch_size=None,
        num_workers=workers,
        persistent_workers=True,  # so that starting them is not what is measured
        multiprocessing_context="forkserver",
    )
    return lambda: _drain((samples, lengths.numpy()) for samples, lengths in loader)


def main():
    """Measures, prints the table and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--root", default="")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch_seconds", type=float, default=120)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()

    source = sources.open_source(arguments.source, root=arguments.root, split=arguments.split)
    corpus = pipeline.make_corpus(source, {"audio": Audio(sample_rate=_RATE)})
    budget = int(arguments.batch_seconds * _RATE)
    buckets = corpus.buckets(along="samples", count=8, budget=budget, round_to=_RATE // 10)
    plan = Plan(corpus.lengths, "samples", buckets, shuffle=False)
    batches = plan.epoch(0)
    workers = arguments.workers
    plain = _Planned(source, batches, _soundfile)
    calls = {
        "thread pool + soundfile (peer)": lambda: _thread_pool(plain, workers),
        "speech_jax, no threads": lambda: _ours(corpus, plan, 0),
        f"speech_jax, {workers} threads": lambda: _ours(corpus, plan, workers),
        "speech_jax, 16 threads": lambda: _ours(corpus, plan, 16),
    }
    if importlib.util.find_spec("torch"):
        calls[f"torch DataLoader, {workers} workers (peer)"] = _torch_loader(plain, workers)
    loaded = {name: call() for name, call in calls.items()}
    if len(set(loaded.values())) > 1:
        raise SystemExit(f"the loaders disagree on the samples they loaded: {loaded}")

    medians = interleaved_medians(calls, repeats=arguments.repeats, warmup=0)
    peer = medians["thread pool + soundfile (peer)"]
    report(
        [
            {
                "loader": name,
                "utterances/s": len(corpus) / seconds,
                "x real time": corpus.seconds / seconds,
                "times the thread pool": peer / seconds,
            }
            for name, seconds in medians.items()
        ],
        file=arguments.json,
    )


if __name__ == "__main__":
    main()
