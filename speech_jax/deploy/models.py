"""Any trained model, opened for use."""

import os
from collections.abc import Mapping
from typing import Any

from speech_jax import bundle
from speech_jax.deploy.acoustic import FILES, open_acoustic, path_of
from speech_jax.deploy.classify import Classifier, ClassifierError, is_classifier
from speech_jax.deploy.transcribe import Model


def load(
    path: str | os.PathLike,
    *,
    chunk_seconds: float | None = None,
    decoder: Mapping[str, Any] | None = None,
) -> Model | Classifier:
    """Opens a trained model for use: a recognizer, or a classifier.

    Args:
      path: a workdir, a saved model, a Hugging Face folder or an exported file (.sjx, .onnx).
      chunk_seconds: of a recognizer: the most audio that the acoustic model is given at once, 5 to
        300 seconds.
      decoder: of a recognizer: settings of the decoder, such as {"name": "beam", "nbest": 5}; see
        Model.

    Raises:
      UserError: there is no model, or one that can be used for neither; the message says which.
    """
    path = path_of(path)
    if path.suffix.lower() not in FILES and is_classifier(found := bundle.open(path)):
        if chunk_seconds is not None or decoder is not None:
            raise ClassifierError(
                f"{path} is a classifier: chunk_seconds and decoder are for recognizers, leave "
                "them out"
            )
        return Classifier(found)
    return Model(open_acoustic(path), chunk_seconds=chunk_seconds, decoder=decoder)
