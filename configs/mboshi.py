"""Mboshi speech to French text (Godard et al. 2018): 3.8 hours, on two CPU cores or a GPU.

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
    # A hidden frame is eight of log-mel, so that what is spoken needs pieces too.
    config.text.update({"tokenizer": "sentencepiece", "vocabulary_size": 200})
    config.text.normalizer = "moses"  # &apos; is an apostrophe
    config.parts = {"target": {"tag": "translation", "vocabulary_size": 500}}
    config.task = tasks.settings("translate", layers=2, dropout=0.2, beam=5, length_penalty=0.6)
    config.model = models.settings("conformer", "tiny", num_layers=8, width=144)
    config.model.update({"subsampling": 8, "dropout": 0.2})
    config.optimizer.weight_decay = 1e-2
    config.schedule = {"name": "cosine", "peak": 1e-3, "warmup": 500}
    config.spec_augment.update({"time_masks": 4, "frequency_width": 20, "start_step": 800})
    config.train.steps = 5_600
    config.train.ema_decay = 0.998
    config.train.eval_every = 1_400
    config.checkpoint.every = 1_400
    return config
