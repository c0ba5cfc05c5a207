"""How a recognizer's errors grow with what is added to its input: attacks, and noise.

    python -m speech_jax.main --mode=robustness --config=... --workdir=...

writes workdir/robustness.json and workdir/robustness.png: word and character error rates of the
best checkpoint against the bound of FGSM and PGD-10 perturbations (white box: they know the model
and the transcript), and against the signal-to-noise ratio of additive noise.
"""

import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from speech_jax import evaluate, experiment
from speech_jax.config import split_names
from speech_jax.data import audio, pipeline
from speech_jax.errors import UserError
from speech_jax.evaluators.errors import ErrorCounts
from speech_jax.training import sharding
from speech_jax.training.adversarial import Ball

# Ascents, their size as a fraction of epsilon, and whether they begin at a random point.
ATTACKS = {"fgsm": (1, 1.0, False), "pgd10": (10, 0.25, True)}
# An utterance is heard with so many of the noises, if there are as many.
_NOISES = 6
_UNTOUCHED = (0.0, 0, 0.0, False)


def run(config: ConfigDict, workdir: pathlib.Path, say: Callable[[str], None] = print) -> dict:
    """Measures the best checkpoint of a workdir on `config.data.eval_splits`.

    Returns what robustness.json holds: {split: {"clean": scores, "fgsm": [{"epsilon", **scores}],
    "pgd10": the same, "noise": [{"snr_db", **scores}]}}, scores being ErrorCounts.results.
    Utterances that cannot be aligned with their transcript are left out.

    Raises:
      UserError: the workdir holds no such model, or what is asked for cannot be done with it.
    """
    experiment.check_workdir(workdir, config, trained=True)
    mesh = sharding.make_mesh(**config.mesh)
    task, tokenizer, params, state = evaluate.open_model(config, workdir, mesh)
    if not task.labelled:
        raise UserError(
            f"--mode=robustness counts word errors, and {config.task.name} has no words"
        )
    recognize = make_recognizer(task, mesh, **_space(config))

    curves = {}
    for split in split_names(config.data.eval_splits):
        source = experiment.open_splits(config, split)
        corpus = pipeline.encode_corpus(
            source,
            tokenizer,
            sample_rate=config.data.sample_rate,
            output_lengths=lambda n: task.encoder.output_lengths(task.frontend.lengths(n)),
            on_error=config.data.on_error,
        )
        attacked = lambda *arguments: recognize(params, state, *arguments)
        counts = _measure(config, mesh, task, tokenizer, corpus, attacked)
        curves[split] = _arrange(counts)
        for line in _table(split, curves[split]):
            say(line)
    if jax.process_index() == 0:
        scratch = workdir / "robustness.json.partial"
        scratch.write_text(json.dumps(curves, indent=2) + "\n")
        scratch.replace(workdir / "robustness.json")
        plot({workdir.name: curves}, workdir / "robustness.png")
    return curves


