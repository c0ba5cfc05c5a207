"""Speech in JAX: training, pretraining, fine-tuning and use of recognizers on TPU and GPU.

    import speech_jax

    model = speech_jax.load("runs/quickstart")  # a workdir, a saved model or a Hugging Face folder
    print(model.transcribe("recording.flac"))  # of a classifier: model.classify("recording.flac")

Training is a command: python -m speech_jax.main --help.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when they are asked for: JAX takes seconds, and who wants the version should not wait.
_PUBLIC = {
    "Classification": "speech_jax.deploy.classify",
    "Classifier": "speech_jax.deploy.classify",
    "Model": "speech_jax.deploy.transcribe",
    "Transcription": "speech_jax.deploy.transcribe",
    "UserError": "speech_jax.errors",
    "load": "speech_jax.deploy.models",
}
__all__ = [
    "Classification", "Classifier", "Model", "Transcription", "UserError", "__version__", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'speech_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
