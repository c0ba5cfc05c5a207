"""wav2vec 2.0 (Baevski et al. 2020): tell the quantized features of a masked frame from others."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd
from speech_jax.rules import Rules, within
from speech_jax.tasks import masked

# How the parameters beside the encoder's lie on a mesh.
RULES: Rules = (
    (r"quantizer/codebook", ()),
    (r"(project_hidden|project_target|quantizer/project)/kernel", ("fsdp", None)),
    (r"(project_hidden|project_target|quantizer/project)/bias", ()),
)


class Quantizer(nn.Module):
    """Product quantization by Gumbel-softmax (Jang et al. 2017), straight through.

    Features [B, T, C] choose one of V `codes` in each of G `groups`; what is chosen makes a vector
    of `width`.
    """

    groups: int
    codes: int
    width: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array | None = None,
        temperature: jax.Array | float | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns code vectors [B, T, width], logits [B, T, G, V] and choices int [B, T, G].

        noise: standard Gumbel [B, T, G, V] at `temperature`; None chooses the likeliest code.
        """
        if self.width % self.groups:
            raise UserError(
                f"config.task.code_features={self.width} does not split into {self.groups} groups"
            )
        shape = (self.groups, self.codes, self.width // self.groups)
        codebook = self.param("codebook", nn.initializers.uniform(1.0), shape)
        project = nn.Dense(
            self.groups * self.codes, kernel_init=nn.initializers.normal(1.0), name="project"
        )
        logits = project(x.astype(jnp.float32)).reshape(*x.shape[:2], self.groups, self.codes)
        if noise is None:
            choices = logits.argmax(axis=-1)
            picked = jax.nn.one_hot(choices, self.codes)
        else:
            soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)
            choices = soft.argmax(axis=-1)
            picked = jax.nn.one_hot(choices, self.codes) - lax.stop_gradient(soft) + soft
        vectors = jnp.einsum("btgv,gvd->btgd", picked, codebook)
        return vectors.reshape(*x.shape[:2], self.width), logits, choices


class ContrastiveModel(nn.Module):
    """A wav2vec2 encoder, the quantizer of its features, and projections to compare them in."""

    encoder: nn.Module
    groups: int
    codes: int
    code_features: int
    final_features: int
    feature_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        mask: jax.Array | None,
        deterministic: bool,
        noise: jax.Array | None = None,
        temperature: jax.Array | float | None = None,
    ) -> dict[str, jax.Array]:
        """Returns a dict.

        'context', 'targets' [B, T', final_features]; 'logits' [B, T', G, V] and 'choices'
        [B, T', G] of the quantizer; 'penalty': mean square of the extractor's valid output.
        """
        raw, lengths = self.encoder.extract(inputs, lengths)
        normalized = self.encoder.normalize(raw)
        hidden = self.encoder.contextualize(normalized, lengths, deterministic, mask)
        dropped = nn.Dropout(self.feature_dropout)(normalized, deterministic=deterministic)
        quantizer = Quantizer(self.groups, self.codes, self.code_features, name="quantizer")
        vectors, logits, choices = quantizer(dropped, noise, temperature)
        values = lengths.astype(jnp.float32).sum() * raw.shape[-1]
        penalty = jnp.square(raw.astype(jnp.float32)).sum() / jnp.maximum(values, 1.0)
        return {
            "context": nn.Dense(self.final_features, name="project_hidden")(
                hidden.astype(jnp.float32)
            ),
            "targets": nn.Dense(self.final_features, name="project_target")(vectors),
            "logits": logits,
            "choices": choices,
            "penalty": penalty,
        }


def sample_negatives(rng: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """For every frame, positions of `count` other masked frames of its row: int32 [B, T, count].

    They are drawn uniformly with replacement, and mean something only where a row has two masked
    frames or more.
    """
    batch, frames = mask.shape
    masked = mask.sum(axis=1, dtype=jnp.int32)[:, None, None]
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32)[:, :, None] - 1
    others = jnp.maximum(masked - 1, 1)
    fraction = jax.random.uniform(rng, (batch, frames, count))
    drawn = (fraction * others.astype(jnp.float32)).astype(jnp.int32)
    drawn = jnp.minimum(drawn, others - 1)
    drawn = drawn + (drawn >= rank).astype(jnp.int32)
    positions = jnp.argsort(~mask, axis=1, stable=True)
    drawn = jnp.clip(drawn, 0, frames - 1).reshape(batch, -1)
    return jnp.take_along_axis(positions, drawn, axis=1).reshape(batch, frames, count)


