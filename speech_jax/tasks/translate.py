"""Speech to text in another language: an encoder, a decoder of text, and CTC beside it.

The decoder learns by cross-entropy with label smoothing, and the encoder by CTC on what was spoken
too, which is what makes a decoder learn from few hours (Watanabe et al. 2017). Where a corpus has
no transcripts, config.parts.labels.tag = 'translation' has CTC learn from the translations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding import ctc as decoding
from speech_jax.decoding import generate
from speech_jax.evaluators.bleu import Bleu
from speech_jax.models.decoder import TextDecoder
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import ctc
from speech_jax.ops.masking import length_mask
from speech_jax.rules import Rules
from speech_jax.tasks import Batch, Pytree
from speech_jax.tasks.recognize import RULES

# Labels that a translation may have of no frame at all: short utterances are not cut.
_SPARE = 10


class TranslationModel(nn.Module):
    """An encoder, whose hidden frames a linear layer and a decoder of text look at."""

    encoder: nn.Module
    decoder: TextDecoder
    vocabulary_size: int

    @nn.compact
    def hear(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(hidden [B, T', D], logits of CTC float32 [B, T', vocabulary_size], frames [B])."""
        hidden, lengths = self.encoder(inputs, lengths, deterministic)
        head = nn.Dense(self.vocabulary_size, dtype=hidden.dtype, name="head")
        return hidden, head(hidden).astype(jnp.float32), lengths

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        symbols: jax.Array,
        count: jax.Array,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(logits behind each of `symbols` [B, U, V], those of CTC, frames)."""
        hidden, logits, frames = self.hear(inputs, lengths, deterministic)
        return self.decoder(symbols, count, hidden, frames, deterministic), logits, frames


@dataclasses.dataclass(frozen=True)
class Translate:
    """Audio to a translation. The loss is in nats, its weight are the symbols of translations.

    Attributes:
      layers, heads, dropout: of the decoder, whose width is that of the encoder.
      smoothing: the share of a target's probability that all symbols have.
      ctc_weight: of CTC's nats in the loss; the decoder's have the rest.
      beam: hypotheses of the search; 1: greedy.
      length_penalty: see decoding/generate.py; more of it makes longer translations.
      labels_per_frame: of a frame of the encoder, how many labels a translation has at most.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    smoothing: float = 0.1
    ctc_weight: float = 0.3
    beam: int = 5
    length_penalty: float = 0.6
    labels_per_frame: float = 2.0

    parts: ClassVar = {"audio": "audio", "labels": "transcript", "target": "transcript"}
    along: ClassVar = "samples"
    best: ClassVar = ("bleu", "max")

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*self.encoder.rules, *TextDecoder.rules, *RULES)

    @property
    def decoder_of_text(self) -> TextDecoder:
        """The decoder; its parameters are params["decoder"]."""
        return TextDecoder(
            self.counts["target"],
            width=self.encoder.width,
            num_layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
            dtype=self.encoder.dtype,
        )

    @property
    def model(self) -> TranslationModel:
        """All of it; its parameters are {"encoder": ..., "head": ..., "decoder": ...}."""
        return TranslationModel(self.encoder, self.decoder_of_text, self.counts["labels"])

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32) and model state (empty without batch norm)."""
        inputs, lengths = self.frontend(batch)
        variables = self.model.init(rng, inputs, lengths, *self._symbols(batch)[:2], True)
        params = variables.pop("params")
        return params, variables

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Both losses of rows with weight; CTC's leaves out what has no transcript or no room."""
        train = rng is not None
        keys = jax.random.split(rng) if train else (None, None)
        inputs, lengths = self.frontend(batch, keys[0], step)
        symbols, count, targets = self._symbols(batch)
        (logits, heard, frames), state = self.model.apply(
            {"params": params, **state},
            inputs,
            lengths,
            symbols,
            count,
            not train,
            rngs={"dropout": keys[1]} if train else None,
            mutable=list(state),
        )
        inside = length_mask(count, symbols.shape[1]) * batch["weight"][:, None]  # [B, U]
        nats, right = _cross_entropy(logits, targets, self.smoothing)
        written, weight = (nats * inside).sum(), inside.sum()
        spoken, sums = _spoken_nats(heard, frames, batch)
        sums |= {"written": written, "right": (right * inside).sum()}
        total = (1 - self.ctc_weight) * written + self.ctc_weight * spoken
        return total, weight, {"state": state, "sums": sums}

    def _symbols(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the decoder reads [B, U], how much of it [B], and what it is to write then [B, U].

        A row without a translation has none.
        """
        labels, length = batch["target"], batch["target_length"]
        ends = jnp.full((len(labels), 1), self.decoder_of_text.begin, labels.dtype)
        read = jnp.concatenate([ends, labels], axis=1)
        written = jnp.concatenate([labels, ends], axis=1)
        last = jnp.arange(written.shape[1])[None] == length[:, None]
        written = jnp.where(last, ends, written)
        return read, jnp.where(length > 0, length + 1, 0), written

    def logits(
        self, params: Pytree, state: Pytree, batch: Batch
    ) -> tuple[jax.Array, jax.Array, Pytree]:
        """(logits of CTC [B, T', K], frames [B], state)."""
        _, logits, frames = self._hear(params, state, batch)
        return logits, frames, state

    def _hear(self, params: Pytree, state: Pytree, batch: Batch) -> tuple[jax.Array, ...]:
        inputs, lengths = self.frontend(batch)
        model = {"params": params, **state}
        return self.model.apply(model, inputs, lengths, True, method="hear")

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """The translation: {"target": int32 [B, S], "target_length", "ended": bool [B]}.

        One that has not ended by itself is cut at `longest`. {"labels", "labels_length"} are the
        transcript, of CTC.
        """
        hidden, logits, frames = self._hear(params, state, batch)
        found = self._write(params["decoder"], hidden, frames)
        labels, count = decoding.greedy(logits, frames)
        return {
            "target": found.labels[:, 0],
            "target_length": found.count[:, 0],
            "ended": found.ended[:, 0],
            "labels": labels,
            "labels_length": count,
        }

    def _write(self, params: Pytree, hidden: jax.Array, frames: jax.Array) -> generate.Texts:
        decoder = self.decoder_of_text
        run = lambda *arguments, method: decoder.apply(
            {"params": params}, *arguments, method=method
        )
        longest = int(self.longest(hidden.shape[1]))
        carry = run(len(hidden) * self.beam, hidden, frames, longest + 1, method="start")
        limits = {
            "begin": decoder.begin,
            "limit": self.longest(frames).astype(jnp.int32),
            "longest": longest,
        }
        if self.beam == 1:
            advance = lambda carry, symbols: run(carry, symbols, method="advance")
            return generate.greedy(advance, carry, **limits)

        def advance(carry, symbols):
            logits, carry = run(carry, symbols, method="advance")
            return jax.nn.log_softmax(logits), carry

        return generate.beam(
            advance,
            carry,
            pick=decoder.pick,
            width=self.beam,
            length_penalty=self.length_penalty,
            **limits,
        )

    def longest(self, frames: Any) -> Any:
        """The labels that a translation of so many frames has at most."""
        return (self.labels_per_frame * frames) // 1 + _SPARE

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances without a translation, or with one that is longer than can be written."""
        frames = self.encoder.output_lengths(self.frontend.lengths(sizes["samples"]))
        most, count = self.longest(np.asarray(frames)), sizes["target"]
        lacking = {
            int(i): "no translation: it is absent or empty; add one"
            for i in np.flatnonzero(count < 1)
        }
        return lacking | {
            int(i): f"translation too long: {count[i]} labels, and of {frames[i]} frames "
            f"{int(most[i])} are written at most (config.task.labels_per_frame)"
            for i in np.flatnonzero(count > most)
        }

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss and the decoder's alone, in nats a symbol, its accuracy, CTC's nats a label."""
        weight = max(sums["weight"], 1.0)
        return {
            "loss_per_label": sums["loss"] / weight,
            "accuracy": sums["right"] / weight,
            "decoder_nats": sums["written"] / weight,
            "ctc_nats": sums["spoken"] / max(sums["labels"], 1.0),
            "infeasible": sums["infeasible"],
        }

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""

    def evaluator(self, parts: Mapping[str, Any]) -> Bleu:
        """BLEU and chrF2, and the errors of the transcript where one is spoken of."""
        spoken = parts["labels"]
        return Bleu(parts["target"], None if spoken.tag else spoken)


def _cross_entropy(
    logits: jax.Array, targets: jax.Array, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Nats [B, U] with label smoothing (Szegedy et al. 2016), and whether the best one is right.

    All symbols but label 0, which is never written, share `smoothing`.
    """
    log_probs = jax.nn.log_softmax(logits)  # [B, U, V]
    chosen = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[:, :, 0]
    shared = log_probs[:, :, 1:].mean(-1)
    nats = -(1 - smoothing) * chosen - smoothing * shared
    return nats, (logits.argmax(-1) == targets).astype(jnp.float32)


def _spoken_nats(
    logits: jax.Array, frames: jax.Array, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CTC's nats of the labels of a batch, and {"spoken": the same, "labels", "infeasible"}."""
    labels, length = batch["labels"], batch["labels_length"]
    feasible = ctc.ctc_feasible(frames, labels, length)
    asked = jnp.where(length > 0, batch["weight"], 0.0)
    weight = jnp.where(feasible, asked, 0.0)
    nats = ctc.ctc_loss(logits, frames, labels, length, zero_infinity=True)
    spoken = (nats * weight).sum()
    count = (weight * length.astype(jnp.float32)).sum()
    return spoken, {"spoken": spoken, "labels": count, "infeasible": (asked - weight).sum()}
