"""wav2vec 2.0 with Conformer layers (Gulati et al. 2020), as fairseq S2T (Wang et al. 2020) has it.

Extractor, projection and masks are those of wav2vec 2.0. The attention of the layers knows of
position, so there is no convolution for it. Parameters and batch norm's statistics map one to one
onto those of the released checkpoints (bundle/huggingface.py); there, padding reaches the output
through the depthwise convolutions, here it does not.
"""

from typing import Any, ClassVar

import flax.linen as nn

from speech_jax.models import conformer
from speech_jax.models.wav2vec2 import Wav2Vec2


class Wav2Vec2Conformer(Wav2Vec2):
    """Waveform [B, T] to hidden [B, T', width], a frame every 20 ms of 16 kHz audio.

    The settings are those of Wav2Vec2 and

    Attributes:
      kernel: taps of the depthwise convolution.
      attention: how it knows of position, 'relative' or 'rotary_input' (layers.SelfAttention).
    """

    kernel: int = 31
    attention: str = "relative"

    # Settings of Wav2Vec2 that have one value here.
    pre_norm: ClassVar = True
    position_kernel: ClassVar = 0
    position_groups: ClassVar = 0

    # Large: the two that were released differ in their attention.
    VARIANTS: ClassVar = {
        "tiny": {
            name: value
            for name, value in Wav2Vec2.VARIANTS["tiny"].items()
            if not name.startswith("position")
        }
        | {"kernel": 15},
        "large": {
            "width": 1024, "num_layers": 24, "heads": 16, "feed_forward": 4096,
            "conv_norm": "layer", "conv_bias": True,
        },
    }  # fmt: skip

    def layer_settings(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """The module of a layer, called as module(x, mask, seed, skip), and its attributes."""
        return conformer.Block, {
            "heads": self.heads,
            "kernel": self.kernel,
            "feed_forward": self.feed_forward,
            "position": self.attention,
            "conv_norm": "batch",
            "conv_bias": False,
            "conv_momentum": 0.9,  # PyTorch's 0.1
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "adapter": self.adapter,
            "dtype": self.dtype,
        }