def contrastive_logits(
    context: jax.Array,
    targets: jax.Array,
    choices: jax.Array,
    negatives: jax.Array,
    temperature: float,
) -> jax.Array:
    """Cosine similarity over `temperature` with the target and the negatives: [B, T, 1 + N].

    The target is first. A negative of the same codes as the target cannot be told from it: -inf.

    Args:
      context, targets: float32 [B, T, D]; choices: int [B, T, G]; negatives: int [B, T, N].
    """
    # All pairs within a row by one product, then a gather of scalars: far less memory than
    # gathering vectors, for rows of speech are short.
    context = context / jnp.maximum(_norm(context), 1e-8)
    targets = targets / jnp.maximum(_norm(targets), 1e-8)
    exactly = {"precision": lax.Precision.HIGHEST}
    similarity = jnp.einsum("btd,bsd->bts", context, targets, **exactly) / temperature
    # [B, T, T]: whether two frames have the same codes.
    same = (choices[:, :, None] == choices[:, None, :]).all(axis=-1)
    positive = jnp.diagonal(similarity, axis1=1, axis2=2)[:, :, None]
    similarity = jnp.where(same, -jnp.inf, similarity)
    negative = jnp.take_along_axis(similarity, negatives, axis=2)
    return jnp.concatenate([positive, negative], axis=2)


def _norm(x: jax.Array) -> jax.Array:
    # The floor is inside the root, where its gradient is finite.
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-16))


class Draws(NamedTuple):
    """What is random in the contrastive objective."""

    mask: jax.Array  # bool [B, T'], frames hidden from the encoder
    counted: jax.Array  # bool [B, T'], those of them that are in the loss
    negatives: jax.Array  # int32 [B, T', N], frames of the same row
    noise: jax.Array | None  # standard Gumbel [B, T', G, V]; None: the likeliest codes


