"""Speech to text in another language: an encoder, a decoder of text, and CTC beside it.

The decoder learns by cross-entropy with label smoothing, and the encoder by CTC on what was spoken
too, which is what makes a decoder learn from few hours (Watanabe et al. 2017). Where a corpus has
no transcripts, config.parts.labels.tag = 'translation' has CTC learn from the translations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding import ctc as decoding
from speech_jax.decoding import generate
from speech_jax.decoding.decoder import Decoder
from speech_jax.evaluators.bleu import Bleu
from speech_jax.tasks import Batch, Pytree, hearing, writing

# Labels that a translation may have beside those of its frames, so that no short one is cut.
_SPARE = 10


@dataclasses.dataclass(frozen=True)
class Translate(writing.Writes):
    """Audio to a translation. Its loss is in nats and weighs as much as the symbols written.

    Attributes:
      decoder: how translations are searched; what is spoken is the best path of CTC.
      labels_per_frame: of a frame of the encoder, how many labels a translation has at most.
    """

    decoder: Decoder = dataclasses.field(kw_only=True)
    labels_per_frame: float = 2.0

    parts: ClassVar = {"audio": "audio", "labels": "transcript", "target": "transcript"}
    text: ClassVar = "target"
    best: ClassVar = ("bleu", "max")
    searches: ClassVar = ("attention",)
    translates: ClassVar = "target"  # the part that a prediction is a translation of

    @classmethod
    def usual_decoder(cls, **_: Any) -> dict[str, Any]:
        """What it searches by where config.decoder says nothing."""
        return {"name": "attention", "width": 5, "length_penalty": 0.6}

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Both losses of the rows with weight.

        The decoder's leaves out a row without a translation; CTC's leaves out a row without a
        transcript, and one that does not fit, which is counted.
        """
        target, count = batch["target"], batch["target_length"]
        (logits, heard, frames), state = hearing.heard(
            self.model, self.frontend, params, state, batch, rng, step, target, count
        )
        nats, right = writing.cross_entropy(logits, target, count, self.smoothing)
        weight = jnp.where(count > 0, batch["weight"], 0.0)
        symbols = (weight * (count + 1).astype(jnp.float32)).sum()
        written = (nats * weight).sum()
        sums = {"written": written, "right": (right * weight).sum()}
        total = (1 - self.ctc_weight) * written
        if self.ctc_weight:
            asked = jnp.where(batch["labels_length"] > 0, batch["weight"], 0.0)
            spoken = hearing.ctc_part(heard, frames, batch | {"weight": asked})
            names = ("spoken", "labels", "infeasible")
            sums |= zip(names, spoken, strict=True)
            total += self.ctc_weight * spoken[0]
        return total, symbols, {"state": state, "sums": sums}

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """The translation: {"target": int32 [B, S], "target_length", "sure", "score", "ended"}.

        One that has not `ended` by itself, bool [B], is cut at `longest`. `sure` is the geometric
        mean of the probabilities of its symbols. {"labels", "labels_length"} are the transcript,
        where there is CTC, and "nbest", "nbest_length" and "nbest_score" the best translations,
        where more than one is wanted.
        """
        settings = self.decoder.settings
        penalty = settings.length_penalty if settings.width > 1 else 0.0
        hidden, logits, frames = self.heard(params, state, batch)
        texts = self._search(params["decoder"], hidden, frames)
        found = {
            "target": texts.labels[:, 0],
            "target_length": texts.count[:, 0],
            "sure": generate.confidence(texts, penalty),
            "score": texts.score[:, 0],
            "ended": texts.ended[:, 0],
        }
        if settings.nbest > 1:
            others = {"nbest": texts.labels, "nbest_length": texts.count}
            found |= others | {"nbest_score": texts.score}
        if logits is None:
            return found
        labels, count = decoding.greedy(logits, frames)
        return found | {"labels": labels, "labels_length": count}

    def _search(self, params: Pytree, hidden: jax.Array, frames: jax.Array) -> generate.Texts:
        longest, settings = int(self.longest(hidden.shape[1])), self.decoder.settings
        advance, carry = writing.stepwise(
            self.writer, params, hidden, frames, width=settings.width, longest=longest
        )
        limit = jnp.where(frames > 0, self.longest(frames).astype(jnp.int32), 0)
        common = {"begin": self.writer.begin, "limit": limit, "longest": longest}
        if settings.width == 1:
            return generate.greedy(advance, carry, **common)
        return generate.beam(
            advance,
            carry,
            **common,
            pick=self.writer.pick,
            width=settings.width,
            nbest=settings.nbest,
            length_penalty=settings.length_penalty,
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
        return (
            lacking
            | hearing.without_frames(frames)
            | {
                int(i): f"translation too long: {count[i]} labels, and of {frames[i]} frames "
                f"{int(most[i])} are written at most (config.task.labels_per_frame)"
                for i in np.flatnonzero(count > most)
            }
        )

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss and the decoder's own in nats a symbol, the share of symbols that it finds.

        Where there is CTC, also its nats a label, and the utterances that did not fit.
        """
        weight = max(sums["weight"], 1.0)
        found = {
            "loss_per_label": sums["loss"] / weight,
            "accuracy": sums["right"] / weight,
            "decoder_nats": sums["written"] / weight,
        }
        if "spoken" in sums:
            found["ctc_nats"] = sums["spoken"] / max(sums["labels"], 1.0)
            found["infeasible"] = sums["infeasible"]
        return found

    def evaluator(self, parts: Mapping[str, Any]) -> Bleu:
        """BLEU and chrF2, and the errors of the transcript where one is spoken of."""
        spoken = parts["labels"]
        said = bool(self.ctc_weight) and not spoken.tag
        return Bleu(parts["target"], spoken if said else None)
