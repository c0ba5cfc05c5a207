"""Where utterances come from: one file a kind of corpus, and the table of all kinds."""

import functools
import importlib
import inspect
import os

from speech_jax import files, registry
from speech_jax.data.sources.base import (
    File,
    FileSource,
    Segment,
    Source,
    SourceError,
    Utterance,
    concatenate,
    default_cache,
    draw,
    only,
    select,
)

__all__ = [
    "EXTRAS",
    "SOURCES",
    "File",
    "FileSource",
    "Segment",
    "Source",
    "SourceError",
    "Utterance",
]
__all__ += ["concatenate", "default_cache", "draw", "only", "open_source", "select"]

# Kind -> 'module:function', called as function(root, split, on_error, cache, **settings of it).
SOURCES = {
    "librispeech": "speech_jax.data.sources.librispeech:open_split",
    "manifest": "speech_jax.data.sources.manifest:open_split",
    "prepared": "speech_jax.data.sources.prepared:open_split",
    "synthetic": "speech_jax.data.sources.synthetic:open_split",
    "kaldi": "speech_jax.data.sources.kaldi:open_split",
    "common_voice": "speech_jax.data.sources.common_voice:open_split",
    "parquet": "speech_jax.data.sources.parquet:open_split",
}
# Kind -> the extra that installs what it imports.
EXTRAS = {"prepared": "tfds", "parquet": "parquet"}


def open_source(
    kind: str,
    *,
    root: str | os.PathLike,
    split: str,
    on_error: str = "raise",
    cache: str | os.PathLike | None = None,
    **kwargs,
) -> Source:
    """Opens the `split` of the corpus in folder `root`.

    Args:
      kind: a name in `SOURCES`: 'librispeech' (folder, or archive, downloaded when it is an
        official split), 'manifest' (JSON lines), 'prepared' (speech_jax.data.prepare), 'synthetic'
        (spoken by espeak-ng), 'kaldi' (wav.scp and text), 'common_voice' (TSV and clips) or
        'parquet' (as Hugging Face saves data sets).
      on_error: 'raise' for the first bad utterance, or 'skip' to leave bad ones out and list them
        in `skipped`.
      cache: the folder for what is derived from the data; by default $SPEECH_JAX_CACHE, else
        ~/.cache/speech_jax.
      **kwargs: settings of the kind, as its `open_split` takes them.

    Raises:
      SourceError: when the data is absent or, with 'raise', when an utterance cannot be used.
    """
    if on_error not in ("raise", "skip"):
        raise SourceError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'")
    for name, path in (("root", root), ("cache", cache or "")):
        if files.is_remote(path) and (name, kind) != ("root", "prepared"):
            raise SourceError(
                f"{name}={path} is in a bucket, from which only prepared data is read: copy it to "
                "a disk, mount the bucket, or prepare the data (speech_jax.data.prepare)"
            )
    cache = default_cache() if cache is None else files.expand(cache)
    if not split:
        raise SourceError("no split is named; set it to one, for example train-clean-100")
    if kind not in SOURCES:
        raise SourceError(f"unknown kind of source {kind!r}; known: {', '.join(SOURCES)}")
    if kind == "synthetic":
        root = root or cache
    if not root:
        raise SourceError(f"a source of kind {kind!r} needs root, the folder that holds the data")
    module, _, function = SOURCES[kind].partition(":")
    try:
        opener = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if kind not in EXTRAS:
            raise
        raise SourceError(
            f"a source of kind {kind!r} needs {error.name}; install it with "
            f"pip install 'speech_jax[{EXTRAS[kind]}]'"
        ) from error
    for key, parameter in inspect.signature(opener).parameters.items():
        usual, given = parameter.default, kwargs.get(key)
        if isinstance(usual, str | bool) and given is not None and type(given) is not type(usual):
            wanted = "True or False" if isinstance(usual, bool) else "a text"
            raise SourceError(f"{key}={given!r} of a source of kind {kind!r} must be {wanted}")
    return registry.call(
        functools.partial(opener, files.expand(root), split, on_error, cache),
        kwargs,
        what=f"the settings of source {kind!r}",
    )
