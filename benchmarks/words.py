"""Times and confidences of words on the synthetic corpus, from a workdir's predictions.

`python -m benchmarks.words WORKDIR [--split test] [--utterances 300] [--json FILE]` reads
WORKDIR/predictions/SPLIT.jsonl, which --mode=evaluate writes, has espeak-ng say the sentences again
and tell when each word begins, and prints how far our times are from that (words that are right; a
word ends where espeak begins the next one), and how well the confidence tells right from wrong.
"""

import argparse
import ctypes
import itertools
import json
import os
import pathlib
import sys

import numpy as np

from benchmarks.table import report
from speech_jax.data.sources import synthetic
from speech_jax.decoding import confidence

_WORD, _OVER = 1, 0  # types of espeak_EVENT


class _Event(ctypes.Structure):
    # The beginning of espeak_EVENT of espeak-ng/speak_lib.h.
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Listening:
    """espeak-ng, of which every word that begins is noted: (place in the text, milliseconds)."""

    def __init__(self, espeak):
        self._espeak, self.words = espeak, []

    def __getattr__(self, name):
        return getattr(self._espeak, name)

    def espeak_SetSynthCallback(self, keep):
        """Hears what the callback `keep` is told, too."""

        @_CALLBACK
        def hear(samples, count, events):
            for event in iter_events(events):
                if event.type == _WORD:
                    self.words.append((event.text_position - 1, event.audio_position))
            address = ctypes.cast(samples, ctypes.POINTER(ctypes.c_short))
            return keep(address, count, None)

        self._hear = hear  # kept, as C has it
        self._espeak.espeak_SetSynthCallback(hear)


def iter_events(events):
    """The events up to the one that ends the list."""
    place = 0
    while events and events[place].type != _OVER:
        yield events[place]
        place += 1


def say_all(split, count, seed):
    """Prints a line of JSON for each utterance: id, words as [place in the text, seconds], length.

    As the corpus was made: a fork of a process that has said nothing for every few utterances.
    """
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = espeak.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
    lines = list(synthetic.utterances(split, count, seed))
    chunk = synthetic._CHUNK
    for start in range(0, len(lines), chunk):
        child = os.fork()
        if not child:
            for line in lines[start : start + chunk]:
                listening = _Listening(espeak)
                samples = synthetic._say(listening, line)
                words = [[place, ms / 1000] for place, ms in listening.words]
                said = {"id": line["id"], "words": words, "seconds": len(samples) / rate}
                print(json.dumps(said), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit("espeak-ng failed")


def spoken_times(split, count, seed):
    """Utterance id -> [(start, end) or None of each word], in seconds."""
    import subprocess

    call = [sys.executable, "-m", "benchmarks.words", "--say", split, str(count), str(seed)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    texts = {one["id"]: one["text"] for one in synthetic.utterances(split, count, seed)}
    times = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        begins = dict(said["words"])
        places = np.cumsum([0, *(len(word) + 1 for word in texts[said["id"]].split())])
        starts = [begins.get(int(place)) for place in places[:-1]] + [said["seconds"]]
        pairs = itertools.pairwise(starts)
        times[said["id"]] = [None if None in pair else pair for pair in pairs]
    return times


def measure(lines, times):
    """The figures of predictions, as a row of the table."""
    starts, ends, sure, right = [], [], [], []
    for line in lines:
        words = [word for word, *_ in line["words"]]
        good = confidence.right_words(line["reference"], words)
        sure += [one[3] for one in line["words"]]
        right += good
        if words == line["reference"].split():
            spoken = zip(line["words"], times[line["id"]], strict=True)
            for place, ((_, start, end, _), espeak) in enumerate(spoken):
                if espeak:
                    starts.append(start - espeak[0])
                    if place + 1 < len(words):  # the last one ends in silence of espeak's
                        ends.append(end - espeak[1])
    curve, error = confidence.reliability(sure, right)
    for one in curve:
        print(f"confidence {one.confidence:.3f}: {one.right:.3f} of {one.words} words are right")
    return {
        "words": len(right),
        "wrong": len(right) - sum(right),
        "start, median error (ms)": 1e3 * float(np.median(np.abs(starts))),
        "start, median (ms)": 1e3 * float(np.median(starts)),
        "end, median error (ms)": 1e3 * float(np.median(np.abs(ends))),
        "end, median (ms)": 1e3 * float(np.median(ends)),
        "area under ROC": confidence.area_under_roc(sure, right),
        "calibration error": error,
    }


def main():
    """Print the table."""
    if sys.argv[1:2] == ["--say"]:
        say_all(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--utterances", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    path = args.workdir / "predictions" / f"{args.split}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = spoken_times(args.split, args.utterances, args.seed)
    report([measure(lines, times)], file=args.json)


if __name__ == "__main__":
    main()
