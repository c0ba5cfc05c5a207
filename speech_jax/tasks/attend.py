"""Speech recognition with CTC and an attention decoder together (Watanabe et al. 2017).

Both learn from the same encoder: CTC keeps what is written in the order of what is said, which the
decoder alone learns from few hours badly, and the decoder knows what is written before. What they
say is searched together, or apart: config.decoder.name is 'joint' (one pass), 'rescore' (the best
texts of CTC, put in order by both), 'attention', or a decoder of CTC ('greedy', 'beam', 'lexicon').
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding import joint
from speech_jax.decoding.decoder import Decoder
from speech_jax.decoding.generate import Texts
from speech_jax.errors import UserError
from speech_jax.evaluators.errors import Errors
from speech_jax.models.decoder import TextDecoder
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import ctc
from speech_jax.rules import Rules
from speech_jax.tasks import Batch, Pytree, hearing, writing
from speech_jax.tasks.recognize import Recognize


@dataclasses.dataclass(frozen=True)
class Attend:
    """Audio to text. The loss is in nats, its weight are the symbols of texts, an end each.

    Attributes:
      layers, heads, dropout: of the decoder, whose width is that of the encoder.
      ctc_weight: of CTC in the loss, and the rest the decoder's. With 0 there is no CTC; with 1 the
        decoder learns nothing.
      smoothing: the share of a target's probability that all symbols have.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    decoder: Decoder
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    ctc_weight: float = 0.3
    smoothing: float = 0.1

    parts: ClassVar = {"audio": "audio", "labels": "transcript"}
    along: ClassVar = "samples"
    best: ClassVar = ("wer", "min")
    searches: ClassVar = ("attention", "joint", "rescore")  # beside those of CTC

    def __post_init__(self):
        if not self.ctc_weight and self.decoder.settings.name != "attention":
            raise UserError(
                f"config.decoder.name={self.decoder.settings.name!r} needs CTC, which "
                "config.task.ctc_weight=0 leaves out: set config.decoder.name='attention'"
            )

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*self.encoder.rules, *writing.RULES)

    @property
    def writer(self) -> TextDecoder:
        """The decoder of text; its parameters are params["decoder"]."""
        return TextDecoder(
            self.counts["labels"],
            width=self.encoder.width,
            num_layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
            dtype=self.encoder.dtype,
        )

    @property
    def model(self) -> writing.WritingModel:
        """All of it; its parameters are {"encoder": ..., "head": ..., "decoder": ...}."""
        classes = self.counts["labels"] if self.ctc_weight else 0
        return writing.WritingModel(self.encoder, self.writer, classes)

    @property
    def _by_ctc(self) -> Recognize:
        """The same model without its decoder."""
        return Recognize(self.encoder, self.frontend, self.counts, self.decoder)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32) and model state (empty without batch norm)."""
        texts = batch["labels"], batch["labels_length"]
        return hearing.init(self.model, self.frontend, rng, batch, *texts)

    def logits(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, Pytree]:
        """(logits of CTC [B, T', K], frames [B], new state); trains where there is a key.

        Raises:
          UserError: there is no CTC.
        """
        if not self.ctc_weight:
            raise UserError(
                "this model has no CTC (config.task.ctc_weight=0), so that no logits of frames can "
                "be had of it: train with more weight, or use config.decoder.name='attention'"
            )
        return self._by_ctc.logits(params, state, batch, rng, step)

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Both losses of rows with weight; CTC's leaves out what does not fit, and counts it."""
        labels, count = batch["labels"], batch["labels_length"]
        (written, logits, frames), state = hearing.heard(
            self.model, self.frontend, params, state, batch, rng, step, labels, count
        )
        weight = batch["weight"]
        symbols = (weight * (count + 1).astype(jnp.float32)).sum()
        sums, total = {}, jnp.zeros(())
        if self.ctc_weight < 1:
            nats, right = writing.cross_entropy(written, labels, count, self.smoothing)
            sums["right"] = (right * weight).sum()
            total += (1 - self.ctc_weight) * (nats * weight).sum()
        if self.ctc_weight:
            fits = jnp.where(ctc.ctc_feasible(frames, labels, count), weight, 0.0)
            nats = ctc.ctc_loss(logits, frames, labels, count, zero_infinity=True)
            sums["infeasible"] = (weight - fits).sum()
            total += self.ctc_weight * (nats * fits).sum()
        return total, symbols, {"state": state, "sums": sums}

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """{"labels": int32 [B, T'], "labels_length": int32 [B]}, and what else a decoder finds.

        A text has a label a frame at most; `ended`, bool [B], says whether it ended by itself.
        """
        inputs, lengths = self.frontend(batch)
        hidden, logits, frames = self.model.apply(
            {"params": params, **state}, inputs, lengths, True, method="hear"
        )
        if self.decoder.settings.name not in self.searches:
            return self.decoder.search(logits, frames)
        texts = self._search(params["decoder"], hidden, logits, frames)
        return self.decoder.written(texts, frames, logits)

    def _search(
        self, params: Pytree, hidden: jax.Array, logits: jax.Array | None, frames: jax.Array
    ) -> Texts:
        """What is written of hidden [B, T', D] and the logits of CTC [B, T', K]."""
        settings, decoder = self.decoder.settings, self.writer
        common = {"width": settings.width, "nbest": settings.nbest}
        if settings.name == "rescore":
            written = functools.partial(writing.log_probability, decoder, params, hidden, frames)
            weight = {"weight": settings.ctc_weight, "labels": settings.labels}
            return joint.rescore(written, logits, frames, **common, **weight)
        longest = hidden.shape[1]
        advance, carry = writing.stepwise(
            decoder, params, hidden, frames, width=settings.width, longest=longest
        )
        return joint.search(
            advance,
            carry,
            logits,
            frames,
            weight=settings.ctc_weight if settings.name == "joint" else 0.0,
            pick=decoder.pick,
            begin=decoder.begin,
            limit=frames,
            longest=longest,
            length_penalty=settings.length_penalty,
            **common,
        )

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances of which the encoder makes fewer frames than their labels take."""
        needed = sizes["labels_aligned" if self.ctc_weight else "labels"]
        return self._by_ctc.unusable({**sizes, "labels_aligned": needed})

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss in nats a symbol, the share of symbols that the decoder finds, what CTC lacks.

        A decoder or CTC that does not learn has no figure.
        """
        weight = max(sums["weight"], 1.0)
        found = {"loss_per_label": sums["loss"] / weight}
        if "right" in sums:
            found["accuracy"] = sums["right"] / weight
        if "infeasible" in sums:
            found["infeasible"] = sums["infeasible"]
        return found

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""

    def evaluator(self, parts: Mapping[str, Any]) -> Errors:
        """Word and character errors."""
        return Errors(parts["labels"], self.decoder)
