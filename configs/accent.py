"""Which language a speaker of English learned first: six accents, of speakers never heard.

  python -m speech_jax.main --config=configs/accent.py:runs/pretrained --workdir=runs/accent \\
      --config.data.root=/data/Accent

The argument is what to start from, as in configs/speaker_id.py. `root` holds train.jsonl and
dev.jsonl with the tag `label` and a recording of each speaker. Accents are not alike in number:
they weigh the same in the loss, and balanced accuracy picks the checkpoint, that of a fifth of each
accent's training speakers. The speakers of dev are the test.
"""

from configs import speaker_id


def get_config(encoder: str = ""):
    config = speaker_id.of_labels(encoder, within="label")
    config.task.balance = 1.0
    config.checkpoint.metric = "balanced_accuracy"
    config.checkpoint.mode = "max"
    return config
