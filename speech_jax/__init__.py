"""speech_jax: speech recognition training on TPU and GPU with JAX."""

__version__ = "0.1.0"
