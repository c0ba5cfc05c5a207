"""Beam search on a model's own logits: ours against flashlight-text's lexicon-free decoder.

    python -m benchmarks.decode MODEL [--split S] [--root R] [--lm LM.arpa] [--utterances N]

takes the logits of a split, and says for every beam how many seconds an hour of audio takes (the
medians of interleaved runs, results on the host) and how much lower our best score is than
flashlight's in the utterance where it is lowest (in nats; negative: ours is higher everywhere).
Both see the same beam and all labels; with `skip`, ours passes over frames that are blank. The
language model, if there is one, is of the model's labels: python -m speech_jax.decoding.lm build.
"""

import argparse

import jax
import numpy as np

from benchmarks.table import interleaved_medians, report
from speech_jax import bundle, experiment
from speech_jax.decoding import ngram
from speech_jax.decoding.decoder import Decoder
from speech_jax.training import sharding

WIDTHS = (8, 32)
_LM_WEIGHT = 0.6
_ROWS = 16  # of a batch


def split_logits(folder, split, root, most):
    """(logits [T, K] of each utterance, sorted by length; seconds of audio; the bundle)."""
    model = bundle.open(folder)
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.root = root or config.data.root
        config.mesh.data = 1
    split = split or config.data.eval_splits.split(",")[0]
    task, mesh = model.task(), sharding.make_mesh(**config.mesh)
    corpus = experiment.evaluation_corpus(config, split, model.parts)
    plan = experiment.evaluation_plan(config, corpus, task, mesh)
    compute = jax.jit(lambda params, state, batch: task.logits(params, state, batch)[:2])
    found, seconds = [], 0.0
    for batch in experiment.evaluation_batches(config, corpus, plan):
        logits, lengths = jax.device_get(compute(model.params, model.state, batch))
        for row, index in enumerate(batch["index"]):
            if index >= 0 and len(found) < most:
                found.append(np.asarray(logits[row, : lengths[row]], np.float32))
                seconds += corpus.source.utterances[index].duration
    return sorted(found, key=len), seconds, model


def ours(logits, model, **settings):
    """A function that decodes everything and returns the score of each utterance."""
    decoder = Decoder(settings, model.parts["labels"], 0.04)
    batches = []
    for start in range(0, len(logits), _ROWS):
        rows = logits[start : start + _ROWS]
        padded = np.zeros((_ROWS, max(map(len, logits)), rows[0].shape[1]), np.float32)
        lengths = np.zeros(_ROWS, np.int32)
        for number, row in enumerate(rows):
            padded[number, : len(row)], lengths[number] = row, len(row)
        batches.append((padded[:, : -(-lengths.max() // 64) * 64], lengths))
    compiled = jax.jit(decoder.search)

    def call():
        found = [jax.device_get(compiled(*batch)) for batch in batches]
        return np.concatenate([one["score"] for one in found])[: len(logits)]

    return call


def flashlight(logits, model, width, lm):
    """The same by flashlight-text."""
    from flashlight.lib.text import decoder as peer
    from flashlight.lib.text.decoder import kenlm
    from flashlight.lib.text.dictionary import Dictionary

    spellings = model.parts["labels"].tokenizer.spellings
    known = Dictionary()
    for number, spelling in enumerate(spellings):
        known.add_entry(spelling.replace(" ", ngram.SPACE) if number else "<blank>")
    options = peer.LexiconFreeDecoderOptions(
        beam_size=width,
        beam_size_token=len(spellings),
        beam_threshold=1e9,
        lm_weight=_LM_WEIGHT * np.log(10) if lm else 0.0,
        sil_score=0.0,
        log_add=True,
        criterion_type=peer.CriterionType.CTC,
    )
    score = kenlm.KenLM(lm, known) if lm else peer.ZeroLM()
    search = peer.LexiconFreeDecoder(options, score, -1, 0, [])
    log_probs = [
        np.ascontiguousarray(x - np.logaddexp.reduce(x, axis=1, keepdims=True)) for x in logits
    ]

    def call():
        found = [search.decode(x.ctypes.data, *x.shape)[0] for x in log_probs]
        return np.asarray([one.score for one in found])

    return call


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--split", default="")
    parser.add_argument("--root", default="")
    parser.add_argument("--lm", default="")
    parser.add_argument("--utterances", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    logits, seconds, model = split_logits(args.model, args.split, args.root, args.utterances)
    calls, score = {("greedy", 1, "", "ours"): ours(logits, model)}, {}
    for lm in ("", args.lm) if args.lm else ("",):
        for width in WIDTHS:
            settings = {"name": "beam", "width": width, "lm": lm, "lm_weight": _LM_WEIGHT}
            settings["labels"] = logits[0].shape[1]
            key = "beam", width, lm and "n-grams"
            calls[*key, "ours"] = ours(logits, model, skip=1.0, **settings)
            calls[*key, "ours, skip"] = ours(logits, model, **settings)
            calls[*key, "flashlight"] = flashlight(logits, model, width, lm)
    score = {key: call() for key, call in calls.items()}
    took = interleaved_medians(calls, repeats=args.repeats, warmup=1)
    rows = []
    for (name, width, lm, who), time in took.items():
        peer = (name, width, lm, "flashlight")
        rows.append(
            {
                "decoder": name,
                "beam": width,
                "language model": lm,
                "implementation": who,
                "seconds an hour": 3600 * time / seconds,
                "ratio to flashlight": time / took[peer] if peer in took else None,
                "most nats below": float((score[peer] - score[name, width, lm, who]).max())
                if peer in took
                else None,
            }
        )
    print(f"{len(logits)} utterances, {seconds:.0f} s of audio, {logits[0].shape[1]} classes")
    report(rows, file=args.json)


if __name__ == "__main__":
    main()
