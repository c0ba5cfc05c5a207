"""Speech recognition with an encoder and CTC (Graves et al. 2006)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding.ctc import greedy
from speech_jax.decoding.decoder import Decoder
from speech_jax.evaluators.errors import Errors
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import augment, ctc
from speech_jax.rules import Rules
from speech_jax.tasks import Batch, Pytree, hearing

# How the head's parameters lie on a mesh.
RULES: Rules = ((r"head/kernel", ("fsdp", "tensor")), (r"head/bias", ("tensor",)))


class CTCModel(nn.Module):
    """An encoder and a linear layer to [B, T', vocabulary_size] float32 logits."""

    encoder: nn.Module
    vocabulary_size: int

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        hidden, lengths = self.encoder(inputs, lengths, deterministic)
        head = nn.Dense(self.vocabulary_size, dtype=hidden.dtype, name="head")
        return head(hidden).astype(jnp.float32), lengths


def _nats_and_tokens(
    logits: jax.Array, lengths: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of a batch's labels, how many they are, and the weight of what did not fit."""
    labels, labels_length = batch["labels"], batch["labels_length"]
    feasible = ctc.ctc_feasible(lengths, labels, labels_length)
    nats = ctc.ctc_loss(logits, lengths, labels, labels_length, zero_infinity=True)
    weight = jnp.where(feasible, batch["weight"], 0.0)
    tokens = (weight * labels_length.astype(jnp.float32)).sum()
    return (nats * weight).sum(), tokens, (batch["weight"] - weight).sum()


@dataclasses.dataclass(frozen=True)
class Recognize:
    """Audio to text. Label 0 is the blank; the loss is in nats, its weight is label tokens.

    Attributes:
      mixup: the share of the training utterances that are mixed with another one (augment.mixup).
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    decoder: Decoder | None = None  # None: greedy labels alone
    mixup: float = 0.0

    parts: ClassVar = {"audio": "audio", "labels": "transcript"}
    along: ClassVar = "samples"
    best: ClassVar = ("wer", "min")

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*self.encoder.rules, *RULES)

    @property
    def model(self) -> CTCModel:
        """Encoder and head; its parameters are {"encoder": ..., "head": ...}."""
        return CTCModel(self.encoder, self.counts["labels"])

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32) and model state (empty without batch norm)."""
        return hearing.init(self.model, self.frontend, rng, batch)

    def logits(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, Pytree]:
        """(logits [B, T', K], frames [B], new state); trains where there is a key."""
        (logits, lengths), state = hearing.heard(
            self.model, self.frontend, params, state, batch, rng, step
        )
        return logits, lengths, state

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """The CTC loss of rows with weight whose alignment fits; the others are counted."""
        readings = [batch]  # of the same audio
        if rng is not None and self.mixup:
            rng, key = jax.random.split(rng)
            readings = augment.mixup(key, batch, self.mixup)
        logits, lengths, state = self.logits(params, state, readings[0], rng, step)
        each = [_nats_and_tokens(logits, lengths, reading) for reading in readings]
        total, tokens, infeasible = (sum(parts) for parts in zip(*each, strict=True))
        return total, tokens, {"state": state, "sums": {"infeasible": infeasible}}

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """{"labels": int32 [B, T'], "labels_length": int32 [B]}, and what else a decoder finds."""
        logits, lengths, _ = self.logits(params, state, batch)
        if self.decoder:
            return self.decoder.search(logits, lengths)
        labels, count = greedy(logits, lengths)
        return {"labels": labels, "labels_length": count}

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances of which the encoder makes fewer frames than an alignment takes."""
        frames = self.encoder.output_lengths(self.frontend.lengths(sizes["samples"]))
        labels, needed = sizes["labels"], sizes["labels_aligned"]
        return {
            int(i): f"not alignable: {labels[i]} labels need {needed[i]} frames, the encoder makes "
            f"{frames[i]} of this audio"
            for i in np.flatnonzero(frames < needed)
        }

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss in nats a label, and the utterances whose alignment did not fit."""
        loss = sums["loss"] / max(sums["weight"], 1.0)
        return {"loss_per_label": loss, "infeasible": sums["infeasible"]}

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""

    def evaluator(self, parts: Mapping[str, Any]) -> Errors:
        """Word and character errors."""
        return Errors(parts["labels"], self.decoder)
