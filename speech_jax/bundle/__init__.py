"""A stand-in until the bundle's own format lands."""

from speech_jax.bundle.format import Bundle as Bundle
from speech_jax.bundle.format import open as open
from speech_jax.bundle.format import save as save
