"""Speech recognition with a transducer (Graves 2012), also with durations (Xu et al. 2023).

config.decoder.name says how it is searched: 'transducer' (the default) takes the best label of each
step, 'transducer_beam' keeps several texts, and a decoder of CTC ('greedy', 'beam', 'lexicon')
needs a head of CTC.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding import transducer as search
from speech_jax.decoding.decoder import OF_CTC, Decoder
from speech_jax.decoding.fusion import Fusion
from speech_jax.errors import UserError
from speech_jax.evaluators.errors import Errors, Searched
from speech_jax.models import transducer as models
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import ctc, transducer, transducer_band
from speech_jax.rules import Rules, within
from speech_jax.tasks import Batch, Pytree, hearing
from speech_jax.tasks.recognize import RULES as HEAD_RULES

# What the band's loss counts beside that of the simple joint, at first and after `warmup` updates.
_SIMPLE, _BAND = (1.0, 0.5), (0.1, 1.0)
_LM_SCALE = 0.25  # see transducer.simple_joint


class Heard(NamedTuple):
    """What a model makes of a batch.

    encoded: [B, T', D] and predicted [B, U + 1, D], projections for the joiner; lengths: int32 [B],
    frames; logits: float32 [B, T', K] of CTC, or None; simple: two logits [B, T', K] and
    [B, U + 1, K], or None.
    """

    encoded: jax.Array
    predicted: jax.Array
    lengths: jax.Array
    logits: jax.Array | None
    simple: tuple[jax.Array, jax.Array] | None


class TransducerModel(nn.Module):
    """An encoder, a predictor and a joiner; a head of CTC and the simple joint where wanted."""

    encoder: nn.Module
    predictor: nn.Module
    joiner: nn.Module
    head: nn.Module | None = None
    simple: nn.Module | None = None

    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, labels: jax.Array, deterministic: bool
    ) -> Heard:
        """Labels: int32 [B, U], those of the transcript."""
        hidden, lengths = self.encoder(inputs, lengths, deterministic)
        said = self.predictor(jnp.pad(labels, ((0, 0), (1, 0))))
        encoded, predicted = self.joiner.encoded(hidden), self.joiner.predicted(said)
        if self.is_initializing():
            self.joiner(encoded[:, :1], predicted[:, :1])
        return Heard(
            encoded,
            predicted,
            lengths,
            self.head(hidden).astype(jnp.float32) if self.head else None,
            self.simple(hidden, said) if self.simple else None,
        )

    def encode(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Projections [B, T', D] for the joiner, and the frames of each row."""
        hidden, lengths = self.encoder(inputs, lengths, deterministic)
        return self.joiner.encoded(hidden), lengths

    def listen(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [B, T', K] of CTC, and the frames of each row."""
        hidden, lengths = self.encoder(inputs, lengths, deterministic)
        return self.head(hidden).astype(jnp.float32), lengths

    def advance(self, carry: Pytree, labels: jax.Array) -> tuple[jax.Array, Pytree]:
        """The predictor's projections [B, N, D] behind each of labels int32 [B, N]; the carry."""
        said, carry = self.predictor.advance(carry, labels)
        return self.joiner.predicted(said), carry

    def join(self, encoded: jax.Array, predicted: jax.Array) -> jax.Array:
        """The joiner's logits."""
        return self.joiner(encoded, predicted)


@dataclasses.dataclass(frozen=True)
class Transduce:
    """Audio to text. Label 0 is the blank; the loss is in nats, its weight is label tokens.

    Attributes:
      predictor: 'stateless' or 'recurrent'; context: labels that the first one knows.
      width: of the predictor and of the joint.
      durations: the frames that a label or a blank may take, such as (0, 1, 2, 3, 4); empty: a
        blank takes one and a label none.
      sigma: nats taken from the log probability of every step of a path, with durations.
      omega: the share of the loss without durations in the loss, with durations.
      span: positions of a frame at which the joiner is computed in training, chosen by a simple
        joint; 0: all of them. It spares time and memory where labels are many.
      warmup: updates until the band counts in full, and the transducer beside CTC: an encoder that
        hears nothing yet teaches a transducer to say nothing. With 0 they count from the start.
      ctc_weight: of CTC in the loss, by a head of its own; 0: none.
      most: labels that a search may say in a frame.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    decoder: Decoder | None = None  # None: the best label of each step
    predictor: str = "stateless"
    context: int = 2
    width: int = 256
    durations: tuple[int, ...] = ()
    sigma: float = 0.02
    omega: float = 0.1
    span: int = 0
    warmup: int = 2_000
    ctc_weight: float = 0.3
    most: int = 4

    parts: ClassVar = {"audio": "audio", "labels": "transcript"}
    along: ClassVar = "samples"
    best: ClassVar = ("wer", "min")
    searches: ClassVar = (*OF_CTC, "transducer", "transducer_beam")

    def __post_init__(self) -> None:
        distinct = {value for value in self.durations if isinstance(value, int)}
        if self.durations and (len(distinct) < len(self.durations) or not {0, 1} <= distinct):
            raise UserError(
                f"config.task.durations={tuple(self.durations)} must be whole numbers, each once, "
                "with 0 and 1 among them, so that labels that are many fit: (0, 1, 2, 3, 4) are "
                "usual"
            )
        if self.span == 1:
            raise UserError(
                "config.task.span=1 leaves no frame with a label and what follows it: give 2 or "
                "more, or 0 for all"
            )
        if self.durations and self._search == "transducer_beam":
            raise UserError(
                "a transducer with durations keeps one text: take the decoder 'transducer' "
                "(config.decoder.name, --decoder), without --beam, --nbest and --lm"
            )
        if self._search in OF_CTC:
            what = f"config.decoder.name={self._search!r}"
            cure = f"set config.decoder.name={self.usual_decoder()['name']!r}"
            hearing.check_ctc(self.ctc_weight, what, cure)

    @classmethod
    def usual_decoder(cls, **_: Any) -> dict[str, Any]:
        """What it searches by where config.decoder says nothing."""
        return {"name": "transducer"}

    @property
    def _search(self) -> str:
        return self.decoder.settings.name if self.decoder else self.usual_decoder()["name"]

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *models.RULES, *HEAD_RULES)

    @property
    def model(self) -> TransducerModel:
        """All modules; its parameters are {"encoder", "predictor", "joiner", ...}."""
        count, dtype = self.counts["labels"], getattr(self.encoder, "dtype", "float32")
        return TransducerModel(
            self.encoder,
            models.make_predictor(self.predictor, count, self.width, self.context, dtype),
            models.Joiner(self.width, count + len(self.durations), dtype),
            nn.Dense(count, dtype=dtype) if self.ctc_weight else None,
            models.Simple(count, dtype) if self.span else None,
        )

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32) and model state (empty without batch norm)."""
        return hearing.init(self.model, self.frontend, rng, batch, batch["labels"])

    def _apply(self, params, state, batch, rng, step, *labels, method):
        """What a method of the model makes of a batch, and the new state."""
        return hearing.heard(
            self.model, self.frontend, params, state, batch, rng, step, *labels, method=method
        )

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
        found, state = self._apply(params, state, batch, rng, step, method="listen")
        return *found, state

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """The loss of the transducer, and that of CTC in its share.

        A row that does not fit in the band, or no alignment of CTC, is without that part, and
        counted.
        """
        labels, labels_length = batch["labels"], batch["labels_length"]
        heard, state = self._apply(params, state, batch, rng, step, labels, method="__call__")
        ramp = jnp.ones(())
        if rng is not None and self.warmup:
            ramp = jnp.minimum(jnp.asarray(step, jnp.float32) / self.warmup, 1.0)
        nats = self._nats(params["joiner"]["logits"], heard, labels, labels_length, ramp)
        fits = jnp.isfinite(nats)
        nats = jnp.where(fits, nats, 0.0)
        if self.ctc_weight:
            args = heard.lengths, labels, labels_length
            by_ctc = ctc.ctc_loss(heard.logits, *args, zero_infinity=True)
            nats = (1 - self.ctc_weight) * ramp * nats + self.ctc_weight * by_ctc
            fits &= ctc.ctc_feasible(*args)
        weight = batch["weight"]
        tokens = (weight * labels_length.astype(jnp.float32)).sum()
        infeasible = jnp.where(fits, 0.0, weight).sum()
        return (nats * weight).sum(), tokens, {"state": state, "sums": {"infeasible": infeasible}}

    def _nats(
        self,
        output: Pytree,
        heard: Heard,
        labels: jax.Array,
        labels_length: jax.Array,
        ramp: jax.Array,
    ) -> jax.Array:
        """The transducer's loss of each row, +inf for what does not fit; ramp: 0 to 1."""
        sizes = heard.lengths, labels_length
        starts, simple = None, None
        if self.span:
            joint = transducer.simple_joint(*heard.simple, labels, _LM_SCALE)
            simple, occupancy = transducer.loss_and_occupancy(joint, *sizes)
            starts = transducer_band.band(occupancy, *sizes, self.span)
        joint = transducer.joint_log_probs(
            heard.encoded,
            heard.predicted,
            output["kernel"],
            output["bias"],
            labels,
            durations=len(self.durations),
            starts=starts,
            span=self.span,
        )
        if self.durations:
            if starts is not None:
                joint = transducer_band.spread(joint, starts, labels.shape[1] + 1)
            nats = transducer.duration_loss(joint, *sizes, self.durations, self.sigma)
            if self.omega:
                plain = transducer.transducer_loss(joint, *sizes)
                nats = (1 - self.omega) * nats + self.omega * plain
        elif starts is not None:
            nats = transducer_band.banded_loss(joint, starts, *sizes)
        else:
            nats = transducer.transducer_loss(joint, *sizes)
        if simple is None:
            return nats
        scale = lambda ends: ends[0] + (ends[1] - ends[0]) * ramp
        return scale(_BAND) * nats + scale(_SIMPLE) * simple

    def searched(self, params: Pytree) -> search.Transducer:
        """What a search asks of the model; it is given what `encode` gives."""
        model, variables = self.model, {"params": params}
        return search.Transducer(
            start=model.predictor.start,
            advance=lambda *given: model.apply(variables, *given, method="advance"),
            join=lambda *given: model.apply(variables, *given, method="join"),
            durations=tuple(self.durations),
        )

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """{"labels": int32 [B, M], "labels_length": int32 [B]}, and what else a search finds."""
        if self._search in OF_CTC:
            return self.decoder.search(*self.logits(params, state, batch)[:2])
        fusion = self.decoder.fusion if self.decoder else None
        return self.search(params, *self.project(params, state, batch), fusion)

    def project(self, params: Pytree, state: Pytree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Projections [B, T', D] of the frames for the joiner, and how many a row has."""
        return self._apply(params, state, batch, None, 0, method="encode")[0]

    def search(
        self, params: Pytree, encoded: jax.Array, lengths: jax.Array, fusion: Fusion | None = None
    ) -> dict[str, jax.Array]:
        """What `predict` gives, of what `project` gave; fusion: of 'transducer_beam'."""
        model, others = self.searched(params), {}
        if self._search == "transducer_beam":
            settings = self.decoder.settings
            found, said = search.beam(
                model,
                encoded,
                lengths,
                width=settings.width,
                nbest=settings.nbest,
                labels=settings.labels,
                fusion=fusion,
            )
            if settings.nbest > 1:
                names = ("nbest", "nbest_length", "nbest_score")
                others = dict(zip(names, found, strict=True))
        else:
            begun = search.start(model, len(encoded))
            said, _ = search.greedy(model, begun, encoded, lengths, self.most)
        return others | {
            "labels": said.labels,
            "labels_length": said.count,
            "starts": said.frames,
            "ends": said.frames + 1,
            "sure": said.sure,
            "score": said.score,
            "frames": lengths,
            "steps": said.steps,
            "bounded": said.bounded,
        }

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances of which the encoder makes no frame; labels may be more than frames."""
        return hearing.without_frames(
            self.encoder.output_lengths(self.frontend.lengths(sizes["samples"]))
        )

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss in nats a label, and the utterances that did not fit."""
        loss = sums["loss"] / max(sums["weight"], 1.0)
        return {"loss_per_label": loss, "infeasible": sums["infeasible"]}

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""

    def evaluator(self, parts: Mapping[str, Any]) -> Errors:
        """Word and character errors, and the steps of the search if it takes any."""
        measure = Errors if self._search in OF_CTC else Searched
        return measure(parts["labels"], self.decoder)
