"""Who speaks: a head on a pretrained encoder, fine-tuned on the speakers of a corpus.

  python -m speech_jax.main --config=configs/speaker_id.py:runs/pretrained \\
      --workdir=runs/speakers --config.data.root=/data/LibriSpeech

The argument is what to start from: a workdir, a saved model or a folder of Hugging Face; without it
the encoder is a random one of configs/librispeech.py:conformer_tiny. The head is a dense layer of
512 with ReLU and a dropout of one half, then softmax, over the standardized mean and deviation of
the frames. The run is evaluated every five epochs, stops when it no longer improves, and its start
and its result are evaluated on a test set. The corpus is cut in three: each speaker is in training
and test, and a chapter is in one portion where a speaker has several.
"""

from speech_jax import config as defaults
from speech_jax import models, tasks
from speech_jax.bundle import start


def get_config(encoder: str = ""):
    config = defaults.default()
    config.data.train_splits = "train-clean-5[:60%]"
    config.data.eval_splits = "train-clean-5[60%:70%]"
    config.data.test_splits = "train-clean-5[70%:]"
    config.data.portion_within = "speaker"
    config.data.portion_together = "chapter"
    config.data.batch_seconds = 60.0
    config.data.buckets = 3
    config.data.eval_buckets = 2
    config.parts = {"target": {"tag": "speaker"}}
    config.task = tasks.settings(
        "classify", pooling="statistics", standardize=True, units=512, dropout=0.5
    )
    config.model = models.settings("conformer", "tiny")
    if encoder:
        start.start_from(config, encoder)
        # What is pretrained moves a little, the head as fast as it can.
        config.optimizer.rates = ((r"encoder/.*", 0.1),)
    if models.listens(config.model.name) == "log_mel":
        config.spec_augment.update({"time_masks": 0, "frequency_masks": 0})
    config.optimizer.name = "adam"
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 1e-4
    config.schedule = {"name": "constant", "peak": 1e-3, "warmup": 100}
    config.train.steps = 6_000
    config.train.eval_epochs = 5.0
    config.train.compare = bool(encoder)
    config.checkpoint.patience = 3
    return config


def of_labels(encoder: str, *, within: str = "", together: str = ""):
    """The same for the tag `label` of train.jsonl and dev.jsonl, of which dev is the test.

    A fifth of train picks the checkpoint; `within` and `together` are as config.data.portion_*.
    """
    config = get_config(encoder)
    config.data.source = "manifest"
    config.data.train_splits = "train[:80%]"
    config.data.eval_splits = "train[80%:]"
    config.data.test_splits = "dev"
    config.data.portion_within = within
    config.data.portion_together = together
    config.parts = {"target": {"tag": "label"}}
    return config
