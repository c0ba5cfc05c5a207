"""Pretraining on unlabelled speech: wav2vec 2.0 (Baevski et al. 2020), BEST-RQ (Chiu et al. 2022).

Both hide spans of frames from the encoder and ask what was there. Spans, negatives and statistics
are of valid frames of rows with weight, never of padding. The loss is a sum over masked frames with
their number beside it; a batch that is accumulated in parts takes the codebook's perplexity of each
part.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.errors import UserError
from speech_jax.evaluators import errors as metrics
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops.convolution import receptive_field
from speech_jax.ops.masking import random_spans
from speech_jax.ops import features


class CollapseError(UserError):
    """The model has found a way out of the objective; training on is of no use."""


# ---- wav2vec 2.0 -------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """Product quantization by Gumbel-softmax (Jang et al. 2017), straight through.

    Features [B, T, C] choose one of `codes` entries in each of `groups` codebooks.
    """

    groups: int
    codes: int
    features: int

    @nn.compact
    def __call__(self, x, noise=None, temperature=None):
        """Returns code vectors [B, T, features], logits [B, T, G, V] and choices [B, T, G].

        noise: standard Gumbel [B, T, G, V] at `temperature`; None chooses the likeliest code.
        """
        if self.features % self.groups:
            raise ValueError(
                f"{self.features} code features do not split into {self.groups} groups"
            )
        shape = (self.groups, self.codes, self.features // self.groups)
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
        return vectors.reshape(*x.shape[:2], self.features), logits, choices


class ContrastiveModel(nn.Module):
    """A wav2vec2 encoder, the quantizer of its features, and projections to compare them in."""

    encoder: nn.Module
    groups: int
    codes: int
    code_features: int
    final_features: int
    feature_dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, lengths, mask, deterministic: bool, noise=None, temperature=None):
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


def sample_negatives(rng, mask, count: int):
    """For every frame, `count` other masked frames of its row: places int32 [B, T, count].

    Drawn uniformly with replacement; of use only where a row has two masked frames or more.
    """
    batch, frames = mask.shape
    masked = mask.sum(axis=1, dtype=jnp.int32)[:, None, None]
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32)[:, :, None] - 1
    others = jnp.maximum(masked - 1, 1)
    fraction = jax.random.uniform(rng, (batch, frames, count))
    drawn = (fraction * others.astype(jnp.float32)).astype(jnp.int32)
    drawn = jnp.minimum(drawn, others - 1)
    drawn = drawn + (drawn >= rank).astype(jnp.int32)
    places = jnp.argsort(~mask, axis=1, stable=True)
    drawn = jnp.clip(drawn, 0, frames - 1).reshape(batch, -1)
    return jnp.take_along_axis(places, drawn, axis=1).reshape(batch, frames, count)


def contrastive_logits(context, targets, choices, negatives, temperature: float):
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
    same = (choices[:, :, None] == choices[:, None, :]).all(axis=-1)
    positive = jnp.diagonal(similarity, axis1=1, axis2=2)[:, :, None]
    similarity = jnp.where(same, -jnp.inf, similarity)
    negative = jnp.take_along_axis(similarity, negatives, axis=2)
    return jnp.concatenate([positive, negative], axis=2)


def _norm(x):
    # The floor is inside the root, where its gradient is finite.
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-16))


def perplexity(probabilities, mask):
    """Of the mean distribution over frames where `mask`, summed over groups: 1 G to V G.

    probabilities: float32 [B, T, G, V]; mask: bool [B, T].
    """
    weight = mask.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = jnp.einsum("bt,btgv->gv", weight, probabilities) / count
    entropy = -(mean * jnp.log(jnp.maximum(mean, 1e-20))).sum(axis=-1)
    return jnp.exp(entropy).sum()


class Draws(NamedTuple):
    """What is random in the contrastive objective."""

    mask: jax.Array  # bool [B, T'], frames hidden from the encoder
    counted: jax.Array  # bool [B, T'], those of them that are in the loss
    negatives: jax.Array  # int32 [B, T', N], frames of the same row
    noise: jax.Array | None  # standard Gumbel [B, T', G, V]; None: the likeliest codes


@dataclasses.dataclass(frozen=True)
class Contrastive:
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

    labelled: ClassVar = False
    metric: ClassVar = "error_rate"

    def __post_init__(self):
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

    def init(self, rng, batch):
        """Parameters (float32) and model state (empty without batch norm)."""
        inputs, lengths = self.frontend(batch)
        mask = jnp.zeros((inputs.shape[0], self.encoder.output_lengths(inputs.shape[1])), bool)
        variables = self.model.init(rng, inputs, lengths, mask, True)
        params = variables.pop("params")
        return params, variables

    def temperature(self, step):
        """Of the Gumbel-softmax at an update."""
        first, last, factor = self.temperatures
        decayed = first * jnp.exp(math.log(factor) * jnp.asarray(step, jnp.float32))
        return jnp.maximum(decayed, last)

    def loss(self, params, state, batch, rng=None, step=0):
        """Nats, diversity and penalty over masked frames; without a key, the likeliest codes."""
        inputs, lengths, draws, dropout_rng = self._prepare(batch, rng)
        total, rows, aux = self.compare(params, state, inputs, lengths, draws, step, dropout_rng)
        return total, rows["masked"].sum(), aux

    def predict(self, params, state, batch):
        """How well masked frames are told apart: {'nats', 'correct', 'masked'}, sums of [B]."""
        inputs, lengths, draws, _ = self._prepare(batch, None)
        return self.compare(params, state, inputs, lengths, draws)[1]

    def figures(self, sums) -> dict[str, float]:
        """Losses in nats a masked frame, accuracy, and the means of what is not of frames."""
        means = ("code_perplexity", "soft_code_perplexity", "feature_penalty", "gumbel_temperature")
        contrastive = sums["contrastive"] / max(sums["masked"], 1.0)
        return _figures(sums, means) | {"contrastive": contrastive}

    def check(self, figures, step: int) -> None:
        """Raises CollapseError where the codebook is hardly used."""
        cure = "lower the learning rate, warm up for longer or raise diversity_weight"
        _check_collapse(self, figures, "code_perplexity", self.groups, step, cure)

    def score(self, row, utterance, tokenizer):
        """Sums over an utterance's masked frames."""
        del utterance, tokenizer
        return _score(row)

    def compare(self, params, state, inputs, lengths, draws, step=0, dropout_rng=None):
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
        masked, nats = rows["masked"].sum(), rows["nats"].sum()
        hard = perplexity(jax.nn.one_hot(outputs["choices"], self.codes), draws.counted)
        soft = perplexity(jax.nn.softmax(outputs["logits"], axis=-1), draws.counted)
        codes = self.groups * self.codes
        diversity = (codes - (hard if draws.noise is None else soft)) / codes
        extra = self.diversity_weight * diversity + self.penalty_weight * outputs["penalty"]
        sums = {
            "parts": jnp.ones(()),
            "masked": masked,
            "contrastive": nats,
            "correct": rows["correct"].sum(),
            "code_perplexity": hard,
            "soft_code_perplexity": soft,
            "feature_penalty": outputs["penalty"],
            "gumbel_temperature": self.temperature(step),
        }
        return nats + extra * masked, rows, {"state": state, "sums": sums}

    def _prepare(self, batch, rng):
        train = rng is not None
        rngs = jax.random.split(rng if train else jax.random.key(0), 4)
        inputs, lengths = self.frontend(batch)
        frames, size = (self.encoder.output_lengths(n) for n in (lengths, inputs.shape[1]))
        rows = _row_keys(rngs[0], batch)
        mask = _row_spans(rows, frames, size, self)
        # A row with a single masked frame has nothing to be compared with.
        counted = (batch["weight"] > 0) & (mask.sum(axis=1) > 1)
        counted = mask & counted[:, None]
        draw = lambda key, row: sample_negatives(key, row[None], self.negatives)[0]
        negatives = jax.vmap(draw)(_row_keys(rngs[1], batch), counted)
        shape = (len(inputs), size, self.groups, self.codes)
        noise = jax.random.gumbel(rngs[2], shape) if train else None
        return inputs, lengths, Draws(mask, counted, negatives, noise), rngs[3] if train else None


