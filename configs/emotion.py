"""How a speaker feels: eight emotions of RAVDESS, of actors never heard.

  python -m speech_jax.main --config=configs/emotion.py:runs/pretrained --workdir=runs/emotion \\
      --config.data.root=/data/Emotion

The argument is what to start from, as in configs/speaker_id.py. `root` holds train.jsonl and
dev.jsonl with the tags `label` and `speaker`. A fifth of the training actors picks the checkpoint;
the actors of dev are the test.
"""

from configs import speaker_id


def get_config(encoder: str = ""):
    return speaker_id.of_labels(encoder, together="speaker")