@dataclasses.dataclass(frozen=True)
class Contrastive(masked.MaskedTask):
    """wav2vec 2.0: pick the quantized features of a masked frame among those of others.

    Attributes:
      encoder, frontend: a wav2vec2 encoder and its waveform front end.
      groups, codes, code_features: codebooks, entries in each, width of a code vector.
      final_features: width in which context and target are compared.
      negatives: distractors of a frame.
      similarity_temperature: divides the cosine similarity.
      temperatures: of the Gumbel-softmax: the first, the last, the factor from update to update.
      mask_fraction, mask_length: spans of so many frames, as many as would cover this fraction.
      diversity_weight: of (G V - perplexity) / (G V) in the loss.
      penalty_weight: of the mean square of the extractor's output.
      feature_dropout: on what is quantized.
      collapse_fraction, collapse_after: perplexity below this fraction of the way from its least
        to its greatest value, after so many updates, ends the run.
    """

    encoder: nn.Module
    frontend: FrontEnd
    groups: int = 2
    codes: int = 320
    code_features: int = 256
    final_features: int = 256
    negatives: int = 100
    similarity_temperature: float = 0.1
    temperatures: tuple[float, float, float] = (2.0, 0.5, 0.999995)
    mask_fraction: float = 0.65
    mask_length: int = 10
    diversity_weight: float = 0.1
    penalty_weight: float = 10.0
    feature_dropout: float = 0.1
    collapse_fraction: float = 0.02
    collapse_after: int = 1_000

    def __post_init__(self) -> None:
        if not hasattr(self.encoder, "contextualize"):
            raise UserError(
                f"the contrastive task needs a wav2vec2 encoder, not a "
                f"{type(self.encoder).__name__}: use config.task.name='best_rq' for it"
            )

    @property
    def model(self) -> ContrastiveModel:
        """Its parameters are {"encoder", "quantizer", "project_hidden", "project_target"}."""
        return ContrastiveModel(
            self.encoder,
            self.groups,
            self.codes,
            self.code_features,
            self.final_features,
            self.feature_dropout,
        )

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *RULES)

    def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """Parameters (float32) and model state (empty without batch norm)."""
        inputs, lengths = self.frontend(batch)
        mask = jnp.zeros((inputs.shape[0], self.encoder.output_lengths(inputs.shape[1])), bool)
        variables = self.model.init(rng, inputs, lengths, mask, True)
        params = variables.pop("params")
        return params, variables

    def temperature(self, step: jax.Array | int) -> jax.Array:
        """Of the Gumbel-softmax at an update."""
        first, last, factor = self.temperatures
        decayed = first * jnp.exp(math.log(factor) * jnp.asarray(step, jnp.float32))
        return jnp.maximum(decayed, last)

    def loss(
        self,
        params: Any,
        state: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Nats, diversity and penalty over masked frames; without a key, the likeliest codes."""
        inputs, lengths, draws, dropout_rng = self._prepare(batch, rng)
        total, rows, aux = self.compare(params, state, inputs, lengths, draws, step, dropout_rng)
        return total, rows["masked"].sum(), aux

    def predict(
        self, params: Any, state: Any, batch: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """How well masked frames are told apart: {'nats', 'correct', 'masked'}, sums of [B]."""
        inputs, lengths, draws, _ = self._prepare(batch, None)
        return self.compare(params, state, inputs, lengths, draws)[1]

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Losses in nats a masked frame, accuracy, and the means of what is not of frames."""
        means = ("code_perplexity", "soft_code_perplexity", "feature_penalty", "gumbel_temperature")
        contrastive = sums["contrastive"] / max(sums["masked"], 1.0)
        return masked.figures(sums, means) | {"contrastive": contrastive}

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Raises CollapseError where the codebook is hardly used."""
        cure = "lower the learning rate, warm up for longer or raise diversity_weight"
        masked.check_collapse(
            figures,
            "code_perplexity",
            groups=self.groups,
            codes=self.codes,
            fraction=self.collapse_fraction,
            after=self.collapse_after,
            step=step,
            cure=cure,
        )

    def compare(
        self,
        params: Any,
        state: Any,
        inputs: jax.Array,
        lengths: jax.Array,
        draws: Draws,
        step: jax.Array | int = 0,
        dropout_rng: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """The loss of waveforms [B, T] for given draws; trains where there is a key for dropout.

        Returns:
          (sum, sums of each row as from `contrastive_rows`, aux as of `loss`).
        """
        outputs, state = self.model.apply(
            {"params": params, **state},
            inputs,
            lengths,
            draws.mask,
            dropout_rng is None,
            draws.noise,
            self.temperature(step),
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
            mutable=list(state),
        )
        logits = contrastive_logits(
            outputs["context"],
            outputs["targets"],
            outputs["choices"],
            draws.negatives,
            self.similarity_temperature,
        )
        rows = contrastive_rows(logits, draws.counted)
        count, nats = rows["masked"].sum(), rows["nats"].sum()
        chosen = masked.frequencies(outputs["choices"], draws.counted, self.codes)
        likely = masked.mean_of(jax.nn.softmax(outputs["logits"], axis=-1), draws.counted)
        hard, soft = masked.perplexity(chosen), masked.perplexity(likely)
        codes = self.groups * self.codes
        diversity = (codes - (hard if draws.noise is None else soft)) / codes
        extra = self.diversity_weight * diversity + self.penalty_weight * outputs["penalty"]
        sums = {
            "parts": jnp.ones(()),
            "masked": count,
            "contrastive": nats,
            "correct": rows["correct"].sum(),
            "code_perplexity": hard,
            "soft_code_perplexity": soft,
            "feature_penalty": outputs["penalty"],
            "gumbel_temperature": self.temperature(step),
        }
        return nats + extra * count, rows, {"state": state, "sums": sums}

    def _prepare(
        self, batch: Mapping[str, jax.Array], rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Draws, jax.Array | None]:
        train = rng is not None
        rngs = jax.random.split(rng if train else jax.random.key(0), 4)
        inputs, lengths = self.frontend(batch)
        frames, size = (self.encoder.output_lengths(n) for n in (lengths, inputs.shape[1]))
        keys = masked.row_keys(rngs[0], batch)
        mask = masked.row_spans(keys, frames, size, self.mask_fraction, self.mask_length)
        # A row with a single masked frame has nothing to be compared with.
        counted = (batch["weight"] > 0) & (mask.sum(axis=1) > 1)
        counted = mask & counted[:, None]
        draw = lambda key, row: sample_negatives(key, row[None], self.negatives)[0]
        negatives = jax.vmap(draw)(masked.row_keys(rngs[1], batch), counted)
        shape = (len(inputs), size, self.groups, self.codes)
        noise = jax.random.gumbel(rngs[2], shape) if train else None
        return inputs, lengths, Draws(mask, counted, negatives, noise), rngs[3] if train else None


def contrastive_rows(logits: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the masked frames of each row [B]: 'nats', 'correct', 'masked'.

    Args: logits float32 [B, T, 1 + N], the target first; mask bool [B, T].

    A frame counts as correct only where a negative can be told from it: else a collapsed codebook
    would look perfect.
    """
    weight = mask.astype(jnp.float32)
    nats = jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]
    best = logits[..., 1:].max(axis=-1)
    correct = (logits[..., 0] > best) & jnp.isfinite(best)
    return {
        "nats": (nats * weight).sum(axis=1),
        "correct": (correct.astype(jnp.float32) * weight).sum(axis=1),
        "masked": weight.sum(axis=1),
    }
