"""Exported files as acoustic models: what transcription and `speech_jax.load` make of them."""

import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from speech_jax.data.parts.transcript import Transcript
from speech_jax.deploy import onnx, sjx
from speech_jax.errors import UserError


class Exported:
    """An exported model, as Acoustic (deploy/acoustic.py) says."""

    def __init__(
        self,
        path: pathlib.Path,
        card: Mapping[str, Any],
        logits: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    ):
        """`logits` is the method of an opened file. Raises UserError for a model of no text."""
        self.sample_rate = int(card["sample_rate"])
        self.frame_seconds = float(card["frame_seconds"])
        self.longest_seconds = float(card["longest_seconds"])
        self.decoder = card["decoder"]
        self.transcript = _transcript(path, card["parts"])
        self.logits = logits


def open_sjx(path: pathlib.Path) -> Exported:
    """Opens an .sjx file; UserError where it is damaged or gives no text."""
    model = sjx.load(path)
    return Exported(path, model.card, model.logits)


def open_onnx(path: pathlib.Path) -> Exported:
    """Opens an ONNX file of speech_jax; UserError where it cannot be used or gives no text."""
    session = onnx.load(path)
    return Exported(path, session.card, session.logits)


def _transcript(path: pathlib.Path, parts: Mapping[str, str]) -> Transcript:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for file, text in parts.items():
            if pathlib.PurePath(file).name != file:
                raise UserError(f"{path} is damaged: its part {file!r} has no name of a file")
            (folder / file).write_text(text, "utf-8")
        try:
            return Transcript.restore(folder, "labels")
        except FileNotFoundError:
            raise UserError(f"{path} gives no text: it has no tokenizer") from None
