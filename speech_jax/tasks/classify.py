"""One class for an utterance, over any encoder: who speaks, with which accent, how they feel.

The frames of the encoder are pooled over an utterance, go through a dense layer if there is one,
and are classified. Parameters are named as in the classification heads of Hugging Face: `projector`
is the dense layer, `classifier` gives the classes, `layer_weights` mix the layers of the encoder.
What the classifier sees is the embedding that utterances are compared by.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.evaluators.accuracy import Accuracy
from speech_jax.evaluators.verification import Verification, read_trials
from speech_jax.models import layers
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import augment, masking
from speech_jax.rules import Rules, within
from speech_jax.tasks import Batch, Pytree, hearing

# How the head's parameters lie on a mesh; there may be any number of classes.
RULES: Rules = (
    (r"projector/kernel", ("fsdp", "tensor")),
    (r"projector/bias", ("tensor",)),
    (r"classifier/kernel", ("fsdp", None)),
    (r"classifier/bias", ()),
    (r"attention_(units|score)/(kernel|bias)", ()),
    (r"layer_weights", ()),
    (r"pooled_norm/(scale|bias)", ()),
)
_ATTENTION_UNITS = 64


class ClassModel(nn.Module):
    """An encoder and its head: [B, ...] inputs to embeddings [B, E] and scores [B, classes].

    Scores are logits, or with `cosine` the cosines between the embedding and a vector for each
    class. Everything behind the encoder is float32.
    """

    encoder: nn.Module
    classes: int
    pooling: str
    units: int
    activation: str
    dropout: float
    cosine: bool
    layer_sum: bool
    standardize: bool

    def setup(self):
        if self.layer_sum:
            shape = (self.encoder.num_layers + 1,)
            self.layer_weights = self.param("layer_weights", nn.initializers.zeros, shape)
        if self.pooling == "attentive":
            self.attention_units = nn.Dense(_ATTENTION_UNITS)
            self.attention_score = nn.Dense(1)
        if self.standardize:
            self.pooled_norm = layers.MaskedBatchNorm(momentum=0.95)
        if self.units:
            self.projector = nn.Dense(self.units)
        self.classifier = Cosine(self.classes) if self.cosine else nn.Dense(self.classes)

    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        return self.head(*self.encode(inputs, lengths, deterministic), deterministic)

    def encode(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """What the head is given: hidden [B, T', D], or of all layers [B, T', L, D]; lengths."""
        return self.encoder(inputs, lengths, deterministic, layers_too=self.layer_sum)

    def head(
        self, hidden: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(embedding [B, E], scores [B, classes]) of what `encode` returns."""
        if self.layer_sum:
            mix = jax.nn.softmax(self.layer_weights)[None, None, :, None]
            hidden = (hidden.astype(jnp.float32) * mix).sum(2)
        pooled = self._pool(hidden.astype(jnp.float32), lengths)
        if self.standardize:  # an utterance is a frame of its own; filler rows have none
            mask = (lengths > 0)[:, None]
            pooled = self.pooled_norm(pooled[:, None], mask, deterministic)[:, 0]
        embedding = self.projector(pooled) if self.units else pooled  # [B, E]
        if self.units and self.activation == "relu":
            embedding = nn.relu(embedding)
        seed = None
        if not deterministic:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        return embedding, self.classifier(layers.dropout(embedding, self.dropout, seed))

    def _pool(self, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
        """Frames [B, T, D] to [B, D] (mean) or [B, 2 D] (mean and standard deviation)."""
        mask = masking.length_mask(lengths, hidden.shape[1])[:, :, None]
        weights = mask.astype(jnp.float32) / jnp.maximum(lengths, 1)[:, None, None]
        if self.pooling == "attentive":
            # Attentive statistics (Okabe et al. 2018). Finite, for rows without a frame.
            scores = self.attention_score(nn.tanh(self.attention_units(hidden)))
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=1) * mask
        mean = (weights * hidden).sum(1)
        if self.pooling == "mean":
            return mean
        variance = (weights * jnp.square(hidden - mean[:, None])).sum(1)
        return jnp.concatenate([mean, jnp.sqrt(variance + 1e-5)], axis=-1)


