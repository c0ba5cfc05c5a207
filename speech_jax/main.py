"""Trains and evaluates speech recognizers.

  python -m speech_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m speech_jax.main --config=configs/librispeech.py:conformer_m --workdir=runs/m \\
      --config.data.root=/data/LibriSpeech --config.train.steps=200000
  python -m speech_jax.main --config=configs/librispeech.py:conformer_m --workdir=runs/m \\
      --mode=evaluate --config.data.eval_splits=test-other
  python -m speech_jax.main --config=configs/librispeech.py:conformer_m --workdir=runs/m \\
      --mode=tune --config.decoder.name=beam --config.decoder.lm=lm.arpa

Train and run the same command again after an interruption: it goes on where it was. A workdir
holds config.json, plan.json, what the vocabulary and features have learned, checkpoints/,
metrics.jsonl, tensorboard/, predictions/, results.json and, once it is evaluated, report.html;
speech_jax/workdir.py names them all.
What takes long to compile is kept in config.data.cache, for the next run on such a machine;
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing, JAX_COMPILATION_CACHE_DIR names another folder.
Every setting and its meaning: speech_jax/config.py; override any with --config.SECTION.KEY=VALUE.
"""

import contextlib
import ctypes
import difflib
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from speech_jax.errors import UserError

if TYPE_CHECKING:
    from speech_jax.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, such as configs/quickstart.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything it writes.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "tune", "robustness", "compile"],
    "train: train, or go on training. evaluate: measure the best checkpoint of the workdir on "
    "config.data.eval_splits. tune: find the weights of its decoder on half of the first of them, "
    "and keep them in the workdir. robustness: measure it there under attacks and noise. compile: "
    "say what a training step needs and how fast it can be, without data or a workdir.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "What --mode=compile compiles for, such as v5e:4x4, v4:2x2x2, h200:8, or a100:4x8 for 4 hosts "
    "of 8. None of it has to be here. Empty: the local devices.",
)


def main(argv: list[str]) -> None:
    """Checks the flags, joins the other processes, runs the mode."""
    if len(argv) > 1:
        raise app.UsageError(f"not a flag: {argv[1]} (did you mean --{argv[1].lstrip('-')}?)")
    # Only now, so that --help and a wrong flag answer at once.
    import jax

    from speech_jax import compiled, config, files, train
    from speech_jax.data import sources
    from speech_jax.workdir import Workdir

    logging.set_verbosity(logging.WARNING)  # the libraries' own progress is not the user's
    try:
        config.check(_CONFIG.value)
        if _MODE.value == "compile":
            if not _TOPOLOGY.value:
                _backend(jax)
            from speech_jax.preflight import compile

            compile.run(_CONFIG.value, _TOPOLOGY.value)
            return
        if not _WORKDIR.value:
            raise UserError(f"--mode={_MODE.value} needs a --workdir")
        _join_processes(jax)
        if _backend(jax) == "cpu":
            keep_memory()
        cache = _CONFIG.value.data.cache
        compiled.keep(files.expand(cache) if cache else sources.default_cache())
        workdir = Workdir(_WORKDIR.value)
        if _MODE.value != "train" and jax.process_index() == 0:
            for line in _unheeded(_CONFIG.value, workdir, sys.argv):
                print(f"warning: {line}", file=sys.stderr, flush=True)
        if _MODE.value == "evaluate":
            train.evaluate(_CONFIG.value, workdir)
        elif _MODE.value == "tune":
            from speech_jax.evaluators import tune

            tune.run(_CONFIG.value, workdir)
        elif _MODE.value == "robustness":
            from speech_jax.evaluators import robustness

            robustness.run(_CONFIG.value, workdir)
        else:
            train.run(_CONFIG.value, workdir)
    except Exception as error:
        expected, together = isinstance(error, UserError), jax.distributed.is_initialized()
        if expected:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif together:
            traceback.print_exc()
        else:
            raise
        if together:
            # A proper end waits for the other processes, which wait for this one in a collective.
            os._exit(1)
        sys.exit(1)


def _unheeded(config: ConfigDict, workdir: "Workdir", argv: list[str]) -> Iterator[str]:
    """A line for each flag that changes nothing, for a model is used as it was trained."""
    import flax.traverse_util

    from speech_jax import bundle, experiment, files
    from speech_jax.decoding.decoder import Settings

    try:
        whole = (workdir.recorded(), config)
    except UserError:  # the mode itself says it
        return
    recorded, asked = (flax.traverse_util.flatten_dict(files.plain(one), sep=".") for one in whole)
    task = recorded["task.name"]
    tuned = files.read_json(workdir.decoder) if workdir.decoder.exists() else {}
    decoders = (whole[0].decoder, tuned, config.decoder)
    given = {k: v for one in decoders for k, v in one.items() if v is not None}
    search = Settings.of(experiment.decoder_settings(whole[0].task, given))
    for flag in argv:
        key = flag.partition("=")[0].lstrip("-").removeprefix("config.")
        is_setting = flag.lstrip("-").startswith("config.")
        if is_setting and not bundle.of_use(key, task) and asked.get(key) != recorded.get(key):
            yield (
                f"{flag} is ignored: the model was trained with {recorded.get(key)!r}, and is used "
                "as it was trained"
            )
        name = key.removeprefix("decoder.")
        if is_setting and name != key and name not in search.heeded():
            yield f"{flag} is ignored: config.decoder.name={search.name!r} does not use it"


