"""LoRA (Hu et al. 2022): a trained recognizer learns one speaker's speech, in a bundle of 0.1 MB.

  python -m speech_jax.main --config=configs/finetune_lora.py:runs/digits --workdir=runs/speaker \\
      --config.data.root=/path/to/SpokenDigits --config.data.only=speaker=6
  python -m speech_jax.bundle.base split runs/speaker runs/speaker_6

The argument is what to start from: a workdir, a saved model or a folder of Hugging Face, with its
head and vocabulary. The encoder stands still beneath changes of rank 2; they and the head learn,
2% of the parameters of a model for two cores. `split` keeps what was learned alone, and opens on
the model that it was learned on. A tenth of each speaker's training utterances picks the
checkpoint, and dev is the test. Of what use it is to one speaker is in benchmarks/RESULTS.md.
"""

from speech_jax import config as defaults
from speech_jax.bundle import start
from speech_jax.errors import UserError


def get_config(folder: str = ""):
    if not folder:
        raise UserError(
            "there is no model to start from: name it as in "
            "--config=configs/finetune_lora.py:FOLDER"
        )
    config = defaults.default()
    start.start_from(config, folder, take="model")
    config.data.train_splits = "train[:90%]"
    # What picks the checkpoint is not what it is measured on.
    config.data.eval_splits = "train[90%:]"
    config.data.test_splits = "dev"
    config.data.portion_within = "speaker"
    config.data.max_seconds = 8.0
    config.data.batch_seconds = 15.0
    config.data.buckets = 2
    config.data.eval_buckets = 1
    config.data.speeds = (0.9, 1.0, 1.1)
    config.lora.rank = 2
    # There is little speech of one speaker: few and narrow masks.
    config.spec_augment.update({"time_masks": 2, "frequency_width": 15})
    config.optimizer.weight_decay = 1e-2
    config.schedule = {"name": "cosine", "peak": 2e-3, "warmup": 50}
    config.train.update({"steps": 600, "eval_every": 150})
    config.checkpoint.every = 150
    return config
