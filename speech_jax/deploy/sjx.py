"""A trained model in one file (.sjx): opened and run with jax and numpy alone.

    python sjx.py model.sjx                    what the model is
    python sjx.py model.sjx a.wav b.wav        what is said in recordings

This file needs no other of speech_jax: copy it to where the model is used.

    import sjx
    model = sjx.load("model.sjx")
    logits, frames = model.logits(samples, lengths)  # int16 [B, S] at model.sample_rate, int32 [B]

A .sjx is a zip archive whose members are not compressed:

    model.json      the card: sample rate, tokenizer, decoder, configuration, scores, what follows
    program         StableHLO of front end, encoder and head for CPU, CUDA and TPU, of any number
                    of rows and samples (jax.export)
    parameters/...  each the bytes of one array, little-endian; its type and shape are in the card

The card holds the SHA-256 of every member and its own; nothing is used that differs. Weights may be
int8 with a float32 scale for each output, or bfloat16: the program makes float32 of them.
`python -m speech_jax.deploy.export` writes such files.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import wave
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.export
import numpy as np

try:
    from speech_jax.errors import UserError
except ImportError:  # this file alone
    UserError = ValueError

VERSION = 1
CARD, PROGRAM = "model.json", "program"
DTYPES = {
    name: np.dtype(getattr(np, name, None) or getattr(jax.numpy, name))
    for name in ("float32", "bfloat16", "int8", "int32")
}
_FIELDS = {
    **dict.fromkeys(("sample_rate", "shortest"), int),
    **dict.fromkeys(("frame_seconds", "longest_seconds"), (int, float)),
    **dict.fromkeys(("decoder", "parts", "files", "model", "made_with"), dict),
    "labels": list,
}
_MOST_CARD_BYTES = 64 << 20
_LONGEST_SECONDS = 120.0  # of a recording that is heard in one piece, here


class SjxError(UserError):
    """A file that is not a model, a damaged one, or audio that it cannot hear; the message says."""


def load(path: str | os.PathLike) -> "Model":
    """Opens a model; what it holds is compared with its checksums first.

    Raises:
      SjxError: it does not exist, or is damaged, or of a newer version.
    """
    path = os.fspath(path)
    with _archive(path) as archive:
        sizes = _sizes(path, archive)
        if sizes.get(CARD, 0) > _MOST_CARD_BYTES:
            raise SjxError(f"{path} has a card of {sizes[CARD]} bytes: it is not a model")
        card = read_card(_member(path, archive, CARD), path)
        try:
            program = _verified(path, archive, card, PROGRAM)
            arrays = [_array(path, archive, card, entry) for entry in card["arguments"]]
            exported = _exported(card, program)
            exported.mlir_module()  # raises where it is of another version of StableHLO
            names = card["files"].values()
            kept = {name: _verified(path, archive, card, name) for name in names}
            return Model(card, exported, arrays, kept)
        except SjxError:
            raise
        except Exception as error:  # whatever a card's values or StableHLO's bytes make them raise
            raise SjxError(
                f"{path} cannot be used with jax {jax.__version__} ({_short(error)}): it was made "
                f"with jax {card.get('made_with', {}).get('jax')}; install that version or a newer "
                "one, or export the model again"
            ) from error


class Model:
    """A model that was opened.

    Attributes:
      card: all that the file says of it.
      sample_rate: of the samples that it hears, in Hz.
      frame_seconds: from one frame of logits to the next.
      files: contents by name of what the decoder's settings name (card["files"]).
    """

    def __init__(
        self,
        card: dict[str, Any],
        exported: jax.export.Exported,
        arrays: list,
        files: dict[str, bytes],
    ):
        self.card = card
        self.files = files
        self.sample_rate = int(card["sample_rate"])
        self.frame_seconds = float(card["frame_seconds"])
        self._shortest = int(card["shortest"])
        self._platforms = exported.platforms
        self._arrays = jax.device_put(arrays)
        self._call = jax.jit(exported.call)

    def logits(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(logits float32 [B, T, K], the blank at 0; frames int32 [B]) of a batch of recordings.

        Each is heard as if it were alone and not padded. A program is compiled for each shape of
        samples: give few, padded to one of a few lengths.

        Args:
          samples: int16 [B, S], padded on the right; lengths: ints [B], samples of each row.

        Raises:
          SjxError: the arrays are of another type or shape, or the device is of another kind.
        """
        samples, lengths = np.asarray(samples), np.asarray(lengths)
        if samples.ndim != 2 or samples.dtype != np.int16 or not len(samples):
            raise SjxError(
                f"samples are {samples.dtype} {list(samples.shape)}: give int16 [rows, samples]"
            )
        if lengths.shape != samples.shape[:1] or lengths.dtype.kind not in "iu":
            raise SjxError(
                f"lengths are {lengths.dtype} {list(lengths.shape)} for samples "
                f"{list(samples.shape)}: give a whole number for each row"
            )
        if lengths.min() < 0 or lengths.max() > samples.shape[1]:
            raise SjxError(f"lengths must lie in [0, {samples.shape[1]}], the samples of a row")
        platform = jax.export.default_export_platform()
        if platform not in self._platforms:
            raise SjxError(f"the model runs on {', '.join(self._platforms)}, not on {platform}")
        missing = max(0, self._shortest - samples.shape[1])
        samples = np.pad(samples, ((0, 0), (0, missing)))
        return jax.device_get(self._call(self._arrays, samples, lengths.astype(np.int32)))

    def text(self, samples: np.ndarray) -> str:
        """What is said in int16 [S], by the likeliest label of each frame.

        Raises:
          SjxError: the model gives no text.
        """
        labels = self.card.get("labels")
        if not labels:
            raise SjxError(f"the model gives no text, but {self.card.get('outputs')}")
        logits, frames = self.logits(samples[None], np.asarray([len(samples)]))
        best = logits[0, : frames[0]].argmax(-1)
        previous = np.concatenate([[0], best[:-1]])
        said = "".join(labels[label] for label in best[(best != 0) & (best != previous)])
        return " ".join(said.split())


