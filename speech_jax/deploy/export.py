"""Writes a trained model as one file that others open without speech_jax.

  python -m speech_jax.deploy.export runs/mine mine.sjx

MODEL is a workdir, a saved model or a Hugging Face folder. The kind of file is by its name:

  .sjx   StableHLO for CPU, CUDA and TPU with parameters, tokenizer, decoder and card. It opens with
         jax and numpy alone: `python speech_jax/deploy/sjx.py mine.sjx recording.wav`, and that
         one file may be copied.
  .onnx  ONNX, which runs with onnxruntime (pip install 'speech_jax[onnx]'). It is compared with the
         model at several lengths and numbers of rows, and not written where it differs.

Both take int16 samples [B, S] and lengths [B], of any number of rows and samples, and give logits
[B, T, K] and frames [B]. `python -m speech_jax.transcribe --model=mine.sjx` and speech_jax.load
take either.

--weights chooses what an .sjx keeps of matrices (of all parameters of two dimensions and more that
multiply inputs; biases, norms and statistics stay float32):

  float32   as trained
  bfloat16  rounded, half the size
  int8      whole numbers from -127 to 127 with one float32 scale for each output: a quarter
"""

import argparse
import bisect
import contextlib
import hashlib
import os
import pathlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import speech_jax
from speech_jax import bundle, files, rules
from speech_jax.bundle.format import FILES, kept_name
from speech_jax.decoding.decoder import OF_TASKS
from speech_jax.deploy import acoustic, onnx, sjx
from speech_jax.deploy.classify import is_classifier
from speech_jax.errors import UserError
from speech_jax.ops import partition

