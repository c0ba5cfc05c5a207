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
from speech_jax.errors import UserError
from speech_jax.evaluators.errors import Errors
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import augment, ctc, masking
from speech_jax.rules import Rules, within
from speech_jax.tasks import Batch, Pytree, hearing

# How the head's parameters lie on a mesh.
RULES: Rules = ((r"head/kernel", ("fsdp", "tensor")), (r"head/bias", ("tensor",)))


# Settings of encoders by which two views of an utterance differ in training.
_CHANCES = (
    "dropout", "attention_dropout", "input_dropout", "layer_drop", "mask_time", "mask_channel",
)  # fmt: skip


class CTCModel(nn.Module):
    """An encoder and a linear layer to [B, T', vocabulary_size] float32 logits."""

    encoder: nn.Module
    vocabulary_size: int

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        deterministic: bool,
        middle_too: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        if middle_too:
            hidden, lengths = self.encoder(inputs, lengths, deterministic, layers_too=True)
            middle = self.encoder.num_layers // 2
            hidden = jnp.stack([hidden[:, :, middle], hidden[:, :, -1]])
        else:
            hidden, lengths = self.encoder(inputs, lengths, deterministic)
        head = nn.Dense(self.vocabulary_size, dtype=hidden.dtype, name="head")
        return head(hidden).astype(jnp.float32), lengths

    def both(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [2, B, T', vocabulary_size] of the middle layer and of the last one."""
        return self(inputs, lengths, deterministic, middle_too=True)


def _viewed(batch: Batch, views: int) -> Batch:
    """The transcript of each row, repeated for each of its views; they share its weight."""
    said = {name: batch[name] for name in ("labels", "labels_length", "weight")}
    said["weight"] = said["weight"] / views
    return jax.tree.map(lambda x: jnp.repeat(x, views, axis=0), said)


def inconsistency(logits: jax.Array, lengths: jax.Array, weight: jax.Array) -> jax.Array:
    """How far the distributions over labels of two views of each row are apart, in nats.

    It is the mean of the two Kullback-Leibler divergences, summed over frames. Each of them moves
    one view towards the other, which it does not move (Yao et al. 2024, equation 6).

    Args:
      logits: float32 [2 B, T', K], the views of a row one behind the other.
      lengths: int [2 B], frames; weight: float32 [B] of the rows.
    """
    rows, frames, labels = logits.shape
    this = jax.nn.log_softmax(logits).reshape(rows // 2, 2, frames, labels)
    other = jax.lax.stop_gradient(this[:, ::-1])
    apart = (jnp.exp(other) * (other - this)).sum(-1)  # [B, 2, T']
    valid = masking.length_mask(lengths, frames).reshape(apart.shape)
    return (jnp.where(valid, apart, 0.0).sum((1, 2)) * weight).sum() / 2


@dataclasses.dataclass(frozen=True)
class Recognize:
    """Audio to text. Label 0 is the blank; the loss is in nats, its weight is label tokens.

    Attributes:
      mixup: the share of the training utterances that are mixed with another one (augment.mixup).
      inter_ctc: the weight of the loss of the middle layer's logits, by the same head; the last
        layer's loss has the rest (intermediate CTC, Lee and Watanabe 2021).
      consistency: the weight of the consistency between two views of an utterance under masks of
        their own (CR-CTC, Yao et al. 2024); the loss is the mean of theirs. 0: one view.
      consistency_warmup: updates over which that weight rises from 0.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    decoder: Decoder | None = None  # None: greedy labels alone
    mixup: float = 0.0
    inter_ctc: float = 0.0
    consistency: float = 0.0
    consistency_warmup: int = 2_000

    parts: ClassVar = {"audio": "audio", "labels": "transcript"}
    along: ClassVar = "samples"
    best: ClassVar = ("wer", "min")

    def __post_init__(self) -> None:
        if self.inter_ctc and getattr(self.encoder, "above", ""):
            raise UserError(
                f"config.task.inter_ctc={self.inter_ctc:g} reads a layer in the middle as it reads "
                "the last one, and this encoder has more behind its last layer: set it to 0, or "
                "take a conformer"
            )
        if self.inter_ctc and self.encoder.num_layers < 2:
            raise UserError(
                f"config.task.inter_ctc={self.inter_ctc:g} needs a layer in the middle: set "
                "config.model.num_layers to 2 or more"
            )
        chances = (getattr(self.encoder, name, 0) for name in _CHANCES)
        if self.consistency and not (self.frontend.varies or any(chances)):
            raise UserError(
                f"config.task.consistency={self.consistency:g} compares two views of an utterance, "
                "and without masks and dropout they are the same: set config.spec_augment, or "
                "config.model.dropout"
            )

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *RULES)

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
        return self._logits(params, state, batch, rng, step)

    def _logits(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None,
        step: jax.Array | int,
        views: int = 1,
        method: str = "__call__",
    ) -> tuple[jax.Array, jax.Array, Pytree]:
        """As `logits`, of so many views of each row (FrontEnd), by a method of the model."""
        (logits, lengths), state = hearing.heard(
            self.model, self.frontend, params, state, batch, rng, step, views=views, method=method
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
        if rng is None or not (self.inter_ctc or self.consistency):
            logits, lengths, state = self.logits(params, state, readings[0], rng, step)
            by_layer, views = [(1.0, logits)], 1
        else:
            views, method = 1 + bool(self.consistency), "both" if self.inter_ctc else "__call__"
            logits, lengths, state = self._logits(
                params, state, readings[0], rng, step, views, method
            )
            weights = (self.inter_ctc, 1 - self.inter_ctc)
            by_layer = zip(weights, logits, strict=True) if self.inter_ctc else [(1.0, logits)]
        parts = []
        for share, logits in by_layer:
            each = [hearing.ctc_part(logits, lengths, _viewed(one, views)) for one in readings]
            nats, tokens, infeasible = (sum(some) for some in zip(*each, strict=True))
            parts.append((share, nats))
        total = sum(share * nats for share, nats in parts)
        sums = {"infeasible": infeasible}
        if self.inter_ctc:
            sums["middle"] = parts[0][1]
        if self.consistency:
            sums["inconsistency"] = jnp.zeros(())  # of one view
        if views > 1:
            rise = jnp.minimum(1.0, step / max(1, self.consistency_warmup))
            fits = ctc.ctc_feasible(lengths[::views], batch["labels"], batch["labels_length"])
            apart = inconsistency(logits, lengths, jnp.where(fits, batch["weight"], 0.0))
            total += self.consistency * rise * apart
            sums["inconsistency"] = apart
        return total, tokens, {"state": state, "sums": sums}

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
        """The loss in nats a label, its parts of CTC's variants, and what did not fit.

        Those are the middle layer's loss and how far two views are apart, without their weights.
        """
        weight = max(sums["weight"], 1.0)
        found = {"loss_per_label": sums["loss"] / weight, "infeasible": sums["infeasible"]}
        parts = ("middle", "inconsistency")
        return found | {f"{name}_per_label": sums[name] / weight for name in parts if name in sums}

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""

    def evaluator(self, parts: Mapping[str, Any]) -> Errors:
        """Word and character errors."""
        return Errors(parts["labels"], self.decoder)
