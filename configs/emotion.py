"""How a speaker feels: eight emotions of RAVDESS, of actors never heard.

  python -m speech_jax.main --config=configs/emotion.py:runs/pretrained --workdir=runs/emotion \\
      --config.data.root=/data/Emotion

The argument is what to start from, as in configs/speaker_id.py. `root` holds train.jsonl and
dev.jsonl with the tags `label` and `speaker`. A fifth of the training actors picks the checkpoint;
the actors of dev are the test.
"""

from configs import speaker_id


def get_config(encoder: str = ""):
    config = speaker_id.get_config(encoder)
    config.data.source = "manifest"
    config.data.train_splits = "train[:80%]"
    config.data.eval_splits = "train[80%:]"
    config.data.test_splits = "dev"
    config.data.portion_within = ""
    config.data.portion_together = "speaker"
    config.parts = {"target": {"tag": "label"}}
    return config