# ---- The file ----------------------------------------------------------------------------------


def digest(card: Mapping[str, Any]) -> str:
    """SHA-256 of a card without its own."""
    rest = {key: value for key, value in card.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_card(text: bytes | str, path: object, sealed: bool = True) -> dict[str, Any]:
    """A card of the file `path`.

    Raises SjxError where it is damaged, of a newer version, or differs from the SHA-256 that it
    has, if it is `sealed` by one of its own.
    """
    try:
        card = json.loads(text)
        version = card["version"]
        intact = not sealed or card["sha256"] == digest(card)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise SjxError(f"{path} has a damaged card ({_short(error)}): export it again") from error
    if type(version) is not int or not 1 <= version <= VERSION:
        raise SjxError(
            f"{path} is of version {_short(version)}, and this reader knows versions up to "
            f"{VERSION}: take a newer sjx.py"
        )
    if not intact:
        raise SjxError(f"{path} is damaged: its card has changed since it was written")
    for key, kinds in _FIELDS.items():
        if not isinstance(card.get(key), kinds):
            raise SjxError(f"{path} cannot be used: its card has no {key}")
    return card


def _archive(path: str) -> zipfile.ZipFile:
    if os.path.isdir(path):
        raise SjxError(f"{path} is a folder: name a file that ends in .sjx")
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise SjxError(f"there is no file {path}") from None
    except OSError as error:
        raise SjxError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of zipfile, whatever the bytes make it raise
        raise SjxError(
            f"{path} is not an .sjx file, or is cut short ({_short(error)}): copy or export it "
            "again"
        ) from error


def _sizes(path: str, archive: zipfile.ZipFile) -> dict[str, int]:
    """Bytes of each member: as stored, so that no member is larger than the file."""
    sizes = {}
    for info in archive.infolist():
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 1 or info.filename in sizes:
            raise SjxError(
                f"{path} is not an .sjx file: its member {_short(info.filename)} is packed"
            )
        sizes[info.filename] = info.file_size
    if sum(sizes.values()) > os.path.getsize(path):
        raise SjxError(f"{path} is not an .sjx file: its members overlap")
    return sizes


def _member(path: str, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise SjxError(
            f"{path} is not an .sjx file, or is damaged: it holds no {_short(name)}"
        ) from None
    except Exception as error:
        raise SjxError(f"{path} is damaged at {name} ({_short(error)}): copy it again") from error


def _verified(path: str, archive: zipfile.ZipFile, card: dict[str, Any], name: str) -> bytes:
    data = _member(path, archive, name)
    if hashlib.sha256(data).hexdigest() != card["members"][name]:
        raise SjxError(f"{path} is damaged: {name} has changed since it was written")
    return data


def _array(
    path: str, archive: zipfile.ZipFile, card: dict[str, Any], entry: Mapping[str, Any]
) -> np.ndarray:
    data = _verified(path, archive, card, entry["name"])
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise SjxError(f"{path} is damaged: {entry['name']} is not of the shape {shape}")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


# ---- The program -------------------------------------------------------------------------------


def describe(exported: jax.export.Exported) -> dict[str, Any]:
    """What `_exported` needs to make an Exported again, beside its StableHLO, as JSON values."""
    avals = lambda avals: [
        {"dtype": str(aval.dtype), "shape": ", ".join(map(str, aval.shape))} for aval in avals
    ]
    return {
        "platforms": list(exported.platforms),
        "inputs": avals(exported.in_avals),
        "outputs": avals(exported.out_avals),
        "calling_convention": exported.calling_convention_version,
        "kept": list(exported.module_kept_var_idx),
        "global_constants": exported.uses_global_constants,
    }


def _exported(card: dict[str, Any], module: bytes) -> jax.export.Exported:
    """The program as jax.export calls it: its own `deserialize` takes a package that jax lacks."""
    program = card["program"]
    scope = jax.export.SymbolicScope()

    def avals(entries):
        for entry in entries:
            shape = jax.export.symbolic_shape(entry["shape"], scope=scope)
            yield jax.core.ShapedArray(shape, np.dtype(DTYPES.get(entry["dtype"], entry["dtype"])))

    inputs, outputs = tuple(avals(program["inputs"])), tuple(avals(program["outputs"]))
    if len(inputs) != len(card["arguments"]) + 2:
        raise ValueError(f"{len(inputs)} inputs for {len(card['arguments'])} parameters")
    tree = jax.tree.structure((([0] * len(card["arguments"]), 0, 0), {}))
    known = {
        "fun_name": "speech_jax",
        "in_tree": tree,
        "in_avals": inputs,
        "out_tree": jax.tree.structure((0,) * len(outputs)),
        "out_avals": outputs,
        "_has_named_shardings": True,  # jax 0.10
        "_in_named_shardings": (None,) * len(inputs),
        "_out_named_shardings": (None,) * len(outputs),
        "in_shardings_hlo": (None,) * len(inputs),
        "out_shardings_hlo": (None,) * len(outputs),
        "nr_devices": 1,
        "platforms": tuple(program["platforms"]),
        "ordered_effects": (),
        "unordered_effects": (),
        "disabled_safety_checks": (),
        "mlir_module_serialized": module,
        "calling_convention_version": program["calling_convention"],
        "module_kept_var_idx": tuple(program["kept"]),
        "uses_global_constants": program["global_constants"],
        "_get_vjp": None,
    }
    fields = {field.name for field in dataclasses.fields(jax.export.Exported)}
    return jax.export.Exported(**{name: value for name, value in known.items() if name in fields})


# ---- The command -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """What the module's first lines say; the exit code is 1 where a file cannot be used."""
    parser = argparse.ArgumentParser(
        description="Opens a model in one file (.sjx) with jax and numpy alone: without recordings "
        "it prints what the model is, otherwise what is said in each.",
        epilog="Recordings are WAV files of 16-bit samples at the model's rate, of two minutes at "
        "most. `python -m speech_jax.transcribe` reads every format and hours of audio.",
    )
    parser.add_argument("model", help="a file that python -m speech_jax.deploy.export wrote")
    parser.add_argument("recording", nargs="*", help="a WAV file")
    arguments = parser.parse_args(argv)
    failed = False
    try:
        model = load(arguments.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.recording:
        print("\n".join(summary(model.card)))
    for path in arguments.recording:
        try:
            print(f"{path}: {model.text(read_wav(path, model.sample_rate))}", flush=True)
        except UserError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr, flush=True)
    return int(failed)


def summary(card: Mapping[str, Any]) -> Iterator[str]:
    """The card in a few lines."""
    about = card["model"]
    yield f"{about['task']}, {about['encoder']}, {about['parameters']:,} parameters"
    yield f"takes int16 samples at {card['sample_rate']} Hz, gives {card['outputs']}"
    yield f"weights: {card['weights']}; programs for {', '.join(card['program']['platforms'])}"
    yield f"trained on: {about['data'] or 'unknown'}"
    for split, scores in about["scores"].items():
        figures = (f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, int | float))
        yield f"{split}: {', '.join(figures)}"
    made = card["made_with"]
    yield f"made with speech_jax {made['speech_jax']}, jax {made['jax']}"


def read_wav(path: str, rate: int) -> np.ndarray:
    """int16 [S] of a WAV file of 16-bit samples at `rate` Hz; its channels are averaged.

    Raises:
      SjxError: it is none, or longer than two minutes.
    """
    try:
        with wave.open(path, "rb") as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            seconds = file.getnframes() / max(1, found)
            if width == 2 and found == rate and seconds <= _LONGEST_SECONDS:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                samples = samples[: len(samples) // channels * channels].reshape(-1, channels)
                return np.rint(samples.mean(axis=1, dtype=np.float32)).astype(np.int16)
    except (OSError, EOFError, wave.Error, ValueError) as error:
        raise SjxError(f"{path} is not a WAV file that can be read ({_short(error)})") from error
    raise SjxError(
        f"{path} has {8 * width} bits at {found} Hz and lasts {seconds:.1f} s: give 16-bit samples "
        f"at {rate} Hz, {_LONGEST_SECONDS:g} s at most, or use python -m speech_jax.transcribe"
    )


def _short(value: object) -> str:
    """A value or error on one line."""
    return re.sub(r"[^\x20-\x7e]+", " ", str(value)).strip()[:200] or type(value).__name__


if __name__ == "__main__":
    sys.exit(main())
