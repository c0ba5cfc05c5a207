"""A corpus spoken by espeak-ng: numbers, dates, times and commands in many voices.

Made offline in seconds and kept on disk as 16 kHz FLAC with a manifest. It is a pure function of
(language, seed, split, number of utterances), and a longer corpus begins with the utterances of a
shorter one. No sentence and no voice is in two splits: a hash of the English sentence names its
split, whatever language it is said in, and each voice variant (espeak's imitation of a speaker)
belongs to one. All splits share the accents. Translations are said by the grammar of sentences.py.

espeak-ng (GPL-3.0) comes through the package espeakng-loader, which the extra `quickstart` names.
It is run in processes of its own: `python -m speech_jax.data.sources.synthetic` is what they run.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping

import numpy as np
import rich.console
import rich.progress
import soundfile

import speech_jax
from speech_jax.data import audio
from speech_jax.data.sources import base, manifest, sentences

SPLITS = ("train", "dev", "test")
SAMPLE_RATE = 16000
# Part of the folder's name: raise it when the same arguments give other audio or sentences.
VERSION = 1
# Utterances to a process of their own: it makes a difference to the audio, so it is a constant.
_CHUNK = 10
_MOST = 50_000  # there are about twice as many test sentences
_SIZES = {"train": 3000, "dev": 200, "test": 300}


def split_of(sentence: str) -> str:
    """Returns the split of an English sentence, by its hash: 8 in 10 are for training."""
    tenth = hashlib.sha256(sentence.encode()).digest()[0] % 10
    return "dev" if tenth == 8 else "test" if tenth == 9 else "train"


# ---- Voices ------------------------------------------------------------------------------------

# espeak's accents, by language and the family of languages that its folder is called by. (The
# Shavian one of English reads another alphabet.)
ACCENTS = {
    "en": (
        "gmw/en",
        "gmw/en-029",
        "gmw/en-GB-scotland",
        "gmw/en-GB-x-gbclan",
        "gmw/en-GB-x-gbcwmd",
        "gmw/en-GB-x-rp",
        "gmw/en-US",
        "gmw/en-US-nyc",
    ),
    "es": ("roa/es", "roa/es-419"),
    "fr": ("roa/fr", "roa/fr-BE", "roa/fr-CH"),
    "de": ("gmw/de",),
}
# Its variants, less robots, whispers and those that rush; what was made from one another is in
# the same split.
VARIANTS = {
    split: tuple(names.split())
    for split, names in {
        "train": "m1 m2 m3 m5 m6 m8 f1 f2 f5 Alex Alicia Andy Denis Diogo Gene Gene2 Henrique "
        "Jacky Lee Mario Michael Mike Nguyen RicishayMax adam announcer aunty belinda "
        "benjamin boris edward edward2 fast gustave ian iven2 iven3 iven4 john "
        "kaukovalta klatt klatt3 marcelo max mike2 miguel norbert pablo paul rob shelby "
        "steph steph2 travis",
        "dev": "m4 f4 Hugo Reed ed linda robert",
        "test": "m7 f3 Annie david grandma grandpa quincy sandro victor michel",
    }.items()
}


def utterances(split: str, count: int, seed: int, language: str = "en") -> Iterator[dict]:
    """Yields what is said, and how: its meaning (sentences.py), id, text, speaker, rate, and so on.

    The rate is in words a minute; a voice is a file of espeak's, and its speaker the name of that.
    Sentences are distinct in dev and test; in training one may come again in another voice.
    """
    rng = random.Random(f"speech_jax {VERSION} {seed} {split}")
    said: set[str] = set()
    number = 0
    while number < count:
        meaning = sentences.draw(rng)
        sentence = sentences.say(meaning, "en")
        if split_of(sentence) != split or (split != "train" and sentence in said):
            continue
        said.add(sentence)
        voice = f"{rng.choice(ACCENTS[language])}+{rng.choice(VARIANTS[split])}"
        yield {
            "meaning": meaning,
            "id": f"{split}-{number:06d}",
            "text": sentences.say(meaning, language),
            "speaker": voice.partition("/")[2],
            "voice": voice,
            "rate": rng.randint(110, 160),
            "pitch": rng.randint(30, 70),
            "range": rng.randint(30, 70),
            "peak": round(10 ** rng.uniform(-1, -0.05), 3),
        }
        number += 1


# ---- The corpus on disk ------------------------------------------------------------------------


def open_split(
    root: pathlib.Path,
    split: str,
    on_error: str,
    cache: pathlib.Path,
    *,
    utterances: int | Mapping[str, int] = _SIZES,
    seed: int = 0,
    language: str = "en",
    translation: str = "",
    processes: int | None = None,
) -> base.FileSource:
    """Opens a split, spoken first if it is not on disk.

    Args:
      root: the folder to keep it in.
      split: one of `SPLITS`.
      utterances: how many, as a number or as a number for each split; by default 3000 (2.4 hours)
        to train, 200 for dev, 300 for test.
      seed: other sentences and voices.
      language: what is spoken: en, es, fr or de.
      translation: one more of them, which the tag `translation` is in; empty for no such tag.
      processes: how many speak; by default one for each core.

    Raises:
      SourceError: an unknown split, size or language, a folder that cannot be written, or no
        espeak-ng.
    """
    if split not in SPLITS:
        raise base.SourceError(
            f"the synthetic corpus has no split {split!r}; it has {', '.join(SPLITS)}"
        )
    count = utterances if isinstance(utterances, int) else (_SIZES | dict(utterances))[split]
    if not 1 <= count <= _MOST:
        raise base.SourceError(f"utterances is {count}; it must be 1 to {_MOST}")
    for name, chosen in (("language", language), ("translation", translation or "en")):
        if chosen not in ACCENTS:
            raise base.SourceError(
                f"{name}={chosen!r}: the synthetic corpus knows {', '.join(ACCENTS)}"
            )
    if translation == language:
        raise base.SourceError(
            f"translation={translation!r} is what is spoken (language): choose another one"
        )
    said_in = "" if language == "en" else f"-{language}"
    folder = root / "synthetic" / f"v{VERSION}-seed{seed}-{split}-{count}{said_in}"
    said = (split, count, seed, language)
    if not folder.is_dir():
        _make(folder, said, processes or os.cpu_count() or 1)
    source = manifest.open_split(folder, split, on_error, cache, trust_durations=True)
    return _translated(source, said, translation) if translation else source


def _translated(source: base.FileSource, said: tuple, language: str) -> base.FileSource:
    """The source with the tag `translation`, which is not kept with the speech."""
    meanings = {line["id"]: line["meaning"] for line in utterances(*said)}
    translated = tuple(
        dataclasses.replace(
            one, tags={**one.tags, "translation": sentences.say(meanings[one.id], language)}
        )
        for one in source.utterances
    )
    return dataclasses.replace(source, utterances=translated)


def _make(folder: pathlib.Path, said: tuple, processes: int) -> None:
    """Speaks a split into a folder that appears whole or not at all.

    `said` are the arguments of `utterances`.
    """
    split = said[0]
    if importlib.util.find_spec("espeakng_loader") is None:
        raise base.SourceError(
            "the synthetic corpus is spoken by espeak-ng, which is not installed: "
            "pip install 'speech_jax[quickstart]'"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise base.SourceError(
            f"the synthetic corpus cannot be written to {folder.parent} ({error.strerror}); name "
            "another folder in SPEECH_JAX_CACHE"
        ) from error
    try:
        lines = list(utterances(*said))
        _speak_all(part, lines, min(processes, len(lines)), f"Speaking {split}")
        with open(part / f"{split}.jsonl", "w", encoding="utf-8") as manifest:
            for line in lines:
                file = f"{line['id']}.flac"
                row = {"audio_filepath": file, "duration": audio.duration(str(part / file))}
                row |= {key: line[key] for key in ("id", "text", "speaker")}
                manifest.write(json.dumps(row) + "\n")
        part.chmod(0o755)
        part.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process made the same meanwhile
            raise base.SourceError(
                f"the synthetic corpus cannot be written to {folder} ({error.strerror})"
            ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _speak_all(folder: pathlib.Path, lines: list[dict], processes: int, title: str) -> None:
    """Divides the lines among processes and waits for them."""
    package = pathlib.Path(speech_jax.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    chunks = [lines[start : start + _CHUNK] for start in range(0, len(lines), _CHUNK)]
    workers, logs = [], []
    with (
        contextlib.ExitStack() as stack,
        rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress,
    ):
        task = progress.add_task(title, total=len(lines))
        for i in range(processes):
            todo = stack.enter_context(tempfile.TemporaryFile("w+"))
            todo.writelines(json.dumps(chunk) + "\n" for chunk in chunks[i::processes])
            todo.seek(0)
            logs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", __spec__.name, str(folder)],
                    stdin=todo,
                    stdout=subprocess.PIPE,
                    stderr=logs[-1],
                    # The workers fork, which wants a process with a single thread.
                    env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
                )
            )
            stack.callback(workers[-1].stdout.close)
            stack.callback(workers[-1].wait)
            stack.callback(workers[-1].kill)
        for worker, log in zip(workers, logs, strict=True):
            for _ in worker.stdout:
                progress.advance(task, processes * _CHUNK)  # the others are about as far
            if worker.wait():
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise base.SourceError(f"espeak-ng failed: {last}")
        progress.update(task, completed=len(lines))


# ---- The speaking process ----------------------------------------------------------------------

# Constants of espeak-ng/speak_lib.h.
_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1
_PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}
_SAMPLES_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def _work(folder: str) -> None:
    """Speaks the lines of standard input into `folder`, printing a line for each line.

    What espeak-ng says depends on what it said before, so each line (a JSON list of utterances) is
    spoken by a fork of this process, in which it has said nothing yet.
    """
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    rate = espeak.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
    if rate <= 0:
        raise OSError(f"espeak-ng cannot start with its data in {data.decode()}")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                for utterance in json.loads(line):
                    samples = audio.resample(_say(espeak, utterance), rate, SAMPLE_RATE)
                    gain = utterance["peak"] * 32767 / np.abs(samples.astype(int)).max()
                    samples = np.rint(samples * gain).astype(np.int16)
                    file = os.path.join(folder, f"{utterance['id']}.flac")
                    soundfile.write(file, samples, SAMPLE_RATE)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
        print(flush=True)


def _say(espeak: ctypes.CDLL, utterance: dict) -> np.ndarray:
    """Returns int16 samples at espeak's own rate."""
    spoken: list[bytes] = []

    @_SAMPLES_CALLBACK
    def keep(samples, count, events):
        if samples and count > 0:
            spoken.append(ctypes.string_at(samples, 2 * count))
        return 0

    espeak.espeak_SetSynthCallback(keep)
    espeak.espeak_ng_SetRandSeed(1)  # the breath in some voices; seeded with the time otherwise
    if espeak.espeak_SetVoiceByName(utterance["voice"].encode()):
        raise OSError(f"espeak-ng has no voice {utterance['speaker']}")
    for name, number in _PARAMETERS.items():
        espeak.espeak_SetParameter(number, utterance[name], 0)
    text = utterance["text"].lower().encode()  # it would spell capitals
    espeak.espeak_Synth(text, len(text) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
    return np.frombuffer(b"".join(spoken), np.int16)


if __name__ == "__main__":
    _work(sys.argv[1])
