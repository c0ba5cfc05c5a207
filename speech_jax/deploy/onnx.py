"""Models as ONNX: written, compared number by number, and run with onnxruntime."""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from speech_jax import bundle
from speech_jax.deploy import acoustic, sjx
from speech_jax.errors import UserError
from speech_jax.ops import partition

KEY = "speech_jax"  # of the card in the file's metadata
_MOST_BYTES = 2_000_000_000  # of a protocol buffer
_BLANK_DIGEST, _SEAL = "0" * 64, rb'"sha256": "([0-9a-f]{64})"'


class OnnxError(UserError):
    """A model that cannot be written as ONNX or a file that cannot be run; the message says why."""


def make(
    heard: acoustic.BundleAcoustic,
    card: Mapping[str, Any],
    samples: jax.ShapeDtypeStruct,
    lengths: jax.ShapeDtypeStruct,
    kept: Mapping[str, bytes],
) -> bytes:
    """The bytes of an ONNX file of (samples int16 [B, S], lengths int32 [B]).

    Args:
      card: what the file says of the model; samples, lengths: their shapes, B and S symbols.
      kept: contents by name of what the decoder's settings name.

    Raises:
      UserError: onnx is not installed, the model is too large, or holds what ONNX has not.
    """
    try:
        import onnx  # an extra
    except ImportError as error:
        raise OnnxError(f"ONNX needs onnx ({error}): pip install 'speech_jax[onnx]'") from error
    from onnx import helper

    from speech_jax.deploy import onnx_graph, onnx_primitives

    model = heard.bundle
    leaves, tree = jax.tree.flatten((model.params, model.state))
    if 4 * sum(np.size(leaf) for leaf in leaves) > _MOST_BYTES:
        raise OnnxError("the model is larger than the 2 GB of an ONNX file: use .sjx")

    def logits(leaves, samples, lengths):
        return heard.function(*jax.tree.unflatten(tree, leaves), samples, lengths)

    like = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves]
    with partition.several_platforms():
        traced = jax.jit(logits).trace(like, samples, lengths)
    graph = onnx_graph.Graph({"samples": samples, "lengths": lengths})
    given = [onnx_primitives.Tensor(name) for name in ("samples", "lengths")]
    outputs = graph.trace(traced.jaxpr, [*map(np.asarray, leaves), *given])
    names = {"logits": onnx.TensorProto.FLOAT, "frames": onnx.TensorProto.INT32}
    for value, name in zip(outputs, names, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name(value)], [name]))
    shapes = {"logits": ["b", "t", len(card["labels"])], "frames": ["b"]}
    made = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "speech_jax",
            graph.inputs,
            [helper.make_tensor_value_info(n, kind, shapes[n]) for n, kind in names.items()],
            list(graph.initializers.values()),
        ),
        producer_name="speech_jax",
        opset_imports=[helper.make_opsetid("", onnx_graph.OPSET)],
        ir_version=8,
    )
    texts = {name: base64.b64encode(data).decode() for name, data in kept.items()}
    helper.set_model_props(made, {KEY: json.dumps({**card, "sha256": _BLANK_DIGEST})} | texts)
    onnx.checker.check_model(made)
    data = made.SerializeToString()
    return data.replace(_BLANK_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


class Session:
    """An ONNX file that runs; its members are as of sjx.Model."""

    def __init__(self, data: bytes, path: object):
        """Raises OnnxError for what is none of our files, or is damaged."""
        try:
            import onnxruntime
        except ImportError as error:
            raise OnnxError(
                f"{path} needs onnxruntime ({error}): pip install 'speech_jax[onnx]'"
            ) from error
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(data, providers=providers)
            texts = self._session.get_modelmeta().custom_metadata_map
            card = texts[KEY]
        except KeyError:
            raise OnnxError(f"{path} is not an ONNX file that speech_jax wrote") from None
        except Exception as error:  # of onnxruntime, which has a tree of its own
            why = " ".join(str(error).split())[:200]
            raise OnnxError(f"{path} is damaged or not an ONNX file ({why})") from error
        found = re.search(_SEAL, card.encode())
        blank = data.replace(found[1], _BLANK_DIGEST.encode(), 1) if found else b""
        if not found or hashlib.sha256(blank).hexdigest().encode() != found[1]:
            raise OnnxError(f"{path} is damaged: it has changed since it was written")
        self.card = sjx.read_card(card, path, sealed=False)
        self.files = {
            name: base64.b64decode(texts.get(name, "")) for name in self.card["files"].values()
        }

    def logits(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Acoustic (deploy/acoustic.py) says."""
        missing = max(0, self.card["shortest"] - samples.shape[1])
        samples = np.pad(samples, ((0, 0), (0, missing)))
        feed = {"samples": samples, "lengths": np.asarray(lengths, np.int32)}
        logits, frames = self._session.run(["logits", "frames"], feed)
        return logits, frames


def load(path: pathlib.Path) -> Session:
    """Opens an ONNX file that speech_jax wrote; OnnxError where it cannot be used."""
    if path.is_dir():
        raise OnnxError(f"{path} is a folder: name a file that ends in .onnx")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise OnnxError(f"there is no file {path}") from None
    except OSError as error:
        raise OnnxError(f"{path} cannot be read: {error.strerror or error}") from error
    return Session(data, path)


def in_float32(model: bundle.Bundle) -> bundle.Bundle:
    """The model with arithmetic in float32, which is what onnxruntime has on CPU."""
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.dtype = "float32"
    return dataclasses.replace(model, config=config)
