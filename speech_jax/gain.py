"""Before and after: what a training has gained on its test, over the start that it had.

The start is measured as it is. Where a run trains an encoder and its head, so is the head alone,
which is fitted in a run of its own, on the hidden states of the encoder as it was (hidden.py). Both
are in the workdir's folder `before`.
"""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from speech_jax import experiment, files, tasks
from speech_jax.bundle import start
from speech_jax.config import split_names
from speech_jax.evaluators import compare
from speech_jax.evaluators.loop import Evaluation, measure
from speech_jax.ops.augment import CHANGES
from speech_jax.training import groups, peft, sharding
from speech_jax.workdir import Workdir

_ENCODER = ("encoder/.*", groups.FOREVER)


def run(
    config: ConfigDict, workdir: Workdir, train: Callable[..., dict | None]
) -> dict[str, Any] | None:
    """Trains as `config` says, and writes what has been gained into results.json.

    Args:
      train: (config, workdir, at_start) -> results, or None where it was told to leave (train.py).

    Returns:
      What results.json then holds; None where one of the runs was told to leave.

    Raises:
      UserError: as `train` does; the head was fitted with other settings.
    """
    workdir.check(config)  # first of all: fitting the head may take long
    before = {"untouched": workdir.before("untouched")}
    alone = head_alone(config)
    if alone is not None:
        before["head"] = workdir.before("head")
        if not _fit_head(alone, before["head"], train):
            return None
        _say("all that learns:")

    def at_start(evaluation: Evaluation, state: Any, say: Callable[[str], None]) -> None:
        params, statistics, folder = state.params, state.model_state, before["untouched"]
        told = lambda line: say(f"before, {line}")
        scores = measure(evaluation, params, statistics, _compared(config), folder, told)
        folder.write_results(scores)

    if train(config, workdir, at_start) is None:
        return None
    found = sharding.from_first(lambda: _measured(config, workdir, before))
    for split, gained in found["gain"].items():
        _say(_line(split, gained))
    return workdir.write_results({}, **found)


def _fit_head(alone: ConfigDict, folder: Workdir, train: Callable[..., dict | None]) -> bool:
    """Fits the head alone, unless that is done; returns whether it is."""
    folder.check(alone)
    if sharding.from_first(lambda: set(_compared(alone)) <= _scores(folder).keys()):
        return True
    _say("the head alone:")
    with folder.locked():
        return train(alone, folder) is not None


def _measured(config: ConfigDict, workdir: Workdir, before: dict[str, Workdir]) -> dict[str, Any]:
    """{"before": scores by what and split, "gain": that of each split}."""
    parts = experiment.restore_parts(config, workdir.folder)
    task = experiment.make_task(config, parts)
    evaluator = task.evaluator(parts)
    first = before.get("head", before["untouched"])
    gains = {}
    for split in _compared(config):
        if not (hasattr(evaluator, "tallies") or hasattr(evaluator, "statistics")):
            one, other = (_scores(folder).get(split, {}) for folder in (first, workdir))
            gains[split] = compare.difference(*task.best, one, other)
        elif first.predictions(split).exists():
            utterances = experiment.open_splits(config, split).utterances
            paths = first.predictions(split), workdir.predictions(split)
            gains[split] = compare.gain(evaluator, *paths, utterances)
    scores = {name: found for name, one in before.items() if (found := _scores(one))}
    return {"before": scores, "gain": gains}


def _scores(folder: Workdir) -> dict[str, Any]:
    return files.read_json(folder.results)["splits"] if folder.results.exists() else {}


def _line(split: str, found: dict[str, Any]) -> str:
    if found["gain"] is None:
        return ""
    if not found["interval"]:
        before, after, gain = (f"{found[key]:z.4f}" for key in ("before", "after", "gain"))
        return f"{split}: {found['metric']} {before} before, {after} after, gain {gain}"
    values = (found["before"], found["after"], found["gain"], *found["interval"])
    before, after, gain, low, high = (100 / found["of"] * value for value in values)
    unit = "%" if found["of"] == 1 else ""
    return (
        f"{split}: {found['metric']} {before:.2f}{unit} before, {after:.2f}{unit} after, "
        f"gain {gain:z.2f} points (95% over {found['over']}: {low:z.2f} to {high:z.2f})"
    )


def _say(line: str) -> None:
    if line and not jax.process_index():
        print(line, flush=True)


def _compared(config: ConfigDict) -> list[str]:
    """The splits on which the start is measured: those of the test, or else of the evaluations."""
    return split_names(config.data.test_splits) or split_names(config.data.eval_splits)


def head_alone(config: ConfigDict) -> ConfigDict | None:
    """The run that fits the head alone on what this one starts from; None where this one does."""
    held = [tuple(rule) for rule in config.optimizer.get("frozen", ())]
    task = tasks.constructor(config.task.name)
    if not hasattr(task, "encode") or not config.init.folder or _ENCODER in held:
        return None
    adapter = start.settings_of(config.init.folder).model.get("adapter", 0)
    alone = config.copy_and_resolve_references()
    with alone.unlocked():
        alone.optimizer.frozen = (_ENCODER,)
        if "adapter" in alone.model:  # that of the base stands still with its encoder
            alone.model.adapter = adapter
            alone.optimizer.frozen = ((peft.ADDED, groups.FOREVER),) * bool(adapter) + (_ENCODER,)
        alone.data.update({"cache_hidden": True, "speeds": (1.0,), "noise_root": ""})
        for name in CHANGES:
            alone.spec_augment[name] *= 0
        alone.adversarial.method = "none"
        alone.lora.rank = 0
        alone.task.mixup = 0.0
        alone.train.compare = False
    return alone.lock()