FORMATS = ("sjx", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = ("float32", "bfloat16", "int8")

# Parameters that multiply inputs, and how many of their first dimensions are inputs; -1: all but
# the last one. Layers that are stacked for a scan have one dimension before these.
_MATRICES: rules.Rules = (
    (r"attention/(qkv?|value|position)/kernel|convolution/gate/kernel", 1),
    (r"kernel(_\d+)?|direction|recurrent|gate|input", -1),
)
# A scale must stand for so many numbers at least: the first convolution of wav2vec2 has 10.
_SHARED = 16


class ExportError(UserError):
    """A model that cannot be exported, or a file that cannot be written; the message says why."""


def write_sjx(
    heard: acoustic.BundleAcoustic,
    out: pathlib.Path,
    scores: Mapping[str, Any],
    weights: str = "float32",
) -> None:
    """Writes a model as an .sjx file.

    Args:
      scores: figures by split, as results.json has them; weights: one of WEIGHTS.

    Raises:
      OSError: the file cannot be written.
    """
    model = heard.bundle
    arrays, restore = stored(model.params, model.state, weights)
    exported = program(heard, restore, list(arrays.values()))
    card = make_card(heard, scores)
    members = {sjx.PROGRAM: exported.mlir_module_serialized, **kept_files(model.config)}
    members |= {name: _little_endian(array) for name, array in arrays.items()}
    card |= {
        "weights": weights,
        "program": sjx.describe(exported),
        "arguments": [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
            for name, array in arrays.items()
        ],
        "members": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    card["sha256"] = sjx.digest(card)
    _write(out, {sjx.CARD: files.dump_json(card).encode()} | members)


def check_place(out: pathlib.Path) -> None:
    """Raises ExportError where `out` is in a bucket, a folder, or a file that is not an export."""
    if files.is_remote(out):
        raise ExportError(f"{out} is in a bucket: name a file here, and copy it there")
    if out.is_dir():
        raise ExportError(f"{out} is a folder: name a file that ends in .sjx or .onnx")
    try:
        with out.open("rb") as file:
            start = file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ExportError(f"{out} cannot be read: {error.strerror or error}") from error
    if start and b"speech_jax" not in start:
        raise ExportError(f"{out} is there, and this program did not write it: name another file")


# ---- Parameters --------------------------------------------------------------------------------

Restore = Callable[[list[jax.Array]], tuple[Any, Any]]


def stored(params: Any, state: Any, weights: str) -> tuple[dict[str, np.ndarray], Restore]:
    """Parameters and state as they are kept, by name, and what makes them again of these arrays.

    Matrices (the module's first lines say which) become bfloat16, or int8 and a scale: x is
    rint(x / scale) * scale, with scale = max |x| / 127 over the inputs of an output.
    """
    flat = flax.traverse_util.flatten_dict({"params": params, "state": state}, sep="/")
    arrays: dict[str, np.ndarray] = {}
    scaled = {}
    for name, value in flat.items():
        value, inputs, key = np.asarray(value), _inputs(name, np.shape(value)), f"parameters/{name}"
        scaled[name] = inputs is not None and weights == "int8"
        if scaled[name]:
            scale = np.abs(value).max(inputs, keepdims=True).astype(np.float32) / 127
            scale = np.where(scale == 0, np.float32(1), scale)
            arrays[key], arrays[f"{key}.scale"] = np.rint(value / scale).astype(np.int8), scale
        elif inputs is not None and weights == "bfloat16":
            arrays[key] = value.astype(jnp.bfloat16)
        else:
            arrays[key] = value

    def restore(kept: list[jax.Array]) -> tuple[Any, Any]:
        left, found = iter(kept), {}
        for name, value in flat.items():
            found[name] = next(left).astype(value.dtype)
            if scaled[name]:
                found[name] = found[name] * next(left)
        tree = flax.traverse_util.unflatten_dict(found, sep="/")
        return tree.get("params", {}), tree.get("state", {})

    return arrays, restore


def _inputs(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions of a matrix that are its inputs; None for what is none, or too small."""
    count = rules.first(_MATRICES, name, 0)
    first = int("/layers/" in name)  # the dimension of stacked layers is before them
    axes = tuple(range(first, len(shape) - 1 if count < 0 else first + count))
    shared = int(np.prod([shape[axis] for axis in axes]))
    return axes if count and axes and shared >= _SHARED else None


def _little_endian(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


# ---- Program and card --------------------------------------------------------------------------


def program(
    heard: acoustic.BundleAcoustic, restore: Restore, arrays: list[np.ndarray]
) -> jax.export.Exported:
    """The program of (arrays, int16 [B, S], int32 [B]) for all PLATFORMS, B and S symbols."""
    compute = heard.function

    def logits(arrays, samples, lengths):
        return compute(*restore(arrays), samples, lengths)

    like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
    with partition.several_platforms(), _without_lines():
        return jax.export.export(jax.jit(logits), platforms=PLATFORMS)(
            [like(array) for array in arrays], *batch(heard)
        )


@contextlib.contextmanager
def _without_lines() -> Iterator[None]:
    """What is lowered within does not name the files and lines of this machine."""
    settings = {
        "jax_include_full_tracebacks_in_locations": True,
        "jax_traceback_in_locations_limit": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def batch(heard: acoustic.BundleAcoustic) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Samples int16 [B, S] and lengths int32 [B] of any B and any S that makes a frame."""
    rows, samples = jax.export.symbolic_shape("b, s", constraints=[f"s >= {shortest(heard)}"])
    return (
        jax.ShapeDtypeStruct((rows, samples), jnp.int16),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


def shortest(heard: acoustic.BundleAcoustic) -> int:
    """The least samples that make a frame."""
    return bisect.bisect_left(range(1 << 30), 1, key=heard.frames)


def kept_files(config: Any) -> dict[str, bytes]:
    """The files that settings of the decoder name (a language model), by their names in a card."""
    kept, decoder = {}, _decoder(config)
    for key in FILES:
        if decoder[key]:
            path = files.expand(decoder[key])
            try:
                kept[kept_name(path)] = path.read_bytes()
            except OSError as error:
                raise ExportError(
                    f"config.decoder.{key}={path} cannot be read: {error.strerror or error}"
                ) from error
    return kept


def _decoder(config: Any) -> dict[str, Any]:
    """The settings of what reads the logits; those of a search that stays behind do, too."""
    decoder = files.plain(config)["decoder"]
    if decoder["name"] in OF_TASKS:
        return dict.fromkeys(decoder) | {"name": "greedy"}
    return decoder


def make_card(heard: acoustic.BundleAcoustic, scores: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its model, but for its own kind.

    Args:
      scores: figures by split, as results.json has them.
    """
    model, config = heard.bundle, heard.bundle.config
    with tempfile.TemporaryDirectory() as folder:
        for part in model.parts.values():
            part.save(pathlib.Path(folder))
        parts = {path.name: path.read_text("utf-8") for path in pathlib.Path(folder).iterdir()}
    data = config.data
    decoder = _decoder(config)
    return {
        "format": "speech_jax",
        "version": sjx.VERSION,
        "sample_rate": heard.sample_rate,
        "frame_seconds": heard.frame_seconds,
        "longest_seconds": heard.longest_seconds,
        "shortest": shortest(heard),
        "outputs": "logits float32 [B, T, K] of labels (the blank is 0) and frames int32 [B]",
        "labels": list(heard.transcript.tokenizer.spellings),
        "decoder": decoder,
        "files": {key: kept_name(decoder[key]) for key in FILES if decoder[key]},
        "parts": parts,
        "model": {
            "task": config.task.name,
            "encoder": config.model.name,
            "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(model.params)),
            "data": config.source or f"{data.train_splits} of {data.source} {data.root}".rstrip(),
            "scores": dict(scores),
            "config": files.plain(config),
        },
        "made_with": {"speech_jax": speech_jax.__version__, "jax": jax.__version__},
    }


def _write(out: pathlib.Path, members: Mapping[str, bytes]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            # Without the time of day: the same model gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name), data)


# ---- Comparison --------------------------------------------------------------------------------

# Largest difference of logits, as a share of the largest logit: by what the file keeps of weights,
# or by what the model computes in.
_CLOSE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.5}
# Rows and seconds of what they are compared on.
_NOISE = {"sjx": ((2, 1.5),), "onnx": ((1, 0.6), (2, 1.5), (3, 2.6))}


class Runs(Protocol):
    """What gives logits: a model, or a file that was opened."""

    def logits(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def compare(
    heard: acoustic.BundleAcoustic, other: Runs, noise: Sequence[tuple[int, float]]
) -> float:
    """The largest difference of logits, as a share of the largest, on noise of (rows, seconds).

    Each row is of another length. Raises ExportError where the frames differ.
    """
    rng, worst = np.random.default_rng(0), [0.0]
    for rows, seconds in noise:
        size = round(seconds * heard.sample_rate)
        samples = rng.normal(0, 3000, (rows, size)).clip(-32768, 32767).astype(np.int16)
        lengths = np.linspace(size, shortest(heard), rows).astype(np.int32)
        wanted, frames = heard.logits(samples, lengths)
        found, found_frames = other.logits(samples, lengths)
        if found.shape != wanted.shape or not np.array_equal(found_frames, frames):
            raise ExportError(
                f"what was exported gives logits {list(found.shape)} where the model gives "
                f"{list(wanted.shape)} of {rows} rows of {size} samples: no file is written"
            )
        valid = np.arange(wanted.shape[1])[None, :, None] < frames[:, None, None]
        worst.append(np.abs(np.where(valid, found - wanted, 0)).max() / np.abs(wanted).max())
    return float(np.max(worst))  # NaN where one is


# ---- The command -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """What the module's first lines say; the exit code is 1 where there is no file in the end.

    It is 2 where the command line is wrong.
    """
    introduction, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m speech_jax.deploy.export",
        description=introduction,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a workdir, a saved model or a Hugging Face folder")
    parser.add_argument("out", help="the file to write: NAME.sjx or NAME.onnx")
    parser.add_argument(
        "--format", choices=FORMATS, help="the kind of a file whose NAME does not end in it"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="float32", help="of matrices, in an .sjx (float32)"
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.out, arguments.format = _named(arguments.out, arguments.format)
        if arguments.format == "onnx" and arguments.weights != "float32":
            raise ValueError("--weights is for .sjx files: an .onnx keeps float32")
    except ValueError as error:
        parser.error(str(error))
    try:
        _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _named(out: str, kind: str | None) -> tuple[str, str]:
    """(the file to write, its kind); ValueError where they are not said, or not the same."""
    ending = pathlib.PurePath(out).suffix.lower().lstrip(".")
    if ending not in FORMATS:
        if not kind:
            raise ValueError(f"{out} does not say what to write: end it in .sjx or .onnx")
        return f"{out}.{kind}", kind
    if kind and kind != ending:
        raise ValueError(f"{out} ends in .{ending} and --format={kind} is another: leave one out")
    return out, ending


def _run(arguments: argparse.Namespace) -> None:
    out, kind = files.expand(arguments.out), arguments.format
    check_place(out)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    say(f"opening {arguments.model}")
    model = bundle.open(arguments.model)
    if is_classifier(model):
        raise ExportError(
            f"{arguments.model} is a classifier, and recognizers alone are exported: hand on its "
            "folder, which python -m speech_jax.classify uses"
        )
    heard = acoustic.BundleAcoustic(model)
    if heard.target:
        say(
            "the translations stay behind: a file holds no decoder of text, and gives the logits "
            "of CTC alone"
        )
    elif (search := heard.decoder["name"]) in OF_TASKS:
        say(
            f"the search {search!r} stays behind: a file holds one program, which gives the logits "
            "of CTC, and a decoder of these reads them"
        )
    scores = _scores(files.expand(arguments.model))
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if kind == "onnx":
            say("writing the graph")
            heard = acoustic.BundleAcoustic(onnx.in_float32(heard.bundle))
            card, kept = make_card(heard, scores), kept_files(heard.bundle.config)
            graph = onnx.make(heard, card, *batch(heard), kept)
            with files.writing(out):  # the name that was given, not that of the scratch file
                out.parent.mkdir(parents=True, exist_ok=True)
                scratch.write_bytes(graph)
            opened = onnx.load(scratch)
        else:
            say(f"writing the program for {', '.join(PLATFORMS)}")
            with files.writing(out):
                write_sjx(heard, scratch, scores, arguments.weights)
            opened = sjx.load(scratch)
        say("comparing it with the model")
        difference = compare(heard, opened, _NOISE[kind])
        limit = max(_CLOSE[arguments.weights], _CLOSE[heard.bundle.config.model.dtype])
        if not difference <= limit:
            raise ExportError(
                f"what was exported gives other logits than the model (by {difference:.1e} of the "
                f"largest logit; {limit:g} is the limit): no file is written"
            )
        say(f"its logits differ from the model's by at most {difference:.1e} of the largest logit")
        with files.writing(out):
            scratch.replace(out)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    print(f"{out} ({out.stat().st_size / 1e6:.2f} MB)")


def _scores(folder: pathlib.Path) -> dict[str, Any]:
    """Figures by split of a workdir; nothing of other folders."""
    try:
        splits = files.read_json(folder / "results.json").get("splits", {})
    except (OSError, UserError):
        return {}
    return splits if isinstance(splits, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
