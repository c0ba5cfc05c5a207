"""What tasks share that write text with a decoder: the model, the loss, the search.

A text of N labels is learned as N + 1 symbols: the decoder reads `begin` and the labels, and is to
write the labels and `begin`, which ends the text (models/decoder.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speech_jax.decoding.generate import Advance
from speech_jax.models.decoder import TextDecoder
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import masking
from speech_jax.rules import Rules, within
from speech_jax.tasks import Batch, Pytree, hearing, recognize

# How the head's and the decoder's parameters lie on a mesh.
RULES: Rules = (*recognize.RULES, *within("decoder", TextDecoder.rules))


class WritingModel(nn.Module):
    """An encoder, and over its hidden frames a linear layer for CTC and a decoder of text.

    `vocabulary_size` is of CTC; 0: there is none, and no logits.
    """

    encoder: nn.Module
    decoder: TextDecoder
    vocabulary_size: int

    def setup(self):
        if self.vocabulary_size:
            self.head = nn.Dense(self.vocabulary_size, dtype=self.encoder.dtype)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        labels: jax.Array,
        labels_length: jax.Array,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """(logits [B, N + 1, V] of the symbols of a text, of CTC [B, T', K], frames [B]).

        Args:
          labels: int32 [B, N]; labels_length: int32 [B].
        """
        hidden, logits, frames = self.hear(inputs, lengths, deterministic)
        read = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=self.decoder.begin)
        written = self.decoder(read, labels_length + 1, hidden, frames, deterministic)
        return written, logits, frames

    def hear(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """(hidden [B, T', D], logits of CTC float32 [B, T', K], frames [B])."""
        hidden, frames = self.encoder(inputs, lengths, deterministic)
        logits = self.head(hidden).astype(jnp.float32) if self.vocabulary_size else None
        return hidden, logits, frames


@dataclasses.dataclass(frozen=True)
class Writes:
    """The base of tasks that write one of their parts with a decoder, with CTC beside it.

    Attributes:
      layers, heads, dropout: of the decoder, whose width is that of the encoder.
      ctc_weight: of CTC in the loss, below 1; the decoder has the rest. With 0 there is no CTC.
      smoothing: the share of a target's probability that all symbols have.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    ctc_weight: float = 0.3
    smoothing: float = 0.1

    along: ClassVar = "samples"
    text: ClassVar[str]  # the part that the decoder writes

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *RULES)

    @property
    def writer(self) -> TextDecoder:
        """The decoder of text; its parameters are params["decoder"]."""
        return TextDecoder(
            self.counts[self.text],
            width=self.encoder.width,
            num_layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
            dtype=self.encoder.dtype,
        )

    @property
    def model(self) -> WritingModel:
        """All of it; its parameters are {"encoder": ..., "head": ..., "decoder": ...}."""
        classes = self.counts["labels"] if self.ctc_weight else 0
        return WritingModel(self.encoder, self.writer, classes)

    @property
    def by_ctc(self) -> recognize.Recognize:
        """The same model without its decoder."""
        return recognize.Recognize(self.encoder, self.frontend, self.counts)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32) and model state (empty without batch norm)."""
        texts = batch[self.text], batch[f"{self.text}_length"]
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
        hearing.check_ctc(self.ctc_weight, "what reads logits of frames")
        return self.by_ctc.logits(params, state, batch, rng, step)

    def heard(
        self, params: Pytree, state: Pytree, batch: Batch
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """As WritingModel.hear, of the audio of a batch, without training."""
        found, _ = hearing.heard(
            self.model, self.frontend, params, state, batch, None, 0, method="hear"
        )
        return found

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""


def cross_entropy(
    logits: jax.Array, labels: jax.Array, labels_length: jax.Array, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """(nats [B], symbols that were found [B]) of texts, each of labels_length + 1 symbols.

    All symbols but label 0, which is never written, share `smoothing` (Szegedy et al. 2016).

    Args:
      logits: [B, N + 1, V] as of WritingModel; labels: int32 [B, N]; labels_length: int32 [B].
    """
    end = logits.shape[-1] - 1
    places = jnp.arange(logits.shape[1])[None]
    targets = jnp.pad(labels, ((0, 0), (0, 1)))
    targets = jnp.where(places == labels_length[:, None], end, targets)
    log_probs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probs, targets[:, :, None], axis=2)[:, :, 0]
    nats = -(1 - smoothing) * own - smoothing * log_probs[:, :, 1:].mean(-1)
    inside = masking.length_mask(labels_length + 1, logits.shape[1])
    right = inside & (logits.argmax(-1) == targets)
    return jnp.where(inside, nats, 0).sum(1), right.sum(1, dtype=jnp.float32)


def log_probability(
    decoder: TextDecoder,
    params: Pytree,
    hidden: jax.Array,
    frames: jax.Array,
    labels: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """What a decoder gives texts, float32 [B]; each has count [B] of its labels int32 [B, N]."""
    read = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=decoder.begin)
    logits = decoder.apply({"params": params}, read, count + 1, hidden, frames, True)
    return -cross_entropy(logits, labels, count, 0.0)[0]


def stepwise(
    decoder: TextDecoder,
    params: Pytree,
    hidden: jax.Array,
    frames: jax.Array,
    *,
    width: int,
    longest: int,
) -> tuple[Advance, Any]:
    """A decoder as decoding/generate.py wants it: `advance`, and the carry of `width` texts a row.

    Args:
      hidden: [B, T', D]; frames: int32 [B]; longest: labels of a text at most.
    """

    def run(method: str) -> Callable:
        return lambda *arguments: decoder.apply({"params": params}, *arguments, method=method)

    def advance(carry: Any, symbols: jax.Array) -> tuple[jax.Array, Any]:
        logits, carry = run("advance")(carry, symbols)
        return jax.nn.log_softmax(logits), carry

    return advance, run("start")(width * hidden.shape[0], hidden, frames, longest + 1)
