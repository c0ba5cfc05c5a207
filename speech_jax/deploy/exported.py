"""Exported files as acoustic models: what transcription and `speech_jax.load` make of them."""

import pathlib
import shutil
import tempfile
import weakref

from speech_jax.data.parts.transcript import Transcript
from speech_jax.deploy import onnx, sjx
from speech_jax.errors import UserError


class Exported:
    """An exported model, as Acoustic (deploy/acoustic.py) says."""

    def __init__(self, path: pathlib.Path, opened: sjx.Model | onnx.Session):
        """Raises UserError for a model that gives no text."""
        card = opened.card
        self.sample_rate = int(card["sample_rate"])
        self.frame_seconds = float(card["frame_seconds"])
        self.longest_seconds = float(card["longest_seconds"])
        self.logits = opened.logits
        # A tokenizer and a language model are read from files; these go with this object.
        folder = pathlib.Path(tempfile.mkdtemp(prefix="speech_jax_"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        texts = {name: text.encode() for name, text in card["parts"].items()}
        for name, content in (texts | opened.files).items():
            if pathlib.PurePath(name).name != name:
                raise UserError(f"{path} is damaged: {name!r} is not the name of a file")
            (folder / name).write_bytes(content)
        named = {key: str(folder / name) for key, name in card["files"].items()}
        self.decoder = card["decoder"] | named
        try:
            self.transcript = Transcript.restore(folder, "labels")
        except FileNotFoundError:
            raise UserError(f"{path} gives no text: it has no tokenizer") from None


def open_sjx(path: pathlib.Path) -> Exported:
    """Opens an .sjx file; UserError where it cannot be used or gives no text."""
    return Exported(path, sjx.load(path))


def open_onnx(path: pathlib.Path) -> Exported:
    """Opens an ONNX file of speech_jax; UserError where it cannot be used or gives no text."""
    return Exported(path, onnx.load(path))
