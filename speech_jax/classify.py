"""Says which class recordings are of: who speaks, with which accent, how they feel.

  python -m speech_jax.classify call.wav --model=runs/speakers
  python -m speech_jax.classify calls/ 'more/*.m4a' --model=runs/accent --top=1
  ffmpeg ... -f wav - | python -m speech_jax.classify - --model=runs/emotion --format=json

A PATH is an audio file of any container, rate, length and number of channels; a folder, which stands
for the audio files in it and in its folders; a pattern such as 'calls/*.wav'; or -, for the bytes of
a file on standard input. The classes go to standard output in the order of the recordings, the most
probable first, each with its probability. They are those that the model was trained on: a recording
of none of them gets one of them all the same.
"""  # noqa: E501

import argparse
import json
import signal
import sys

from speech_jax import recordings
from speech_jax.errors import UserError

_STATUS = """exit status: 0, all is classified; 1, something failed: it is named on standard error,
with the reason, and the rest is done; 2, the command line is wrong."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.top < 1:
        parser.error(f"--top={chosen.top} must be 1 or more")
    return recordings.each(chosen.paths, lambda *given: _classify(chosen, *given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.classify",
        description=__doc__,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a file, a folder, a pattern or -")
    add(
        "--model",
        required=True,
        help="a workdir or a saved model, trained by a recipe such as configs/speaker_id.py",
    )
    add(
        "--top",
        type=int,
        default=5,
        metavar="N",
        help="how many classes are named for each recording; default: 5",
    )
    add(
        "--format",
        choices=("text", "json"),
        default="text",
        help="text (a line a class, behind the name of the recording where there are several), or "
        "json (an object a line); default: text",
    )
    return parser


def _classify(
    chosen: argparse.Namespace, inputs: list[recordings.Input], failures: list[str]
) -> None:
    # Only now, so that --help and a wrong flag answer at once.
    from speech_jax import compiled
    from speech_jax.data import sources
    from speech_jax.deploy.classify import open_classifier

    compiled.keep(sources.default_cache())
    model = open_classifier(chosen.model)
    with recordings.progress(len(inputs), "Classifying") as (progress, write):
        found = model.classify_all((recordings.opened(one.file) for one in inputs), progress)
        for one, classified in zip(inputs, found, strict=True):
            if isinstance(classified, UserError):
                recordings.fail(failures, str(classified))
                continue
            ranked = classified.classes[: chosen.top]
            if chosen.format == "json":
                classes = {name: round(share, 4) for name, share in ranked}
                seconds = round(classified.seconds, 3)
                described = {"file": one.name, "seconds": seconds, "class": classified.name}
                write(json.dumps(described | {"classes": classes}, ensure_ascii=False) + "\n")
            else:
                before = f"{one.name}: " if len(inputs) > 1 else ""
                write("".join(f"{before}{name}\t{share:.4f}\n" for name, share in ranked))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, recordings.leave)
    sys.exit(main())
