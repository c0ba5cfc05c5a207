"""The main job in miniature: synthetic speech to text on two CPU cores.

python -m speech_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from speech_jax import config as defaults
from speech_jax import models


def get_config():
    config = defaults.default()
    config.data.source = "synthetic"
    config.data.arguments = {"utterances": {"train": 3_000, "dev": 200, "test": 300}}
    config.data.train_splits = "train"
    config.data.eval_splits = "dev"
    config.data.test_splits = "test"
    config.data.batch_seconds = 20.0
    config.data.max_seconds = 8.0
    config.data.buckets = 3
    config.data.eval_buckets = 1
    # A hundred words: as pieces they need little spelling, and few frames.
    config.text.update(
        {"tokenizer": "sentencepiece", "vocabulary_size": 112, "normalizer": "english"}
    )
    config.model = models.settings("conformer", "tiny", subsampling=8)
    config.optimizer.weight_decay = 1e-2
    config.schedule = {"name": "cosine", "peak": 2e-3, "warmup": 250}
    config.spec_augment.update({"time_masks": 2, "frequency_width": 15, "start_step": 800})
    config.train.steps = 2_000
    config.train.eval_every = 500
    return config
