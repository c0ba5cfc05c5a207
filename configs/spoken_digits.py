"""Strings of spoken digits, recorded: a recognizer in five minutes on two CPU cores.

  python -m speech_jax.main --config=configs/spoken_digits.py --workdir=runs/digits \\
      --config.data.root=/path/to/SpokenDigits

53 minutes of training speech in LibriSpeech layout, splits `train` and `dev`; scores are in
benchmarks/RESULTS.md. The argument is the encoder: `configs/spoken_digits.py:deepspeech`,
`wavenet`, `wav2vec2`, or `conformer`, which it is without one. What follows a plus
is the task: CTC without one, `conformer+attend` for CTC and an attention decoder together,
`conformer+transduce` for a transducer, `conformer+tdt` for one with durations; these take eight
minutes. Instead of the name of an encoder a folder goes on with the encoder of the model in it,
pretrained by configs/pretrain_wavenet.py for example: `configs/spoken_digits.py:runs/wavenet`, with
a slash.
"""

from speech_jax import config as defaults
from speech_jax import models, registry, tasks
from speech_jax.bundle import start

# A hidden frame is eight of log-mel, if it is of log-mel: of pieces that are words there are few.
ENCODERS = {
    "conformer": {"subsampling": 8},
    "deepspeech": {
        "subsampling": 8, "conv_channels": (32,) * 3, "conv_kernels": (3,) * 3,
        "conv_bands": (3,) * 3,
    },
    "wavenet": {"subsampling": 8},
    "wav2vec2": {"pre_norm": True, "conv_norm": "layer"},
}  # fmt: skip
# Half of the loss is CTC's: from an hour of speech it teaches the encoder more than the others do.
_TRANSDUCER = {"width": 128, "warmup": 1_000, "ctc_weight": 0.5}
# Settings of the task, and of what it decodes with.
TASKS = {
    "recognize": (tasks.settings("recognize"), {}),
    "attend": (tasks.settings("attend", ctc_weight=0.5), {"width": 8}),
    "transduce": (tasks.settings("transduce", **_TRANSDUCER), {"name": "transducer_beam"}),
    "tdt": (tasks.settings("transduce", **_TRANSDUCER, durations=(0, 1, 2, 3, 4)), {}),
}


def get_config(model: str = "conformer"):
    config = defaults.default()
    encoder = defaults.choose_task(config, model, TASKS)
    config.data.train_splits = "train"
    config.data.eval_splits = "dev"
    config.data.batch_seconds = 15.0
    config.data.max_seconds = 8.0
    config.data.buckets = 3
    config.data.eval_buckets = 1
    config.data.speeds = (0.9, 1.0, 1.1)  # six speakers are few
    # The recordings are of telephone rate: what is above half of it is the codec's, not theirs.
    config.features.high_hz = 4_000.0
    # Ten words: as pieces they need no spelling, and few frames.
    config.text.update(
        {"tokenizer": "sentencepiece", "vocabulary_size": 27, "normalizer": "english"}
    )
    if "/" in encoder:
        start.start_from(config, encoder)
    else:
        settings = registry.lookup("encoder of this recipe", ENCODERS, encoder)
        config.model = models.settings(encoder, "tiny", **settings)
    config.optimizer.weight_decay = 1e-2
    config.schedule = {"name": "cosine", "peak": 2e-3, "warmup": 250}
    # Narrow and few: a mask over a whole word of a string without grammar cannot be learned from.
    config.spec_augment.update({"time_masks": 2, "frequency_width": 15, "start_step": 800})
    config.train.update({"steps": 4_200, "eval_every": 1_050})
    if config.task.name != "recognize":  # two losses take longer to learn from
        config.train.update({"steps": 7_500, "eval_every": 1_500})
    return config
