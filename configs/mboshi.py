"""Mboshi speech to French text (Godard et al. 2018): 3.8 hours, on two CPU cores or a GPU.

On two cores it takes 40 minutes; dev BLEU is 5.1 then, and chrF2 18.2.

python -m speech_jax.main --config=configs/mboshi.py --config.data.root=Mboshi --workdir=runs/mboshi

Any manifest whose lines have a `translation` will do. For one without transcripts,
--config.parts.labels.tag=translation has CTC learn from the translations;
--config.task.ctc_weight=0 leaves CTC out, and needs that tag too where there are none.
"""

from speech_jax import config as defaults
from speech_jax import models, tasks


def get_config():
    config = defaults.default()
    config.data.source = "manifest"
    config.data.train_splits = "train"
    config.data.eval_splits = "dev"
    config.data.max_seconds = 10.0
    config.data.batch_seconds = 30.0
    config.data.buckets = 4
    config.data.eval_buckets = 2
    config.data.speeds = (0.9, 1.0, 1.1)
    # As characters what is spoken is learned from the first minute on, as pieces of 200 it was not.
    config.text.tokenizer = "characters"
    config.text.normalizer = "moses"  # &apos; is an apostrophe
    config.parts = {
        "target": {
            "tag": "translation", "tokenizer": "sentencepiece", "vocabulary_size": 500,
        }
    }  # fmt: skip
    config.task = tasks.settings("translate", layers=2, dropout=0.2, ctc_weight=0.5)
    config.decoder.length_penalty = 0.8
    config.model = models.settings("conformer", "tiny")
    config.optimizer.weight_decay = 1e-2
    config.schedule = {"name": "cosine", "peak": 1e-3, "warmup": 800}
    config.spec_augment.update({"time_masks": 1, "frequency_masks": 1, "start_step": 2_000})
    config.train.steps = 12_000
    config.train.ema_decay = 0.998
    config.train.eval_every = 2_000
    config.checkpoint.every = 2_000
    return config
