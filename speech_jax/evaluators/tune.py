"""The weights of a decoder, found on half of a split and measured on the other half.

    python -m speech_jax.main --mode=tune --config=... --workdir=... \\
        --config.decoder.name=beam --config.decoder.lm=lm.arpa

tries weights of the language model and bonuses for the word errors of the first of
config.data.eval_splits, whatever the decoder fits the calibration of its confidences, and writes
workdir/decoder.json, with a copy of the language model beside it: from then on the workdir is
evaluated, transcribed with and saved so.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from speech_jax import bundle, experiment, files
from speech_jax.config import split_names
from speech_jax.decoding import confidence
from speech_jax.decoding.decoder import OF_CTC, Decoder
from speech_jax.decoding.words import Decoded
from speech_jax.errors import UserError
from speech_jax.evaluators.errors import ErrorCounts, Errors, count_errors
from speech_jax.tasks import Pytree, Task
from speech_jax.training import sharding
from speech_jax.workdir import Workdir

_FEWEST = 10  # right words, and wrong ones, that a calibration is fitted to
_ROWS = 16  # that are decoded together
# Where the search begins, and how far its steps go, of (weight, bonus).
_BEGIN, _STEPS = (0.5, 0.0), ((0.4, 0.8), (0.2, 0.4), (0.1, 0.2))


class _Heard(NamedTuple):
    # An utterance: what the search is given of it, [T, D], and what was said.
    frames: np.ndarray
    reference: str


class _Search(NamedTuple):
    # A decoder, and the half of a task's own search that is given frames; None: it is of logits.
    decoder: Decoder
    find: Callable[..., dict[str, jax.Array]] | None

    def __call__(self, frames: np.ndarray, lengths: Sequence[int]) -> list[Decoded]:
        if self.find is None:
            return self.decoder(frames, lengths)
        return self.decoder.read_all(self.find, frames, lengths)

    def weighed(self, weight: float, bonus: float) -> "_Search":
        return self._replace(decoder=self.decoder.weighed(weight, bonus))

    def calibrated_by(self, scale: float, offset: float) -> "_Search":
        return self._replace(decoder=self.decoder.calibrated_by(scale, offset))


def run(config: ConfigDict, workdir: Workdir, say: Callable[[str], None] = print) -> dict:
    """Tunes the decoder of a workdir, and returns the settings that decoder.json then holds.

    Raises:
      UserError: the workdir holds no recognizer, the split has less than two utterances, or the
        decoder's settings cannot work.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=tune runs in one process: start it without the others")
    model = bundle.open(workdir.folder)
    config = bundle.for_use(model, config)
    task = experiment.make_task(config, model.parts)
    decoder = getattr(task, "decoder", None)
    if not isinstance(decoder, Decoder) or not isinstance(task.evaluator(model.parts), Errors):
        raise UserError(f"--mode=tune is for recognizers, and {config.task.name} is none")
    own = experiment.decoder_settings(config.task, {}).get("name", "greedy")
    by_ctc = decoder.settings.name in OF_CTC
    if not by_ctc and not hasattr(task, "search"):
        raise UserError(
            "--mode=tune finds the weights of n-grams and the calibration of confidences for "
            "decoders of CTC and of transducers, and "
            f"config.decoder.name={decoder.settings.name!r} is neither: set it to one of "
            f"{', '.join(OF_CTC)}"
        )
    split = next(iter(split_names(config.data.eval_splits)), "")
    if not split:
        raise UserError("--mode=tune needs a split: name one in config.data.eval_splits")
    with workdir.locked():
        heard = _listen(config, model, task, split)
        if len(heard) < 2:
            raise UserError(f"{split} has {len(heard)} utterances, and half of it is tuned on")
        halves = heard[::2], heard[1::2]
        plain = Decoder(
            {"name": "greedy" if by_ctc else own}, model.parts["labels"], decoder.frame_seconds
        )
        plain, tuned = (_search_of(task, model.params, one) for one in (plain, decoder))
        if "lm" in decoder.settings.used():
            tuned = _weighed(tuned, halves[0], say)
        tuned = _calibrated(tuned, halves[0], say)
        say(f"{split}, the half that was not tuned on, {len(halves[1])} utterances:")
        for name, one in ((plain.decoder.settings.name, plain), ("tuned", tuned)):
            say(f"  {name}: {_figures(one, halves[1])}")
        if by_ctc and own != "greedy":
            say(f"  not compared: the model's own search (--config.decoder.name={own})")
        with files.writing(workdir.decoder):
            settings = tuned.decoder.settings.used()
            settings |= bundle.keep_files(settings, workdir.folder)
            files.write_atomically(workdir.decoder, files.dump_json(settings))
    say(f"{workdir.decoder}: " + "  ".join(f"{k}={v}" for k, v in settings.items()))
    return settings


