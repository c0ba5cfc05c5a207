"""Speech in JAX: training, pretraining, fine-tuning and use of recognizers on TPU and GPU.

    import speech_jax

    model = speech_jax.load("runs/quickstart")  # a workdir, a saved model or a Hugging Face folder
    print(model.transcribe("recording.flac"))

Training is a command: python -m speech_jax.main --help.
"""

from __future__ import annotations

import typing

from speech_jax.errors import UserError

if typing.TYPE_CHECKING:
    import os

    from speech_jax.deploy.transcribe import Model

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def load(folder: str | os.PathLike) -> Model:
    """Opens a trained model for use: a workdir, a saved bundle or a folder of Hugging Face.

    Raises:
      UserError: the folder holds no model, or one that gives no text; the message says which.
    """
    # JAX takes seconds to import: who only asks for the version should not wait for it.
    from speech_jax import bundle
    from speech_jax.deploy.transcribe import Model

    return Model(bundle.open(folder))
