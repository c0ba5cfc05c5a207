"""BEST-RQ (Chiu et al. 2022): a Conformer that names random codes of hidden log-mel frames.

  python -m speech_jax.main --config=configs/pretrain_best_rq.py --workdir=runs/best_rq \\
      --config.data.root=/data/LibriSpeech

The encoder is the paper's idea at Conformer M (27 M parameters) or the size given as argument;
spans of 400 ms. Not yet run to its end by us. `conformer_tiny` takes half an hour on two cores for
a few hours of speech; its scores are in benchmarks/RESULTS.md. Transcripts are not used; a run of
configs/librispeech.py with the same model and features starts from what is learned with
--config.init.folder=runs/best_rq.
"""

from speech_jax import config as defaults
from speech_jax import models, tasks


def get_config(model: str = "conformer_m"):
    config = defaults.default()
    size = model.removeprefix("conformer_")
    config.data.train_splits = "train-clean-100,train-clean-360,train-other-500"
    config.data.eval_splits = "dev-clean"
    config.data.batch_seconds = 4_800.0
    config.task = tasks.settings("best_rq")
    config.model = models.settings("conformer", size, dtype="bfloat16")
    config.schedule = {"name": "noam", "peak": 4e-3, "warmup": 25_000}
    config.train.steps = 300_000
    if size == "tiny":
        _for_two_cores(config)
    return config


def _for_two_cores(config):
    """A few hours of speech in half an hour; spans that so short a training can fill in."""
    config.data.batch_seconds = 32.0
    config.data.buckets = 4
    config.data.eval_buckets = 2
    config.task.update({"codes": 256, "mask_fraction": 0.5, "mask_length": 5})
    config.model.dtype = "float32"
    config.schedule = {"name": "cosine", "peak": 1e-3, "warmup": 500}
    config.train.update({"steps": 6_500, "eval_every": 650})
    config.checkpoint.every = 650
