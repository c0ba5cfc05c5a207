"""How much worse a recognizer or translator is with what is added to its input: attacks, noise.

    python -m speech_jax.main --mode=robustness --config=... --workdir=...

writes workdir/robustness.json and workdir/robustness.png: the word error rate, or BLEU, of the best
checkpoint against the bound of FGSM and PGD-10 perturbations (white box: they know the model and
what is to be written), and against the signal-to-noise ratio of additive noise.
"""

import collections
import contextlib
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from speech_jax import bundle, experiment, files
from speech_jax.config import split_names
from speech_jax.data import audio
from speech_jax.data.parts.audio import open_noise
from speech_jax.errors import UserError
from speech_jax.evaluators import Evaluator, figures
from speech_jax.evaluators.loop import alone, by_utterance
from speech_jax.tasks import Task
from speech_jax.training import sharding
from speech_jax.training.adversarial import Ball
from speech_jax.workdir import Workdir

# Ascents, their size as a fraction of epsilon, and whether they begin at a random point.
ATTACKS = {"fgsm": (1, 1.0, False), "pgd10": (10, 0.25, True)}
# An utterance is heard with so many of the noises, if there are as many.
_NOISES = 6
_UNTOUCHED = (0.0, 0, 0.0, False)
# What is shown, the first one that there is -> (how it is called, its unit, how many units 1 is).
_MEASURES = {"bleu": ("BLEU", "", 1.0), "wer": ("WER", "%", 100.0)}


def run(config: ConfigDict, workdir: Workdir, say: Callable[[str], None] = print) -> dict:
    """Measures the best checkpoint of a workdir on `config.data.eval_splits`.

    Returns what robustness.json holds: {split: {"clean": results, "fgsm": [{"epsilon", **results}],
    "pgd10": the same, "noise": [{"snr_db", **results}]}}, those of the task's evaluator and how
    many `utterances` they are of. Those that cannot be aligned with their transcript, or cannot be
    read, are `left_out` of all curves, which the clean ones say.

    Raises:
      UserError: the workdir holds no such model, or what is asked for cannot be done with it.
    """
    model = bundle.open(workdir.folder)
    config = bundle.for_use(model, config)
    task = model.task()
    if task.evaluator(model.parts).rates[0] not in _MEASURES:
        raise UserError(
            f"--mode=robustness measures word errors or BLEU, and {config.task.name} has no words"
        )
    with alone(workdir) as on_batch:
        return _run(config, workdir, model, task, say, on_batch)


def _run(
    config: ConfigDict,
    workdir: Workdir,
    model: bundle.Bundle,
    task: Task,
    say: Callable[[str], None],
    on_batch: Callable[[], None],
) -> dict:
    mesh = sharding.make_mesh(**config.mesh)
    params, state = bundle.on_mesh(model, mesh)
    settings = config.robustness
    recognize = make_recognizer(task, mesh, space=settings.space, norm=settings.norm)
    attacked = lambda *arguments: recognize(params, state, *arguments)

    curves = {}
    for split in split_names(config.data.eval_splits):
        corpus = experiment.evaluation_corpus(config, split, model.parts, task.unusable)
        curves[split] = _arrange(_measure(config, mesh, model, task, corpus, attacked, on_batch))
        if curves[split]["clean"][_measure_of(curves[split])] is None:
            raise UserError(f"{split}: there is no word in what could be read: no error to count")
        for line in _table(split, curves[split]):
            say(line)
    if jax.process_index() == 0:
        with files.writing(workdir.robustness):
            files.write_atomically(workdir.robustness, files.dump_json(curves))
            plot({workdir.folder.name: curves}, workdir.robustness.with_suffix(".png"))
    return curves


def make_recognizer(task: Task, mesh: Mesh, *, space: str, norm: str) -> Callable:
    """(params, state, batch, epsilon, steps, rate, random) -> task.predict's result.

    The batch is perturbed first, by `steps` ascents of the task's loss (no dropout) of `rate`
    epsilon each. All of the last four may change without another compilation. Results are whole
    on every device.
    """

    def recognize(params, state, batch, epsilon, steps, rate, random):
        ball = Ball(task, batch, space=space, norm=norm, epsilon=epsilon)
        start = ball.project(ball.random(jax.random.key(0)) * random)
        loss = lambda batch: task.loss(params, state, batch)[0]
        delta = ball.maximize(loss, start, steps, rate)
        return task.predict(params, state, ball.perturb(delta)), batch["index"]

    compiled = jax.jit(recognize, out_shardings=sharding.replicated(mesh))

    def placed(params, state, batch, epsilon, steps, rate, random):
        scalars = np.float32(epsilon), np.int32(steps), np.float32(rate), np.float32(random)
        with jax.set_mesh(mesh):  # for what ops/partition.py says
            return compiled(params, state, sharding.put_batch(batch, mesh), *scalars)

    return placed


