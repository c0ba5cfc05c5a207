"""BEST-RQ (Chiu et al. 2022): a Conformer that names random codes of hidden log-mel frames.

  python -m speech_jax.main --config=configs/pretrain_best_rq.py --workdir=runs/best_rq \\
      --config.data.root=/data/LibriSpeech

The encoder is the paper's idea at Conformer M (28 M parameters); spans of 400 ms. Not yet run to
its end by us. Transcripts are not used.
"""

from speech_jax import config as defaults
from speech_jax import models


def get_config():
    config = defaults.default()
    config.data.train_splits = "train-clean-100,train-clean-360,train-other-500"
    config.data.batch_seconds = 4_800.0
    config.model = models.settings("conformer", "m", dtype="bfloat16")
    with config.unlocked():
        config.task = {
            "name": "best_rq",
            "codes": 8192,
            "code_features": 16,
            "mask_fraction": 0.4,
            "mask_length": 10,
        }
    config.schedule = {"name": "noam", "peak": 4e-3, "warmup": 25_000}
    config.train.steps = 300_000
    return config
