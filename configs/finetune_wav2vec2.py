"""Fine-tuning wav2vec2 to CTC from a pretrained encoder (Baevski et al. 2020, appendix B).

  python -m speech_jax.main --config=configs/finetune_wav2vec2.py:100h --workdir=runs/finetuned \\
      --config.init.folder=/models/wav2vec2-base --config.data.root=/data/LibriSpeech

The folder is one of Hugging Face (config.json and weights) or the workdir of a run of
configs/pretrain_wav2vec2_base.py. The argument is the amount of labels: 10m, 10h, 100h (default) or
960h, with the paper's learning rate, updates and masks; the encoder stands still for the first
updates, the feature extractor always. Published, without a language model: WER 6.1 / 13.3 on
test-clean / other from 100 h, 3.4 / 8.6 from 960 h. Not yet run to its end by us.

`tiny` fine-tunes what configs/pretrain_wav2vec2_base.py:tiny learned, on ten minutes of the
training splits, in a few minutes on two cores. Its scores, and those from scratch (without
--config.init.folder), are in benchmarks/RESULTS.md.
"""

from speech_jax import config as defaults
from speech_jax import models
from speech_jax.errors import UserError

# Minutes of speech (0: all), peak learning rate, updates, updates for which the encoder stands
# still, time and channel masks.
SPLITS = {
    "10m": (10.0, 5e-5, 13_000, 10_000, 0.65, 0.25),
    "10h": (600.0, 5e-5, 20_000, 10_000, 0.65, 0.5),
    "100h": (0.0, 3e-5, 80_000, 0, 0.65, 0.5),
    "960h": (0.0, 1e-4, 320_000, 0, 0.5, 0.1),
}
EXTRACTOR, TRANSFORMER = "encoder/extractor/.*", "encoder/.*"


def get_config(labels: str = "100h"):
    if labels == "tiny":
        return _for_two_cores()
    if labels not in SPLITS:
        raise UserError(
            f"configs/finetune_wav2vec2.py:{labels} is not known: {', '.join(SPLITS)} or tiny"
        )
    minutes, peak, steps, still, time, channel = SPLITS[labels]
    config = defaults.default()
    config.data.train_minutes = minutes
    config.data.train_splits = "train-clean-100"
    if labels == "960h":
        config.data.train_splits += ",train-clean-360,train-other-500"
    config.data.eval_splits = "dev-clean,dev-other"
    config.data.batch_seconds = 1_600.0
    config.text.normalizer = "english"
    config.model = models.settings(
        "wav2vec2",
        "base",
        input_dropout=0.0,
        layer_drop=0.1,
        mask_time=time,
        mask_channel=channel,
        feature_gradient=0.0,
        dtype="bfloat16",
    )
    config.optimizer.weight_decay = 0.0
    config.optimizer.frozen = ((EXTRACTOR, -1), (TRANSFORMER, still))
    config.schedule = {"name": "tri_stage", "peak": peak}
    config.train.steps = steps
    return config


def _for_two_cores():
    config = defaults.default()
    config.data.train_splits = "train-clean-5"
    config.data.eval_splits = "dev-clean-5"
    config.data.train_minutes = 10.0
    config.data.max_seconds = 17.0
    config.data.batch_seconds = 32.0
    config.data.buckets = 2
    config.data.eval_buckets = 2
    config.text.normalizer = "english"
    # Nothing stands still: an extractor of half an hour's pretraining is not yet good enough.
    config.model = models.settings("wav2vec2", "tiny")
    config.optimizer.weight_decay = 0.0
    config.schedule = {"name": "tri_stage", "peak": 5e-4, "fractions": (0.1, 0.5, 0.4)}
    config.train.update({"steps": 600, "eval_every": 300})
    config.checkpoint.every = 300
    return config