def contrastive_rows(logits, mask) -> dict[str, jax.Array]:
    """Sums over the masked frames of each row [B]: 'nats', 'correct', 'masked'.

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


# ---- BEST-RQ -----------------------------------------------------------------------------------


# Cepstra of a target, as those that HuBERT (Hsu et al. 2021) begins with: how many, and over the
# log-mel frames of an encoder frame their mean and slope.
CEPSTRA, SLOPES = 13, 2


class ClassifierModel(nn.Module):
    """An encoder and a linear layer to logits [B, T', codes] float32."""

    encoder: nn.Module
    codes: int

    @nn.compact
    def __call__(self, inputs, lengths, deterministic: bool, **kwargs):
        hidden, lengths = self.encoder(inputs, lengths, deterministic, **kwargs)
        head = nn.Dense(self.codes, dtype=hidden.dtype, name="codes")
        return head(hidden).astype(jnp.float32), lengths


@dataclasses.dataclass(frozen=True)
class BestRQ:
    """BEST-RQ: name the code of a masked frame, from a random projection that is never trained.

    A target is the nearest, by cosine, of `codes` random vectors to a random projection of the
    log-mel frames that fall on an encoder frame, as cepstra and their slope over the frame, each
    normalized over the utterance. (The paper projects log-mel itself.) Any encoder will do: log-mel
    inputs are masked by noise, waveform encoders by their own mask embedding.

    Attributes:
      codes, code_features: random vectors and their width.
      mask_fraction, mask_length: spans of so many encoder frames, as many as would cover this
        fraction.
      noise: standard deviation of what masked log-mel frames become.
      collapse_fraction, collapse_after: as in Contrastive, of the predictions.
    """

    encoder: nn.Module
    frontend: FrontEnd
    codes: int = 8192
    code_features: int = 16
    mask_fraction: float = 0.4
    mask_length: int = 10
    noise: float = 0.1
    collapse_fraction: float = 0.0005
    collapse_after: int = 1_000

    labelled: ClassVar = False
    metric: ClassVar = "error_rate"

    @property
    def model(self) -> ClassifierModel:
        """Its parameters are {"encoder", "codes"}."""
        return ClassifierModel(self.encoder, self.codes)

    def init(self, rng, batch):
        """Parameters, and a state that holds the random projection and codes too."""
        model_rng, projection_rng, code_rng = jax.random.split(rng, 3)
        inputs, lengths = self.frontend(batch)
        variables = self.model.init(model_rng, inputs, lengths, True)
        width = self._frames(batch, inputs, lengths)[0].shape[2]
        state = {
            "projection": nn.initializers.xavier_uniform()(
                projection_rng, (width, self.code_features), jnp.float32
            ),
            "codebook": jax.random.normal(code_rng, (self.codes, self.code_features)),
        }
        params = variables.pop("params")
        return params, state | variables

    def logits(self, params, state, batch, rng=None, step=0):
        """(logits [B, T', codes], frames [B], new state) under the masks of `rng`."""
        del step
        _, logits, _, _, state = self._predict(params, state, batch, rng)
        frames = self.encoder.output_lengths(self.frontend.lengths(batch["audio_length"]))
        return logits, frames, state

    def loss(self, params, state, batch, rng=None, step=0):
        """Cross-entropy in nats over masked frames."""
        del step
        rows, logits, targets, mask, state = self._predict(params, state, batch, rng)
        hard = jax.nn.one_hot(targets, self.codes)[:, :, None]
        sums = {
            "parts": jnp.ones(()),
            "masked": rows["masked"].sum(),
            "correct": rows["correct"].sum(),
            "target_perplexity": perplexity(hard, mask),
            "prediction_perplexity": perplexity(jax.nn.softmax(logits)[:, :, None], mask),
        }
        return rows["nats"].sum(), rows["masked"].sum(), {"state": state, "sums": sums}

    def predict(self, params, state, batch):
        """How well masked frames are named: {'nats', 'correct', 'masked'}, sums of [B]."""
        return self._predict(params, state, batch, None)[0]

    def figures(self, sums) -> dict[str, float]:
        """As in Contrastive."""
        return _figures(sums, ("target_perplexity", "prediction_perplexity"))

    def check(self, figures, step: int) -> None:
        """Raises CollapseError where nearly all frames are given the same code."""
        cure = "lower the learning rate or warm up for longer"
        _check_collapse(self, figures, "prediction_perplexity", 1, step, cure)

    def score(self, row, utterance, tokenizer):
        """Sums over an utterance's masked frames."""
        del utterance, tokenizer
        return _score(row)

    def _predict(self, params, state, batch, rng):
        train = rng is not None
        mask_rng, noise_rng, dropout_rng = jax.random.split(rng if train else jax.random.key(0), 3)
        inputs, lengths = self.frontend(batch)
        stacked, places = self._frames(batch, inputs, lengths)
        state = dict(state)
        fixed = {name: state.pop(name) for name in ("projection", "codebook")}
        targets = nearest_code(stacked, **fixed)
        size = stacked.shape[1]
        frames = self.encoder.output_lengths(lengths)
        mask = _row_spans(_row_keys(mask_rng, batch), frames, size, self)
        settings = {"mask": mask}
        if places:
            hidden = jnp.repeat(mask, places, axis=1)[:, : inputs.shape[1], None]
            draw = lambda key: self.noise * jax.random.normal(key, inputs.shape[1:])
            noise = jax.vmap(draw)(_row_keys(noise_rng, batch))
            inputs, settings = jnp.where(hidden, noise, inputs), {}
        (logits, _), state = self.model.apply(
            {"params": params, **state},
            inputs,
            lengths,
            not train,
            **settings,
            rngs={"dropout": dropout_rng} if train else None,
            mutable=list(state),
        )
        mask = mask & (batch["weight"] > 0)[:, None]
        weight = mask.astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
        correct = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
        rows = {
            "nats": (nats * weight).sum(axis=1),
            "correct": (correct * weight).sum(axis=1),
            "masked": weight.sum(axis=1),
        }
        return rows, logits, targets, mask, fixed | state

    def _frames(self, batch, inputs, lengths):
        """What each encoder frame's target is of [B, T', C], and how many inputs make a frame.

        That number is 0 for a waveform encoder: there, one log-mel window is as long as what a
        frame of the encoder sees.
        """
        size = self.encoder.output_lengths(inputs.shape[1])
        if self.encoder.frontend == "waveform":
            rate = self.frontend.log_mel["sample_rate"]
            kernels, strides = self.encoder.conv_kernels, self.encoder.conv_strides
            geometry = {
                "window_ms": 1000 * receptive_field(kernels, strides) / rate,
                "hop_ms": 1000 * math.prod(strides) / rate,
            }
            waveform = features.to_waveform(batch["audio"])
            settings = {**self.frontend.log_mel, **geometry}
            mels = features.log_mel(waveform, lengths, **settings)[0][:, :size, None]
            places = 0
        else:
            rows, frames, bands = inputs.shape
            places = -(-frames // size)
            mels = jnp.pad(inputs, ((0, 0), (0, places * size - frames), (0, 0)))
            mels = mels.reshape(rows, size, places, bands)
        # Two thirds of the variance of log-mel is loudness: projected as they are, the frames fall
        # on a tenth of the codes, which tell little but that.
        shapes = features.cosine_transform(mels, CEPSTRA, axis=3)
        shapes = features.cosine_transform(shapes, SLOPES, axis=2)
        shapes = shapes.reshape(*shapes.shape[:2], -1)
        return features.normalize(shapes, self.encoder.output_lengths(lengths)), places


def nearest_code(x, projection, codebook):
    """Rows of `codebook` [V, D] nearest by cosine to x [B, T, M] @ projection: int32 [B, T]."""
    exactly = {"precision": lax.Precision.HIGHEST}
    projected = jnp.einsum("bti,id->btd", x, projection, **exactly)
    codebook = codebook / _norm(codebook)
    # The length of the projection scales all similarities alike.
    return jnp.einsum("btd,vd->btv", projected, codebook, **exactly).argmax(axis=-1)


# ---- Either ------------------------------------------------------------------------------------


def _row_keys(rng, batch):
    """A key for each row that is its utterance's own: draws depend on neither batch nor mesh."""
    return jax.vmap(lambda index: jax.random.fold_in(rng, index))(batch["index"])


def _row_spans(keys, lengths, size, task):
    draw = lambda key, length: random_spans(
        key, length[None], size, task.mask_fraction, task.mask_length
    )[0]
    return jax.vmap(draw)(keys, lengths)


def _figures(sums, means) -> dict[str, float]:
    values = {"loss_per_frame": sums["loss"] / max(sums["weight"], 1.0)}
    values["accuracy"] = sums["correct"] / max(sums["masked"], 1.0)
    values |= {name: sums[name] / max(sums["parts"], 1.0) for name in means}
    return values | {"masked_frames": sums["masked"]}


def _score(row):
    sums = (float(row[name]) for name in ("nats", "correct", "masked"))
    counts = metrics.MaskedCounts(1, *sums)
    return counts, counts.results()


def _check_collapse(task, figures, name, groups, step, cure):
    # A perplexity summed over groups of codes is from `groups` to groups * codes.
    codes = groups * task.codes
    floor = groups + task.collapse_fraction * (codes - groups)
    if step > task.collapse_after and figures["masked_frames"] and figures[name] < floor:
        raise CollapseError(
            f"pretraining collapsed: {name} is {figures[name]:.1f} of {codes} codes at update "
            f"{step}, below {floor:.1f}; {cure}"
        )
