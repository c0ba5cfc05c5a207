"""wav2vec 2.0 on unlabelled speech (Baevski et al. 2020).

  python -m speech_jax.main --config=configs/pretrain_wav2vec2_base.py --workdir=runs/wav2vec2 \\
      --config.data.root=/data/LibriSpeech
  python -m speech_jax.main --config=configs/pretrain_wav2vec2_base.py:tiny --workdir=runs/tiny \\
      --config.data.root=/data/LibriSpeech --config.data.train_splits=train-clean-5 \\
      --config.data.eval_splits=dev-clean-5   (half an hour on two cores)

Base is the paper's recipe: 400,000 updates of 5,600 s of LibriSpeech's 960 hours, 1.6 days on 64
V100. What comes of it fine-tunes to WER 3.4 / 8.6 (test-clean / other, 960 h of labels, no language
model). Not yet run to its end by us. What `tiny` does is in benchmarks/RESULTS.md. Transcripts are
not used; configs/finetune_wav2vec2.py uses what is learned.
"""

from speech_jax import config as defaults
from speech_jax import models, tasks
from speech_jax.errors import UserError


def get_config(size: str = "base"):
    if size not in ("base", "tiny"):
        raise UserError(f"configs/pretrain_wav2vec2_base.py:{size} is not known: base or tiny")
    config = defaults.default()
    config.data.train_splits = "train-clean-100,train-clean-360,train-other-500"
    config.data.eval_splits = "dev-clean"
    config.data.min_seconds = 2.0
    config.data.max_seconds = 15.6
    config.data.batch_seconds = 5_600.0
    config.task = tasks.settings("contrastive")
    config.model = models.settings(
        "wav2vec2", "base", layer_drop=0.05, feature_gradient=0.1, dtype="bfloat16"
    )
    config.optimizer.clip_norm = 0.0
    config.optimizer.weight_decay = 0.01
    config.schedule = {"name": "polynomial", "peak": 5e-4, "warmup": 32_000}
    config.train.steps = 400_000
    if size == "tiny":
        _for_two_cores(config)
    return config


def _for_two_cores(config):
    """A few hours of speech: fewer codes, for fewer sounds are heard often enough."""
    config.data.max_seconds = 8.0
    config.data.batch_seconds = 64.0
    config.data.buckets = 2
    config.data.eval_buckets = 2
    steps = 3_000
    config.task.update(
        {
            "codes": 40, "code_features": 64, "final_features": 64, "negatives": 50,
            "temperatures": (2.0, 0.5, 0.25 ** (1 / steps)),
        }
    )  # fmt: skip
    config.model = models.settings("wav2vec2", "tiny")
    config.optimizer.clip_norm = 1.0
    config.schedule = {"name": "cosine", "peak": 1e-3, "warmup": 300}
    config.train.update({"steps": steps, "eval_every": 300})
    config.checkpoint.every = 300
