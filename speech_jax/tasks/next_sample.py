"""The next sample of a waveform (WaveNet, van den Oord et al. 2016): pretraining that can be heard.

The loss is in nats a sample, over all samples of a crop; the first ones are foretold from silence.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.evaluators.bits import Bits
from speech_jax.models.frontend import FrontEnd
from speech_jax.models.waveform import SampleModel, generate
from speech_jax.ops import features, waveform
from speech_jax.rules import Rules, within
from speech_jax.tasks import Batch, Pytree


@dataclasses.dataclass(frozen=True)
class NextSample:
    """Each sample from those before it, and from log-mel if it is conditioned on it.

    Attributes:
      encoder, frontend: a wavenet_waveform, and a front end that leaves waveforms as they are.
      counts: how many speakers there are, by the name of the part.
      mel: whether the log-mel of the audio is known to the model, as a vocoder's is.
      mixtures: logistics of a sample's distribution, where the encoder hears 16 bits.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    mel: bool = False
    mixtures: int = 10

    parts: ClassVar = {"audio": "crop"}
    along: ClassVar = "samples"
    augments: ClassVar = False
    best: ClassVar = ("bits_per_sample", "min")

    def __post_init__(self) -> None:
        if not hasattr(self.encoder, "samples"):
            raise UserError(
                f"the next_sample task needs an encoder of single samples, not a "
                f"{type(self.encoder).__name__}: set config.model to one of wavenet_waveform"
            )
        if self.frontend.normalize != "none":
            raise UserError(
                f"config.features.normalize={self.frontend.normalize!r} changes the samples that "
                "are foretold: set it to 'none'"
            )
        if self.mixtures < 1:
            raise UserError(f"config.task.mixtures={self.mixtures} must be 1 or more")

    @property
    def model(self) -> SampleModel:
        """Its parameters are {"encoder", "head"}, and "condition" where it is conditioned."""
        outputs = waveform.CLASSES if self.encoder.bits == 8 else 3 * self.mixtures
        hop = self._geometry()[1] if self.mel else 0
        return SampleModel(self.encoder, outputs, hop, self.counts.get("speaker", 0))

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *SampleModel.rules)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32); there is no model state."""
        _, previous, given = self._prepare(batch)
        return self.model.init(rng, previous, True, *given)["params"], {}

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Nats over all samples of rows with weight."""
        del step
        nats, samples = self._nats(params, batch, rng)
        total, count = ((batch["weight"] * each).sum() for each in (nats, samples))
        return total, count, {"state": state, "sums": {}}

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """How well each row is foretold: its nats [B] and the number of its samples [B]."""
        del state
        nats, samples = self._nats(params, batch)
        return {"nats": nats, "samples": samples}

    def generate(self, params: Pytree, state: Pytree, batch: Batch, rng: jax.Array) -> jax.Array:
        """Waveforms [B, T] drawn anew, by the batch's log-mel and speakers if conditioned."""
        del state
        _, previous, given = self._prepare(batch)
        rows, samples = previous.shape
        return generate(self.model, params, rng, samples, *given, rows=rows)

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances that are too short for a frame of log-mel, or of the encoder."""
        shortest = max(self._geometry()[0] if self.mel else 0, self.encoder.hop)
        short = np.flatnonzero(np.asarray(sizes["samples"]) < shortest)
        return {int(i): "too short: not a frame" for i in short}

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss in nats a sample, and the same in bits."""
        nats = sums["loss"] / max(sums["weight"], 1.0)
        return {"loss": nats, "bits_per_sample": nats / math.log(2)}

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing ends such a run."""
        del figures, step

    def evaluator(self, parts: Mapping[str, Any]) -> Bits:
        """Bits a sample."""
        del parts
        return Bits()

    def _geometry(self) -> tuple[int, int]:
        """Window and hop of log-mel, in samples."""
        names = ("sample_rate", "window_ms", "hop_ms")
        return features.frame_geometry(*(self.frontend.log_mel[name] for name in names))

    def _prepare(self, batch: Batch) -> tuple[jax.Array, jax.Array, tuple]:
        """(waveform [B, T], the same a sample late, what the model is given besides)."""
        audio, _ = self.frontend(batch)
        previous = jnp.pad(audio, ((0, 0), (1, 0)))[:, :-1]
        mels, frames = self.frontend.features(batch) if self.mel else (None, None)
        return audio, previous, (mels, frames, batch.get("speaker"))

    def _nats(
        self, params: Pytree, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Nats [B] of all valid samples of each row, and their number [B]."""
        audio, previous, given = self._prepare(batch)
        rngs = None if rng is None else {"dropout": rng}
        outputs = self.model.apply({"params": params}, previous, rng is None, *given, rngs=rngs)
        nats = waveform.class_nats if self.encoder.bits == 8 else waveform.logistics_nats
        lengths = batch["audio_length"]
        return waveform.masked_sum(nats(outputs, audio), lengths), lengths.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class NextSampleOfSpeakers(NextSample):
    """The same by the speaker too, a tag of the corpus (config.parts.speaker.tag='speaker')."""

    parts: ClassVar = {"audio": "crop", "speaker": "category"}
