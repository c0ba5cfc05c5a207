"""WaveNet on one voice (van den Oord et al. 2016): the next sample, in half an hour on two cores.

  python -m speech_jax.main --config=configs/pretrain_wavenet.py --workdir=runs/wavenet \\
      --config.data.root=/path/to/Voice
  python -m speech_jax.main --config=configs/pretrain_wavenet.py:mel --workdir=runs/vocoder \\
      --config.data.root=/path/to/Voice

The folder holds train.jsonl and dev.jsonl, manifests of audio files. `plain` knows the samples
before each one; `mel` is conditioned on the log-mel of the recording, as a vocoder is. 8-bit
mu-law classes at 16 kHz; bits a sample are in benchmarks/RESULTS.md. At each evaluation a held-out
utterance is generated into the workdir, generated/STEP.wav.
"""

from speech_jax import config as defaults
from speech_jax import models, tasks
from speech_jax.errors import UserError


def get_config(kind: str = "plain"):
    if kind not in ("plain", "mel"):
        raise UserError(f"configs/pretrain_wavenet.py:{kind} is not known: plain or mel")
    config = defaults.default()
    config.data.source = "manifest"
    config.data.train_splits = "train"
    # A minute is enough to follow the training by; all of it is measured in the end.
    config.data.eval_splits = "dev[:25%]"
    config.data.test_splits = "dev"
    config.data.min_seconds = 0.4
    config.data.max_seconds = 0.4  # of a crop: many times what the model hears
    config.data.batch_seconds = 1.2
    config.data.buckets = 1
    config.data.eval_buckets = 1
    config.features.normalize = "none"
    config.task = tasks.settings("next_sample", mel=kind == "mel")
    config.model = models.settings("wavenet_waveform", "tiny")
    config.optimizer.weight_decay = 0.0
    config.schedule = {"name": "cosine", "peak": 2e-3, "warmup": 200}
    config.train.steps = 2_500
    config.train.eval_every = 500
    config.checkpoint.every = 500
    return config