class Cosine(nn.Module):
    """Cosines [B, classes] between embeddings [B, E] and a learned vector for each class."""

    classes: int

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        shape = (embedding.shape[-1], self.classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return unit(embedding, axis=-1) @ unit(kernel, axis=0)


def unit(x: jax.Array, axis: int) -> jax.Array:
    """Vectors along an axis, each divided by its length."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis, keepdims=True), 1e-12))


@dataclasses.dataclass(frozen=True)
class Classify:
    """Audio to one class of an utterance. The loss is in nats, its weight is that of its class.

    Attributes:
      layer_sum: whether the head gets a sum of all layers of the encoder, with learned weights
        (their softmax is of `layer_weights`, the input of the first layer first).
      pooling: of the frames of an utterance: their 'mean', 'statistics' (mean and standard
        deviation), or 'attentive' statistics, where a frame's weight is learned.
      standardize: whether what is pooled has its mean and variance over utterances taken out (batch
        normalization, with a scale and a bias that are learned): what all utterances have in common
        is most of it, and a head learns faster without.
      units: of the dense layer between pooling and classes; 0: there is none.
      activation: behind the dense layer, 'relu' or 'none'.
      dropout: on what the classifier sees.
      smoothing: the share of the target that is spread over all classes (Szegedy et al. 2016).
      mixup: the share of the training utterances that are mixed with another one (augment.mixup).
      balance: classes weigh as their number of examples to the power of minus this: 0 is alike, 1
        gives all classes the same weight in the loss.
      margin: added to the angle between an embedding and its class in training, in radians
        (ArcFace, Deng et al. 2019); classes are then compared by cosines times `scale`. 0: plain
        logits.
      verify: whether pairs of utterances are compared in evaluations (evaluators/verification.py),
        rather than classes: of `trials`, a file of pairs, or of all utterances; scores are also
        normalized by the nearest `cohort` classes.
    """

    encoder: nn.Module
    frontend: FrontEnd
    counts: Mapping[str, int]
    examples: Mapping[str, Sequence[int]]
    layer_sum: bool = False
    pooling: str = "mean"
    standardize: bool = False
    units: int = 0
    activation: str = "relu"
    dropout: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    balance: float = 0.0
    margin: float = 0.0
    scale: float = 30.0
    verify: bool = False
    trials: str = ""
    cohort: int = 20

    parts: ClassVar = {"audio": "audio", "target": "category"}
    along: ClassVar = "samples"
    of_use: ClassVar = ("trials",)

    def __post_init__(self):
        if self.balance and not self.examples.get("target"):
            raise UserError(
                "config.task.balance needs the number of examples of each class, which this model "
                "does not know: set it to 0"
            )

    @property
    def best(self) -> tuple[str, str]:
        """What of a split picks a model."""
        return ("eer", "min") if self.verify else ("accuracy", "max")

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *RULES)

    @property
    def model(self) -> ClassModel:
        """Encoder and head; its parameters are {"encoder": ..., "classifier": ..., ...}."""
        return ClassModel(
            self.encoder,
            classes=self.counts["target"],
            pooling=self.pooling,
            units=self.units,
            activation=self.activation,
            dropout=self.dropout,
            cosine=self.margin > 0,
            layer_sum=self.layer_sum,
            standardize=self.standardize,
        )

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Parameters (float32) and model state (empty without batch norm)."""
        return hearing.init(self.model, self.frontend, rng, batch)

    def _apply(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, Pytree]:
        """(embeddings [B, E], scores [B, K], new state); trains where there is a key.

        The batch holds audio, or what `encode` made of it.
        """
        if "hidden" in batch:
            key = None if rng is None else jax.random.split(rng)[1]
            arguments = batch["hidden"], batch["hidden_length"]
            found = hearing.applied(self.model, params, state, key, *arguments, method="head")
        else:
            found = hearing.heard(self.model, self.frontend, params, state, batch, rng, step)
        (embedding, scores), state = found
        return embedding, scores, state

    def encode(self, params: Pytree, state: Pytree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What the head is given of audio, for batches that hold it as `hidden` (hidden.py)."""
        arguments = self.frontend(batch)
        return self.model.apply({"params": params, **state}, *arguments, True, method="encode")

    def loss(
        self,
        params: Pytree,
        state: Pytree,
        batch: Batch,
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Cross-entropy over rows with a known class."""
        readings = [batch]  # of the same audio
        if rng is not None and self.mixup:
            rng, key = jax.random.split(rng)
            readings = augment.mixup(key, batch, self.mixup)
        _, scores, state = self._apply(params, state, readings[0], rng, step)
        each = [self._reading(scores, reading, rng is not None) for reading in readings]
        total, weight, correct, known = (sum(parts) for parts in zip(*each, strict=True))
        return total, weight, {"state": state, "sums": {"correct": correct, "known": known}}

    def _reading(self, scores: jax.Array, batch: Batch, train: bool) -> tuple[jax.Array, ...]:
        """(nats, their weight, rows that are right, rows whose class is known): sums over rows."""
        known = jnp.where(batch["target"] >= 0, batch["weight"], 0.0)
        targets = jax.nn.one_hot(batch["target"], self.counts["target"])  # [B, K]
        logits = self._logits(scores, targets if train else jnp.zeros_like(targets))
        spread = (1 - self.smoothing) * targets + self.smoothing / self.counts["target"]
        nats = -(spread * jax.nn.log_softmax(logits)).sum(-1)
        weight = known * (targets * self._class_weights()[None]).sum(-1)
        right = (scores.argmax(-1) == batch["target"]).astype(jnp.float32)
        return (nats * weight).sum(), weight.sum(), (right * known).sum(), known.sum()

    def _logits(self, scores: jax.Array, targets: jax.Array) -> jax.Array:
        """Logits [B, K] of scores, with the margin where one-hot `targets` [B, K] say."""
        if not self.margin:
            return scores
        sine = jnp.sqrt(jnp.clip(1 - jnp.square(scores), 1e-12, 1.0))
        moved = scores * math.cos(self.margin) - sine * math.sin(self.margin)
        # Beyond pi the cosine would grow again: from there on it falls in a line.
        straight = scores - self.margin * math.sin(self.margin)
        moved = jnp.where(scores > -math.cos(self.margin), moved, straight)
        return self.scale * jnp.where(targets > 0, moved, scores)

    def _class_weights(self) -> jax.Array:
        """The weight of each class [K]; over the training examples their mean is 1."""
        if not self.balance:
            return jnp.ones(self.counts["target"])
        examples = np.asarray(self.examples["target"], np.float64)
        weights = np.maximum(examples, 1) ** -self.balance
        return jnp.asarray(weights * examples.sum() / (weights * examples).sum(), jnp.float32)

    def predict(self, params: Pytree, state: Pytree, batch: Batch) -> dict[str, jax.Array]:
        """The class of each row and all probabilities: int32 [B] and float32 [B, K].

        Where pairs are compared, the embedding [B, E] and its cosines with the classes [B, K].
        """
        embedding, scores, _ = self._apply(params, state, batch)
        if self.verify:
            vectors = params["classifier"]["kernel"].astype(jnp.float32)
            cosines = unit(embedding, axis=-1) @ unit(vectors, axis=0)
            return {"embedding": embedding, "cohort": cosines}
        return {
            "target": scores.argmax(-1).astype(jnp.int32),
            "probabilities": jax.nn.softmax(self._logits(scores, jnp.zeros_like(scores))),
        }

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances that are too short for a frame of the encoder."""
        inputs = self.frontend.lengths(np.asarray(sizes["samples"]))
        frames = np.asarray(self.encoder.output_lengths(inputs))
        return {int(i): "too short: not a frame of the encoder" for i in np.flatnonzero(frames < 1)}

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss in nats an utterance, and the share of utterances whose class was found."""
        return {
            "loss": sums["loss"] / max(sums["weight"], 1e-6),
            "accuracy": sums["correct"] / max(sums["known"], 1.0),
        }

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing that is logged says that going on is of no use."""

    def evaluator(self, parts: Mapping[str, Any]) -> Accuracy | Verification:
        """How often the class is found, or how well pairs of utterances are told apart."""
        if self.verify:
            trials = read_trials(self.trials) if self.trials else ()
            return Verification(parts["target"].tag, trials, self.cohort)
        return Accuracy(parts["target"])
