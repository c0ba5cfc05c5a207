"""Whether two utterances are of one speaker: embeddings that tell apart speakers never heard.

  python -m speech_jax.main --config=configs/verification.py:runs/pretrained \\
      --workdir=runs/verification --config.data.root=/data/LibriSpeech

The argument is what to start from, as in configs/speaker_id.py. The head learns the speakers of
train-clean-5 with an additive angular margin (ArcFace, Deng et al. 2019; 0.2 and a scale of 30 as
is usual for speakers), over attentive statistics of the frames; the pairs of all utterances of the
other speakers of dev-clean-5 are told apart by the cosines of their embeddings.
--config.task.trials=FILE compares the pairs of a file.
"""

from configs import speaker_id
from speech_jax import tasks


def get_config(encoder: str = ""):
    config = speaker_id.get_config(encoder)
    config.data.train_splits = "train-clean-5[:90%]"
    # What picks the checkpoint are voices of training; what is reported are others.
    config.data.eval_splits = "train-clean-5[90%:]"
    config.data.test_splits = "dev-clean-5"
    config.parts = {"target": {"tag": "speaker", "unseen": True}}
    config.task = tasks.settings(
        "classify",
        pooling="attentive",
        standardize=True,
        units=192,
        activation="none",
        dropout=0.1,
        margin=0.2,
        verify=True,
    )
    return config