def _listen(config: ConfigDict, model: bundle.Bundle, task: Task, split: str) -> list[_Heard]:
    """The utterances of a split, in its order."""
    mesh = sharding.make_mesh(**config.mesh)
    corpus = experiment.evaluation_corpus(config, split, model.parts)
    plan = experiment.evaluation_plan(config, corpus, task, mesh)
    params, state = bundle.on_mesh(model, mesh)
    own = task.decoder.settings.name not in OF_CTC
    hear = task.project if own else lambda *given: task.logits(*given)[:2]
    compute = jax.jit(hear, out_shardings=sharding.replicated(mesh))
    found = {}
    with contextlib.closing(experiment.evaluation_batches(config, corpus, plan)) as batches:
        for batch in batches:
            with jax.set_mesh(mesh):
                frames, lengths = compute(params, state, sharding.put_batch(batch, mesh))
            frames, lengths = jax.device_get((frames, lengths))
            for row, index in enumerate(batch["index"]):
                if index >= 0:
                    reference = model.parts["labels"].text(corpus.source.utterances[index])
                    found[int(index)] = _Heard(frames[row, : lengths[row]], reference)
    return [found[index] for index in sorted(found)]


def _search_of(task: Task, params: Pytree, decoder: Decoder) -> _Search:
    """The search that a task does with a decoder."""
    if decoder.settings.name in OF_CTC:
        return _Search(decoder, None)
    find = jax.jit(dataclasses.replace(task, decoder=decoder).search)
    return _Search(decoder, functools.partial(find, jax.device_put(params)))


def _decode(search: _Search, heard: Sequence[_Heard]) -> list[Decoded]:
    """What a search makes of utterances, by length in batches."""
    order = sorted(range(len(heard)), key=lambda i: len(heard[i].frames))
    found: dict[int, Decoded] = {}
    for start in range(0, len(order), _ROWS):
        some = order[start : start + _ROWS]
        lengths = [len(heard[i].frames) for i in some]
        frames = np.zeros((_ROWS, max(lengths), heard[0].frames.shape[1]), heard[0].frames.dtype)
        for row, i in enumerate(some):
            frames[row, : lengths[row]] = heard[i].frames
        padded = np.pad(lengths, (0, _ROWS - len(some)))
        found |= dict(zip(some, search(frames, padded), strict=False))
    return [found[i] for i in range(len(heard))]


def _count(search: _Search, heard: Sequence[_Heard]) -> ErrorCounts:
    decoded = _decode(search, heard)
    pairs = zip(heard, decoded, strict=True)
    return sum((count_errors(one.reference, two.text) for one, two in pairs), ErrorCounts())


def _weighed(search: _Search, heard: Sequence[_Heard], say: Callable[[str], None]) -> _Search:
    """The search with the weight and the bonus of the fewest word errors, then character errors.

    From where they are, they go where a step makes it better, until none does; then the steps
    are halved.
    """
    seen: dict[tuple[float, float], tuple] = {}

    def errors(at: tuple[float, float]) -> tuple:
        if at not in seen:
            counts = _count(search.weighed(*at), heard)
            words = counts.insertions + counts.deletions + counts.substitutions
            seen[at] = words, counts.character_errors
            say(
                f"weight {at[0]:.2f} bonus {at[1]:+.2f}: {words} errors in {counts.words} words, "
                f"{counts.character_errors} in characters"
            )
        return seen[at]

    best = _BEGIN
    for weight, bonus in _STEPS:
        while True:
            moves = ((weight, 0), (-weight, 0), (0, bonus), (0, -bonus))
            near = [(round(max(0, best[0] + w), 3), round(best[1] + b, 3)) for w, b in moves]
            found = min(near, key=errors)
            if errors(found) >= errors(best):
                break
            best = found
    return search.weighed(*best)


def _judged(search: _Search, heard: Sequence[_Heard]) -> tuple[list[float], list[bool]]:
    """The confidence of each word, and whether it is right."""
    sure, right = [], []
    for one, decoded in zip(heard, _decode(search, heard), strict=True):
        sure += [word.confidence for word in decoded.words]
        right += confidence.right_words(one.reference, [word.text for word in decoded.words])
    return sure, right


def _calibrated(search: _Search, heard: Sequence[_Heard], say: Callable[[str], None]) -> _Search:
    """The search with the calibration that fits, or as it is where too few words say which."""
    sure, right = _judged(search.calibrated_by(1.0, 0.0), heard)  # the evidence itself
    fewest = min(sum(right), len(right) - sum(right))
    if fewest < _FEWEST:
        scale, offset = search.decoder.settings.calibration
        say(
            f"{sum(right)} words are right and {len(right) - sum(right)} wrong; a calibration of "
            f"confidences needs {_FEWEST} of both, so it stays as it was, ({scale:g}, {offset:g})"
        )
        return search
    return search.calibrated_by(*(round(x, 4) for x in confidence.fit(sure, right)))


def _figures(search: _Search, heard: Sequence[_Heard]) -> str:
    counts = _count(search, heard)
    if counts.wer is None:
        return "no reference words, so no error rate"
    sure, right = _judged(search, heard)
    area, error = confidence.area_under_roc(sure, right), confidence.reliability(sure, right)[1]
    said = f"WER {100 * counts.wer:.2f}%  CER {100 * counts.cer:.2f}%"
    if area is not None:
        said += f"  confidence: area under ROC {area:.3f}"
    return said if error is None else f"{said}  calibration error {error:.3f}"