def _backend(jax) -> str:
    """The kind of the devices here; UserError where there are none of the kind asked for."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # an assertion is what JAX has for cuda
        why = " ".join(str(error).split())[:300] or "JAX finds none"
        raise UserError(
            f"there is no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} ({why}): "
            "install what JAX needs for it (speech_jax[gpu] or speech_jax[tpu]), or leave the "
            "variable empty, which takes what there is"
        ) from error


def keep_memory() -> None:
    """Has glibc keep what a step frees: a CPU step would spend a quarter of its time on that."""
    # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, and M_ARENA_MAX: only the first arena can hold
    # more than 64 MiB, and what a thread of XLA's frees in another one is gone.
    keep = {-1: 2**31 - 1, -2: 2**28, -3: 2**30, -8: 1}
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in keep.items():
            libc.mallopt(parameter, value)


def _join_processes(jax) -> None:
    """Connects the processes of a pod: told by launch/local.sh, or found by JAX."""
    coordinator = os.environ.get("SPEECH_JAX_COORDINATOR")
    if coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator,
            int(os.environ["SPEECH_JAX_NUM_PROCESSES"]),
            int(os.environ["SPEECH_JAX_PROCESS_ID"]),
        )
    elif os.environ.get("SPEECH_JAX_DISTRIBUTED"):
        jax.distributed.initialize()


# What ml_collections and a recipe raise for a value or a key that cannot be.
NOT_A_VALUE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError, SyntaxError)
# What a flag's value must be, by what its parser says of one that is not.
_MUST_BE = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean": "True or False",
}


def said(error: Exception, argv: list[str]) -> str:
    """An error of a flag on one line that names the flag."""
    if isinstance(error.__context__, UserError):  # of the recipe, which absl puts its own words to
        return str(error.__context__)
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    if text.startswith("flag --config=None:"):
        return "--config is required: see --help"
    settings = [one for one in argv if one.startswith("--config.")]
    if value := re.match(r"flag (--config\.[\w.]+=.*?): ", text):
        for reason, wanted in _MUST_BE.items():
            if reason in text:
                return f"{value[1][:200]} must be {wanted}"
    if key := re.match(r"['\"\\]+(\w+)", text):  # an unknown one, and nothing else is said
        near = re.search(r'Did you mean "(\w+)"', text)
        cure = f"did you mean {near[1]!r}?" if near else "a recipe can set new ones"
        given = next((one for one in settings if f".{key[1]}" in one.partition("=")[0]), "--config")
        return f"{given}: there is no key {key[1]!r} ({cure})"
    named = any(one.partition("=")[0].rpartition(".")[2] in text for one in settings)
    if named or not settings or text.startswith("flag --"):
        return text
    return f"{text} (in one of {' '.join(settings)[:300]})"


class Recipe(ConfigFileFlagParser):
    """Reads a recipe; keys that flags give to its open sections are there when they are set."""

    def parse(self, path: str):
        """The configuration; UserError, which names the file, where there is none."""
        file = pathlib.Path(path.partition(":")[0])
        if not file.is_file():
            beside = [str(other) for other in file.parent.glob("*.py")]
            near = difflib.get_close_matches(str(file), beside, n=1)
            hint = f"did you mean {near[0]}?" if near else "correct the path"
            raise UserError(f"--config={path}: there is no such recipe ({hint})")
        try:
            found = super().parse(path)
            if isinstance(delayed := getattr(found, "__dict__", {}).get("_error"), OSError):
                raise delayed  # ml_collections would, at the first use
        except Exception as error:
            raise UserError(f"--config={path}: {_why(file, error)}") from error
        if not isinstance(found, ConfigDict):
            raise UserError(f"--config={path}: its get_config must return a ConfigDict")
        from speech_jax import config  # which the recipe has imported

        config.make_room(found, sys.argv)
        return found


def _why(file: pathlib.Path, error: Exception) -> str:
    """What went wrong in a recipe, and in which of its lines."""
    if str(error).startswith("Error whilst parsing config file"):  # the words of ml_collections
        error = error.__context__ or error
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return said
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file]
    return f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {said}"


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but whatever is wrong is one line."""
    flags.FLAGS["config"].parser = Recipe("config")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, *NOT_A_VALUE) as error:
        sys.exit(f"error: {said(error, argv)}")


def _leave(*_: object) -> None:
    """Ends the process at once: an exception would go through libraries that are half imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    signal.signal(signal.SIGINT, _leave)  # until a run, which saves what it has, hears of it
    app.run(main, flags_parser=_parse_flags)