def _measure(config, mesh, model, task, corpus, recognize, on_batch) -> dict[tuple, dict]:
    """Results of a corpus by (curve, level)."""
    settings = config.robustness
    noises = _open_noises(settings.noise_root, config.data.sample_rate, config.seed)
    total: dict[tuple, Evaluator] = {}
    heard: collections.Counter[tuple] = collections.Counter()

    def count(curve, level, batch, attack):
        found, index = jax.device_get(recognize(batch, *attack))
        measured = total.setdefault((curve, level), task.evaluator(model.parts))
        for utterance, example, row in by_utterance(corpus, {"index": index}, found):
            measured.add(utterance, example, row)
            heard[curve, level] += 1

    plan = experiment.evaluation_plan(config, corpus, task, mesh)
    with contextlib.closing(experiment.evaluation_batches(config, corpus, plan)) as batches:
        for batch in batches:
            count("clean", None, batch, _UNTOUCHED)
            for name, attack in ATTACKS.items():
                for epsilon in settings.epsilons:
                    count(name, epsilon, batch, (epsilon, *attack))
            for snr_db in settings.noise_snr_db:
                for turn in range(min(len(noises), _NOISES)):
                    count("noise", snr_db, _with_noise(batch, noises, snr_db, turn), _UNTOUCHED)
            on_batch()
    found = {key: {**one.results(), "utterances": heard[key]} for key, one in total.items()}
    source = corpus.source
    whole = len(source.utterances) + len(source.skipped)
    found["clean", None]["left_out"] = whole - heard["clean", None]
    return found


def _open_noises(root: str, rate: int, seed: int) -> list[np.ndarray]:
    """Recordings of noise, int16; ten seconds of white noise if there is no folder."""
    if not root:
        drawn = np.random.default_rng(seed).normal(0.0, 3000.0, 10 * rate)
        return [drawn.astype(np.int16)]
    found = open_noise(root, probability=1.0, snr_db=(0.0, 0.0)).files
    return [audio.decode(file, rate) for file in found]


def _with_noise(batch, noises, snr_db, turn):
    """Each utterance with a noise and an offset in it that follow from the utterance's index."""
    mixed = np.zeros_like(batch["audio"])
    for row, (index, length) in enumerate(zip(batch["index"], batch["audio_length"], strict=True)):
        if index >= 0:
            noise = noises[(index + turn) % len(noises)]
            offset = int(np.random.default_rng([index, turn]).integers(len(noise)))
            mixed[row, :length] = audio.add_noise(
                batch["audio"][row, :length], noise, snr_db, offset
            )
    return {**batch, "audio": mixed}


# ---- What is shown -----------------------------------------------------------------------------


def _arrange(found: Mapping[tuple, dict]) -> dict:
    curves = {
        "clean": found["clean", None],
        **{name: [] for name in ATTACKS},
        "noise": [],
    }
    for (curve, level), results in found.items():
        if curve != "clean":
            key = "snr_db" if curve == "noise" else "epsilon"
            curves[curve].append({key: level, **results})
    return curves


def _measure_of(curves):
    return next(name for name in _MEASURES if name in curves["clean"])


def _table(split, curves):
    measure = _measure_of(curves)
    called, sign, scale = _MEASURES[measure]
    yield f"{split}: clean {called} {scale * curves['clean'][measure]:.2f}{sign}"
    for name in (*ATTACKS, "noise"):
        key, unit = ("snr_db", " dB") if name == "noise" else ("epsilon", "")
        points = (f"{one[key]:g}{unit} {scale * one[measure]:.1f}{sign}" for one in curves[name])
        yield f"{split}: {name} {called}  " + "  ".join(points)


def plot(runs: Mapping[str, dict], path: pathlib.Path) -> None:
    """Draws the curves of runs (what `run` returned, by name), a row of plots for each split."""
    splits = list(dict.fromkeys(split for curves in runs.values() for split in curves))
    figure = Figure(figsize=(10, 4 * len(splits)), layout="constrained")
    axes = figure.subplots(len(splits), 2, squeeze=False)
    for split, (attacked, noisy) in zip(splits, axes, strict=True):
        for color, (name, curves) in enumerate(runs.items()):
            if split in curves:
                _draw(attacked, noisy, curves[split], name, f"C{color}")
        measure = _measure_of(next(of[split] for of in runs.values() if split in of))
        called = " ".join(_MEASURES[measure][:2]).rstrip()
        attacked.set(title=split, xlabel="epsilon", ylabel=called, ylim=(0, None), xscale="log")
        noisy.set(title=split, xlabel="signal-to-noise ratio (dB)", ylim=(0, None))
        noisy.invert_xaxis()
        attacked.legend()
        noisy.legend()
    figures.save(figure, path)


def _draw(attacked, noisy, curves, name, color):
    measure = _measure_of(curves)
    scale = _MEASURES[measure][2]
    for axis in (attacked, noisy):
        clean = scale * curves["clean"][measure]
        axis.axhline(clean, color=color, linestyle=":", linewidth=1, label=f"{name}, clean")
    lines = (("fgsm", attacked, "o--"), ("pgd10", attacked, "o-"), ("noise", noisy, "o-"))
    for curve, axis, style in lines:
        level = "snr_db" if curve == "noise" else "epsilon"
        points = ((point[level], scale * point[measure]) for point in curves[curve])
        levels, values = zip(*points, strict=True)
        axis.plot(levels, values, style, color=color, label=f"{name}, {curve}")
