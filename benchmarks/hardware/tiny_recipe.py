"""recipe.py, small: to try training.py where there is no accelerator."""

from benchmarks.hardware.recipe import get_tiny_config as get_config  # noqa: F401
