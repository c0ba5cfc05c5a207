"""A trained model as plain data. Everything that uses a model takes a bundle and nothing else.

bundle.open(folder)            a workdir, a saved bundle, or a folder of Hugging Face
bundle.save(model, folder)     a folder that stands for itself
bundle.start.with_encoder(...) what a run starts from
"""

from speech_jax.bundle.format import Bundle, BundleError, for_use, on_mesh, open, save

__all__ = ["Bundle", "BundleError", "for_use", "on_mesh", "open", "save"]
