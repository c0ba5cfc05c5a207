"""Speech recognition with CTC and an attention decoder together (Watanabe et al. 2017).

Both learn from the same encoder: CTC keeps what is written in the order of what is said, which the
decoder alone learns badly from few hours, and the decoder knows what was written before. They are
searched together or apart. config.decoder.name is 'joint' (one pass, the default where there is
CTC), 'rescore' (the best texts of CTC, put in order by both), 'attention', or a decoder of CTC
('greedy', 'beam', 'lexicon').
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding import joint
from speech_jax.decoding.decoder import OF_CTC, Decoder
from speech_jax.decoding.generate import Texts
from speech_jax.evaluators.errors import Errors
from speech_jax.tasks import Batch, Pytree, hearing, writing


@dataclasses.dataclass(frozen=True)
class Attend(writing.Writes):
    """Audio to text. The loss is in nats and weighs as much as the symbols of texts, ends too."""

    decoder: Decoder = dataclasses.field(kw_only=True)

    parts: ClassVar = {"audio": "audio", "labels": "transcript"}
    text: ClassVar = "labels"
    best: ClassVar = ("wer", "min")
    searches: ClassVar = (*OF_CTC, "attention", "joint", "rescore")

    def __post_init__(self):
        if self.decoder.settings.name != "attention":
            what = f"config.decoder.name={self.decoder.settings.name!r}"
            cure = "set config.decoder.name='attention'"
            hearing.check_ctc(self.ctc_weight, what, cure)

    @classmethod
    def usual_decoder(cls, ctc_weight: float, **_: Any) -> dict[str, Any]:
        """What it searches by where config.decoder says nothing."""
        return {"name": "joint" if ctc_weight else "attention"}

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
        nats, right = writing.cross_entropy(written, labels, count, self.smoothing)
        sums = {"right": (right * weight).sum()}
        total = (1 - self.ctc_weight) * (nats * weight).sum()
        if self.ctc_weight:
            nats, _, sums["infeasible"] = hearing.ctc_part(logits, frames, batch)
            total += self.ctc_weight * nats
        return total, symbols, {"state": state, "sums": sums}

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """{"labels": int32 [B, T'], "labels_length": int32 [B]}, and what else a decoder finds.

        A text has a label a frame at most; `ended`, bool [B], says whether it ended by itself.
        """
        hidden, logits, frames = self.heard(params, state, batch)
        if self.decoder.settings.name in OF_CTC:
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
        frames = self.encoder.output_lengths(self.frontend.lengths(sizes["samples"]))
        lacking = self.by_ctc.unusable({**sizes, "labels_aligned": needed})
        return hearing.without_frames(frames) | lacking

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss in nats a symbol, the share of symbols that the decoder finds, what CTC lacks.

        Without CTC, nothing is said of it.
        """
        weight = max(sums["weight"], 1.0)
        found = {"loss_per_label": sums["loss"] / weight, "accuracy": sums["right"] / weight}
        if "infeasible" in sums:
            found["infeasible"] = sums["infeasible"]
        return found

    def evaluator(self, parts: Mapping[str, Any]) -> Errors:
        """Word and character errors."""
        return Errors(parts["labels"], self.decoder)
