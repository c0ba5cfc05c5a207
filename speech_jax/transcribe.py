"""Writes down what is said in recordings, or its translation where the model translates.

  python -m speech_jax.transcribe talk.flac --model=runs/quickstart
  python -m speech_jax.transcribe calls/ 'more/*.m4a' --model=runs/quickstart --format=srt --out=subtitles
  ffmpeg ... -f wav - | python -m speech_jax.transcribe - --model=runs/quickstart --format=json --words

A PATH is an audio file of any container, rate, length and number of channels; a folder, which stands
for the audio files in it and in its folders; a pattern such as 'calls/*.wav'; or -, for the bytes of
a file on standard input. The text goes to standard output in the order of the recordings, each as
soon as it is ready; with --out, to a file for each recording.
"""  # noqa: E501

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from speech_jax import files, recordings
from speech_jax.errors import UserError

_STATUS = """exit status: 0, all is transcribed; 1, something failed: it is named on standard error,
with the reason, and the rest is done; 2, the command line is wrong."""
# What follows is known elsewhere too; --help and a wrong flag answer at once, without libraries.
_FORMATS = ("text", "json", "srt", "vtt", "ctm", "textgrid", "tsv")
_OF_LOGITS = (None, "greedy", "beam", "lexicon")  # None: a model that says nothing
_OF_TRANSDUCERS = ("transducer", "transducer_beam")
_DECODERS = (*_OF_LOGITS[1:], "attention", "joint", "rescore", *_OF_TRANSDUCERS)
_CHUNK_SECONDS, _WIDTHS, _DEFAULT_WIDTH, _DEFAULT_LM_WEIGHT = (5, 300), (1, 1024), 16, 0.5


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if wrong := _wrong(chosen):
        parser.error(wrong)
    # A user of flags knows no sections.
    flag = "--lm=" if chosen.lm is not None else "config.decoder.lm="
    return recordings.each(
        chosen.paths,
        lambda *given: _transcribe(chosen, *given, parser.error),
        lambda message: message.replace("config.decoder.lm=", flag),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.transcribe",
        description=__doc__,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a file, a folder, a pattern or -")
    add(
        "--model",
        required=True,
        help="a workdir, a saved model, a Hugging Face folder, or an exported file (.sjx, .onnx)",
    )
    add(
        "--format",
        default="text",
        metavar="FORMAT",
        help="text (a line a recording), json (an object a line), srt or vtt (subtitles), ctm (for "
        "sclite), textgrid (for Praat), tsv (a table); default: text. Several recordings as srt, "
        "vtt or textgrid need --out",
    )
    add(
        "--words",
        action="store_true",
        help="every word with its times; text, json and ctm have its confidence too (ctm always "
        "lists words). The times of a translation's words are spread evenly, and each has the "
        "confidence of the whole",
    )
    add("--out", metavar="FOLDER", help="write a file for each recording there")
    add(
        "--decoder",
        metavar="NAME",
        help="greedy, beam, or lexicon (the words of --lm alone); of a model with an attention "
        "decoder also attention, joint or rescore, of a transducer transducer or transducer_beam; "
        "default: that of the model; --beam, --nbest and --lm make greedy beam, and transducer "
        "transducer_beam",
    )
    low, high = _WIDTHS
    add(
        "--beam",
        type=int,
        metavar="WIDTH",
        help=f"hypotheses that beam search keeps, {low} to {high}; default: that of the model, or "
        f"{_DEFAULT_WIDTH}",
    )
    add(
        "--nbest",
        type=int,
        metavar="N",
        help="alternatives of each segment, for --format=json, at most WIDTH; default: that of "
        "the model, or 1",
    )
    add(
        "--lm",
        metavar="FILE",
        help="a language model, .arpa or .arpa.gz, of the model's labels, or of words (built with "
        "--unit words) for --decoder=lexicon; see python -m speech_jax.decoding.lm",
    )
    add(
        "--lm-weight",
        type=float,
        metavar="WEIGHT",
        help="of the language model's scores; default: that of the model, or "
        f"{_DEFAULT_LM_WEIGHT:g}",
    )
    low, high = _CHUNK_SECONDS
    add(
        "--chunk",
        type=float,
        metavar="SECONDS",
        help=f"the most audio that the model is given at once, {low} to {high}; less takes less "
        "memory; not for a search of whole pieces; default: the longest utterance of its training, "
        "within 10 and 30",
    )
    return parser  # fmt: skip


def _wrong(chosen: argparse.Namespace) -> str:
    """Why a command line is refused, whatever the model is; empty where it is not."""
    of_search = {"--lm": chosen.lm, "--lm-weight": chosen.lm_weight, "--beam": chosen.beam}
    for flag, value in (of_search | {"--nbest": chosen.nbest}).items():
        if chosen.decoder == "greedy" and value is not None:
            return f"{flag} does nothing with --decoder=greedy: leave one of them out"
    ranges = {
        "beam": (chosen.beam, _WIDTHS),
        "nbest": (chosen.nbest, _WIDTHS),
        "chunk": (chosen.chunk, _CHUNK_SECONDS),
        "lm-weight": (chosen.lm_weight, (-100, 100)),
    }
    for flag, (value, (low, high)) in ranges.items():
        if value is not None and not low <= value <= high:
            return f"--{flag}={value:g} must be {low} to {high}"
    for flag, value, known in (
        ("format", chosen.format, _FORMATS),
        ("decoder", chosen.decoder or "greedy", _DECODERS),
    ):
        if value not in known:
            return f"--{flag}={value} must be one of {', '.join(known)}"
    lm = chosen.lm
    if lm is not None and "://" not in lm and not os.path.isfile(os.path.expanduser(lm)):
        return f"--lm={lm}: there is no such file"
    if chosen.nbest is not None and chosen.format != "json":
        return f"--nbest does nothing with --format={chosen.format}: only json has alternatives"
    if chosen.out == "-":
        return "--out=- is not a folder: without --out, all goes to standard output"
    return ""


def _wrong_for(chosen: argparse.Namespace, own: Mapping[str, Any]) -> str:
    """Why a command line is refused for a model whose decoder has these settings, or empty."""
    by_model = f"the model's own search, {own.get('name')}"
    asked = f"--decoder={chosen.decoder}" if chosen.decoder else by_model
    if chosen.lm_weight is not None and not (chosen.lm or own.get("lm")):
        return "--lm-weight does nothing without a language model: name one with --lm"
    if chosen.decoder == "lexicon" and not (chosen.lm or own.get("lm") or own.get("lexicon")):
        return "--decoder=lexicon needs words: name an ARPA file of words with --lm"
    name = chosen.decoder or own.get("name")
    if chosen.lm and name not in (*_OF_LOGITS, *_OF_TRANSDUCERS):
        return f"--lm does nothing with {asked}: take --decoder=beam or lexicon with it"
    if chosen.chunk is not None and name not in _OF_LOGITS:
        return f"--chunk does nothing with {asked}, which hears whole pieces: leave it out"
    of_beam = (chosen.beam, chosen.nbest, chosen.lm, chosen.lm_weight)
    if chosen.decoder == "transducer" and any(value is not None for value in of_beam):
        return (
            "--beam, --nbest, --lm and --lm-weight do nothing with --decoder=transducer: take "
            "transducer_beam"
        )
    width = chosen.beam or own.get("width") or _DEFAULT_WIDTH
    if (chosen.nbest or 1) > width:
        return f"--nbest={chosen.nbest} is more than the {width} hypotheses of --beam: raise --beam"
    return ""


def _of_logits(chosen: argparse.Namespace) -> str:
    """The first flag that says something of logits and their decoder, or nothing."""
    names = ("decoder", "lm", "lm_weight", "chunk")
    given = [name for name in names if getattr(chosen, name) is not None]
    return given[0].replace("_", "-") if given else ""


def _decoder(chosen: argparse.Namespace, own: Mapping[str, Any]) -> dict[str, object]:
    """The settings of the decoder that flags ask for, of a model whose decoder has its own."""
    given = {
        "width": chosen.beam,
        "nbest": chosen.nbest,
        "lm": chosen.lm,
        "lm_weight": chosen.lm_weight,
    }
    given = {key: value for key, value in given.items() if value is not None}
    # Searches that keep one hypothesis, and those of the same kind that keep many.
    beams = {None: "beam", "greedy": "beam", "transducer": "transducer_beam"}
    usual = beams.get(own.get("name"), own.get("name"))
    name = chosen.decoder or (usual if given else None)
    return {"name": name, **given} if name else {}


# ---- The work ----------------------------------------------------------------------------------


def _transcribe(
    chosen: argparse.Namespace,
    inputs: list[recordings.Input],
    failures: list[str],
    refuse: Callable[[str], None],
) -> None:
    # Only now, so that --help and a wrong flag answer at once.
    from speech_jax import compiled
    from speech_jax.data import sources
    from speech_jax.deploy import formats
    from speech_jax.deploy.acoustic import open_acoustic
    from speech_jax.deploy.transcribe import Model

    compiled.keep(sources.default_cache())
    format = formats.FORMATS[chosen.format]
    if len(inputs) > 1 and not chosen.out and not format.joins:
        refuse(f"--format={chosen.format} of {len(inputs)} recordings needs --out=FOLDER")
    acoustic = open_acoustic(chosen.model)
    if getattr(acoustic, "target", None) and (given := _of_logits(chosen)):
        refuse(f"--{given} does nothing with a model that translates: leave it out")
    if wrong := _wrong_for(chosen, acoustic.decoder):
        refuse(wrong)
    model = Model(acoustic, chunk_seconds=chosen.chunk, decoder=_decoder(chosen, acoustic.decoder))
    folder = None
    if chosen.out:
        folder = files.expand(chosen.out)
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    if not folder:
        recordings.say(format.header)
    with recordings.progress(len(inputs), "Transcribing") as (progress, write):
        write_down = model.translate_all if model.translates else model.transcribe_all
        found = write_down((recordings.opened(one.file) for one in inputs), progress)
        for one, transcription in zip(inputs, found, strict=True):
            name = one.name
            if isinstance(transcription, UserError):
                recordings.fail(failures, str(transcription))
                continue
            if transcription.trouble:  # nothing was heard: an empty text would look like a result
                recordings.fail(failures, f"{name}: {transcription.trouble}")
                continue
            called = one.place.as_posix() if format.by_place else name
            rendered = format.render(called, transcription, chosen.words)
            if folder:
                path = folder / one.place.with_name(f"{one.place.name}.{format.suffix}")
                try:
                    with files.writing(path):
                        files.write_atomically(path, format.header + rendered)
                except UserError as error:
                    recordings.fail(failures, str(error))
            elif chosen.format == "text" and len(inputs) > 1:
                write("".join(f"{name}: {line}\n" for line in rendered.splitlines()))
            else:
                write(rendered)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, recordings.leave)
    sys.exit(main())
