"""A Conformer for five hours of speech and five minutes of one large GPU.

training.py adds where the data is, the updates and the evaluations. Conformer-M's width at three
quarters of its depth: some 20 M parameters, which one H100 should take through a hundred epochs.
Dropout and decay are for an epoch seen a hundred times; few shapes, and layers that are compiled
once, for a short start.
"""

from ml_collections import ConfigDict

from benchmarks.hardware.shapes import BATCH_SECONDS
from speech_jax import config as defaults
from speech_jax import models


def get_config() -> ConfigDict:
    """The settings."""
    config = defaults.default()
    config.data.train_splits = "train-clean-5"
    config.data.eval_splits = "dev-clean-5"
    config.data.max_seconds = 17.0
    config.data.batch_seconds = float(BATCH_SECONDS)
    config.data.buckets = 3
    config.data.eval_buckets = 1
    config.data.speeds = (0.9, 1.0, 1.1)
    config.data.threads = 16
    config.text.update({"tokenizer": "sentencepiece", "vocabulary_size": 128})
    config.model = models.settings(
        "conformer", "m", num_layers=12, subsampling_channels=128, dropout=0.15, dtype="bfloat16"
    )
    config.optimizer.weight_decay = 0.05
    config.schedule = {"name": "cosine", "peak": 1.2e-3, "warmup": 400}
    config.spec_augment.start_step = 400
    config.checkpoint.every = 1_000_000  # evaluations save
    config.checkpoint.keep = 1
    return config


def get_tiny_config() -> ConfigDict:
    """The same code in seconds on a CPU."""
    config = get_config()
    config.data.train_minutes = 2.0
    config.data.batch_seconds = 34.0
    config.data.buckets = 1
    config.data.threads = 2
    config.model = models.settings("conformer", "tiny", num_layers=1, subsampling=8)
    return config