def make_recognizer(task, mesh, *, space: str, norm: str):
    """(params, state, batch, epsilon, steps, rate, random) -> (task.predict's result, index).

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
        return compiled(params, state, sharding.put_batch(batch, mesh), *scalars)

    return placed


def _space(config):
    return {"space": config.robustness.space, "norm": config.robustness.norm}


def _measure(config, mesh, task, tokenizer, corpus, recognize) -> dict[tuple, ErrorCounts]:
    """Errors of a corpus by (curve, level)."""
    settings = config.robustness
    noises = _open_noises(settings.noise_root, corpus.sample_rate, config.seed)
    total = {}

    def count(curve, level, batch, attack):
        found, index = jax.device_get(recognize(batch, *attack))
        errors = ErrorCounts()
        for place, row in evaluate.by_utterance(index, found):
            errors += task.score(row, corpus.source.utterances[place], tokenizer)[0]
        total[curve, level] = total.get((curve, level), ErrorCounts()) + errors

    for batch in experiment.evaluation_batches(config, corpus, mesh):
        count("clean", None, batch, _UNTOUCHED)
        for name, attack in ATTACKS.items():
            for epsilon in settings.epsilons:
                count(name, epsilon, batch, (epsilon, *attack))
        for snr_db in settings.noise_snr_db:
            for turn in range(min(len(noises), _NOISES)):
                count("noise", snr_db, _with_noise(batch, noises, snr_db, turn), _UNTOUCHED)
    return total


def _open_noises(root, rate, seed) -> list[np.ndarray]:
    """Recordings of noise, int16; ten seconds of white noise if there is no folder."""
    if not root:
        drawn = np.random.default_rng(seed).normal(0.0, 3000.0, 10 * rate)
        return [drawn.astype(np.int16)]
    files = pipeline.open_noise(root, probability=1.0, snr_db=(0.0, 0.0)).files
    return [audio.decode(file, rate) for file in files]


def _with_noise(batch, noises, snr_db, turn):
    """Each utterance with a noise and a place in it that follow from the utterance's own place."""
    mixed = np.zeros_like(batch["audio"])
    for row, (place, length) in enumerate(zip(batch["index"], batch["audio_length"], strict=True)):
        if place >= 0:
            noise = noises[(place + turn) % len(noises)]
            offset = int(np.random.default_rng([place, turn]).integers(len(noise)))
            mixed[row, :length] = audio.add_noise(
                batch["audio"][row, :length], noise, snr_db, offset
            )
    return {**batch, "audio": mixed}


# ---- What is shown -----------------------------------------------------------------------------


def _arrange(counts):
    curves = {
        "clean": counts["clean", None].results(),
        **{name: [] for name in ATTACKS},
        "noise": [],
    }
    for (curve, level), errors in counts.items():
        if curve != "clean":
            key = "snr_db" if curve == "noise" else "epsilon"
            curves[curve].append({key: level, **errors.results()})
    return curves


def _table(split, curves):
    yield f"{split}: clean WER {100 * curves['clean']['wer']:.2f}%"
    for name in (*ATTACKS, "noise"):
        key, unit = ("snr_db", " dB") if name == "noise" else ("epsilon", "")
        points = (f"{point[key]:g}{unit} {100 * point['wer']:.1f}%" for point in curves[name])
        yield f"{split}: {name} WER  " + "  ".join(points)


def plot(runs: Mapping[str, dict], path: pathlib.Path) -> None:
    """Draws the curves of runs (what `run` returned, by name), a row of plots for each split.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plotting the curves needs matplotlib: pip install 'speech_jax[plots]'"
        ) from None
    splits = list(dict.fromkeys(split for curves in runs.values() for split in curves))
    figure = Figure(figsize=(10, 4 * len(splits)), layout="constrained")
    axes = figure.subplots(len(splits), 2, squeeze=False)
    for split, (attacked, noisy) in zip(splits, axes, strict=True):
        for color, (name, curves) in enumerate(runs.items()):
            if split in curves:
                _draw(attacked, noisy, curves[split], name, f"C{color}")
        attacked.set(title=split, xlabel="epsilon", ylabel="WER (%)", ylim=(0, None), xscale="log")
        noisy.set(title=split, xlabel="signal-to-noise ratio (dB)", ylim=(0, None))
        noisy.invert_xaxis()
        attacked.legend()
        noisy.legend()
    figure.savefig(path, dpi=120)


def _draw(attacked, noisy, curves, name, color):
    for axis in (attacked, noisy):
        clean = 100 * curves["clean"]["wer"]
        axis.axhline(clean, color=color, linestyle=":", linewidth=1, label=f"{name}, clean")
    lines = (("fgsm", attacked, "o--"), ("pgd10", attacked, "o-"), ("noise", noisy, "o-"))
    for curve, axis, style in lines:
        level = "snr_db" if curve == "noise" else "epsilon"
        levels, rates = zip(*((p[level], 100 * p["wer"]) for p in curves[curve]), strict=True)
        axis.plot(levels, rates, style, color=color, label=f"{name}, {curve}")
