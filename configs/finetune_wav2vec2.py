"""Fine-tuning wav2vec2 to CTC from a pretrained model (Baevski et al. 2020, appendix B).

  python -m speech_jax.deploy.hf import facebook/wav2vec2-base-folder runs/imported
  python -m speech_jax.main --config=configs/finetune_wav2vec2.py:100h --workdir=runs/finetuned \\
      --config.train.start_from=runs/imported --config.data.root=/data/LibriSpeech

The argument is the amount of labels: 10m, 10h, 100h (default) or 960h, with the paper's learning
rate, updates and masks; the encoder stands still for the first updates, the feature extractor
always. Published, without a language model: WER 6.1 / 13.3 on test-clean / other from 100 h, 3.4 /
8.6 from 960 h. Not yet run to its end by us.
"""

from speech_jax import config as defaults
from speech_jax import models

# Peak learning rate, updates, updates that the encoder stands still for, time and channel masks.
SPLITS = {
    "10m": (5e-5, 13_000, 10_000, 0.65, 0.25),
    "10h": (5e-5, 20_000, 10_000, 0.65, 0.5),
    "100h": (3e-5, 80_000, 0, 0.65, 0.5),
    "960h": (1e-4, 320_000, 0, 0.5, 0.1),
}


def get_config(labels: str = "100h"):
    peak, steps, still, time, channel = SPLITS[labels]
    config = defaults.default()
    config.data.train_splits = "train-clean-100"
    if labels == "960h":
        config.data.train_splits += ",train-clean-360,train-other-500"
    config.data.eval_splits = "dev-clean,dev-other"
    config.data.test_splits = "test-clean,test-other"
    config.data.max_seconds = 20.0
    config.data.batch_seconds = 1_600.0
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
    with config.unlocked():
        config.optimizer.frozen = [("^encoder/extractor/", -1)]
        if still:
            config.optimizer.frozen.append(("^encoder/", still))
        config.train.start_from = ""
    config.schedule = {"name": "tri_stage", "peak": peak}
    config.train.steps = steps
    return config
