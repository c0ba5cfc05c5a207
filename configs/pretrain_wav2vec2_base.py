"""wav2vec 2.0 Base on unlabelled speech (Baevski et al. 2020).

  python -m speech_jax.main --config=configs/pretrain_wav2vec2_base.py --workdir=runs/wav2vec2 \\
      --config.data.root=/data/LibriSpeech

The paper's recipe: 400,000 updates of 5,600 s of LibriSpeech's 960 hours, 1.6 days on 64 V100. What
comes of it fine-tunes to WER 3.4 / 8.6 (test-clean / other, 960 h of labels, no language model).
Not yet run to its end by us. Transcripts are not used.
"""

from speech_jax import config as defaults
from speech_jax import models


def get_config():
    config = defaults.default()
    config.data.train_splits = "train-clean-100,train-clean-360,train-other-500"
    config.data.min_seconds = 2.0
    config.data.max_seconds = 15.625
    config.data.batch_seconds = 5_600.0
    config.features.normalize = "none"
    config.model = models.settings(
        "wav2vec2", "base", layer_drop=0.05, feature_gradient=0.1, dtype="bfloat16"
    )
    with config.unlocked():
        config.task = {
            "name": "contrastive",
            "groups": 2,
            "codes": 320,
            "code_features": 256,
            "final_features": 256,
            "negatives": 100,
            "temperatures": (2.0, 0.5, 0.999995),
            "mask_fraction": 0.65,
            "mask_length": 10,
            "diversity_weight": 0.1,
            "penalty_weight": 10.0,
            "feature_dropout": 0.1,
        }
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.98
    config.optimizer.weight_decay = 0.01
    config.schedule = {"name": "exponential", "peak": 5e-4, "warmup": 32_000, "final": 0.01}
    config.train.steps = 400_000
    return config
