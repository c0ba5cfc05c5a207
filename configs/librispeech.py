"""LibriSpeech (Panayotov et al. 2015) with a Conformer or another encoder, from audio to text.

  python -m speech_jax.main --config=configs/librispeech.py:conformer_s --workdir=runs/s \\
      --config.data.root=/data/LibriSpeech
  python -m speech_jax.main --config=configs/librispeech.py:conformer_s --workdir=runs/s \\
      --mode=evaluate --config.data.root=/data/LibriSpeech \\
      --config.data.eval_splits=test-clean,test-other
  python -m speech_jax.main --config=configs/librispeech.py --workdir=runs/xs \\
      --config.data.root=/data/LibriSpeech --config.data.train_splits=train-clean-5 \\
      --config.data.eval_splits=dev-clean-5   (20 to 30 minutes on two cores)

The argument is the model: conformer_s (9 M parameters), conformer_m (27 M), conformer_l (111 M),
deepspeech (85 M) or wavenet (66 M), for accelerators. conformer_xs (5 M), conformer_tiny (1.6 M),
deepspeech_tiny (1.9 M) and wavenet_tiny (1.0 M) have batches and a schedule for a few hours of
speech on two cores. Behind a `+` stands the task, if it is not CTC alone: conformer_tiny+attend
adds an attention decoder and searches with both, and conformer_xs+transduce makes it a transducer.
That one is what there is without an argument: after equal minutes it has the fewest errors. Splits
that the root lacks are downloaded.

By hours of speech (what was run stands in benchmarks/RESULTS.md, with its curve):

  5 h      on two cores in 27 minutes, WER on dev-clean-5: 54%, and with 6-grams of the training
           transcripts 45% (README, A language model). conformer_tiny+transduce (12,000 updates):
           62%; CTC alone (conformer_tiny, 9,000 updates): 82%. An H200 brings a model of 19 M
           parameters to 44% in 3.5 minutes (benchmarks/hardware/timed.py).
  less     the same with --config.model.dropout=0.1, for there are more epochs then; or start from
           another model (configs/finetune_wav2vec2.py, --config.init.folder).
  100 h    conformer_s --config.data.train_splits=train-clean-100 --config.train.steps=40000
           --config.train.ema_decay=0.999 --config.data.batch_seconds=1200, not run by us;
           a published CTC model of 26 M parameters has WER 9.6 on test-clean (ESPnet).
  960 h    as it is, not run by us: a day of 8 accelerators of 200 TFLOP/s for S. Published CTC
           models have WER 3.4 (S), 3.0 (M) and 2.7 (L) on test-clean, without a language model.

Then:

  python -m speech_jax.transcribe recording.flac --model=runs/s
  python -m speech_jax.deploy.export runs/s s.sjx
"""

from speech_jax import config as defaults
from speech_jax import models, registry, tasks

# Encoder, variant, what is changed of it, and the highest learning rate.
MODELS = {
    "conformer_xs": ("conformer", "tiny", {"width": 192, "num_layers": 6}, 1e-3),
    "conformer_tiny": ("conformer", "tiny", {}, 1e-3),
    "conformer_s": ("conformer", "s", {}, 2e-3),
    "conformer_m": ("conformer", "m", {}, 1.5e-3),
    "conformer_l": ("conformer", "l", {}, 1e-3),
    "deepspeech_tiny": ("deepspeech", "tiny", {}, 1e-3),
    "deepspeech": ("deepspeech", "ds2", {"subsampling": 4}, 5e-4),  # as few frames as pieces need
    "wavenet_tiny": ("wavenet", "tiny", {}, 1e-3),
    "wavenet": ("wavenet", "large", {}, 1e-3),
}
# Settings of the task, and of what it decodes with.
TASKS = {
    "recognize": (tasks.settings("recognize"), {}),
    "attend": (tasks.settings("attend", layers=4), {"width": 10}),
    # Characters and pieces are many: the joint is computed where they are said.
    "transduce": (tasks.settings("transduce", span=5), {}),
}


def get_config(model: str = "conformer_xs+transduce"):
    config = defaults.default()
    name = defaults.choose_task(config, model, TASKS)
    encoder, variant, changes, peak = registry.lookup("model of this recipe", MODELS, name)
    config.data.train_splits = "train-clean-100,train-clean-360,train-other-500"
    config.data.eval_splits = "dev-clean,dev-other"
    config.data.speeds = (0.9, 1.0, 1.1)
    config.data.batch_seconds = 2_400.0
    config.text.tokenizer = "sentencepiece"
    config.text.normalizer = "english"
    config.model = models.settings(encoder, variant, **changes, dtype="bfloat16")
    config.schedule.peak = peak
    config.train.steps = 150_000
    config.train.ema_decay = 0.9999
    if variant == "tiny":
        _for_two_cores(config)
    if name == "conformer_xs":
        _for_a_larger_model(config)
    return config


def _for_two_cores(config):
    """A few hours of speech in half an hour: enough to see it learn, not to recognize well."""
    config.data.speeds = (1.0,)
    config.data.batch_seconds = 30.0
    config.data.buckets = 4
    config.data.eval_buckets = 2
    config.text.tokenizer = "characters"
    config.model.dtype = "float32"
    config.schedule = {"name": "cosine", "peak": config.schedule.peak, "warmup": 800}
    config.spec_augment.update({"frequency_masks": 1, "time_masks": 1})
    config.train.update({"steps": 12_000, "eval_every": 1_000, "ema_decay": 0.0})
    config.checkpoint.every = 1_000
    if config.task.name == "transduce":
        config.model.dropout = 0.0  # a dozen epochs of five hours: nothing is known by heart yet
    if config.task.name == "attend":
        config.train.steps = 9_000  # whose updates take longer
        # After a few hours a decoder by itself ends texts too soon.
        config.decoder.ctc_weight = 0.7


def _for_a_larger_model(config):
    """The same half hour: fewer updates, each of twice the time, of utterances that vary more."""
    config.train.steps = 8_200
    config.data.speeds = (0.9, 1.0, 1.1)
    # The masks grow to half of their widths; a longer run would take what they grow to.
    masks = {"time_masks": 5, "frequency_masks": 2, "ramp": 16_000}
    config.spec_augment.update({**masks, "vocal_tract": 0.1})
    if config.task.name == "transduce":
        config.task.context = (
            3  # labels that the predictor sees; words have fewer errors than with 2
        )
