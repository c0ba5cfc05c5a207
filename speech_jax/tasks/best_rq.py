"""BEST-RQ (Chiu et al. 2022): name the random code of a masked frame."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import features
from speech_jax.rules import Rules, within
from speech_jax.tasks import masked

# Cepstra of a target, like those that HuBERT (Hsu et al. 2021) begins with: how many, and their
# mean and slope over the log-mel frames of an encoder frame.
CEPSTRA, SLOPES = 13, 2

# How the parameters beside the encoder's lie on a mesh.
RULES: Rules = ((r"codes/kernel", ("fsdp", None)), (r"codes/bias", ()))


class ClassifierModel(nn.Module):
    """An encoder and a linear layer to logits [B, T', codes] float32."""

    encoder: nn.Module
    codes: int

    @nn.compact
    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool, **kwargs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        hidden, lengths = self.encoder(inputs, lengths, deterministic, **kwargs)
        head = nn.Dense(self.codes, dtype=hidden.dtype, name="codes")
        return head(hidden).astype(jnp.float32), lengths


@dataclasses.dataclass(frozen=True)
class BestRQ(masked.MaskedTask):
    """BEST-RQ: name the code of a masked frame, from a random projection that is never trained.

    A target is the nearest, by cosine, of `codes` random vectors to a random projection of the
    log-mel frames that fall on an encoder frame, as cepstra and their slope over the frame, each
    normalized over the utterance. (The paper projects log-mel itself.) Any encoder of log-mel will
    do, its inputs being masked by noise. An encoder of waveforms has to know its geometry and mask
    its own frames (see models/__init__.py).

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

    def __post_init__(self) -> None:
        if self.encoder.listens == "waveform" and not hasattr(self.encoder, "geometry"):
            raise UserError(
                f"best_rq cannot tell which samples a frame of {type(self.encoder).__name__} sees: "
                "use an encoder of log-mel, or one with geometry() and mask (models/__init__.py)"
            )

    @property
    def model(self) -> ClassifierModel:
        """Its parameters are {"encoder", "codes"}."""
        return ClassifierModel(self.encoder, self.codes)

    @property
    def rules(self) -> Rules:
        """How the parameters lie on a mesh."""
        return (*within("encoder", self.encoder.rules), *RULES)

    def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
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

    def logits(
        self,
        params: Any,
        state: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """(logits [B, T', codes], frames [B], new state) under the masks of `rng`."""
        del step
        _, logits, _, _, state = self._predict(params, state, batch, rng)
        frames = self.encoder.output_lengths(self.frontend.lengths(batch["audio_length"]))
        return logits, frames, state

    def loss(
        self,
        params: Any,
        state: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Cross-entropy in nats over masked frames."""
        del step
        rows, logits, targets, mask, state = self._predict(params, state, batch, rng)
        # These are only logged: they are counted, or summed without an array of their own.
        chosen = masked.frequencies(targets[:, :, None], mask, self.codes)
        weight = mask.astype(jnp.float32)
        likely = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        likely = (likely * weight[:, :, None]).sum((0, 1)) / jnp.maximum(weight.sum(), 1.0)
        sums = {
            "parts": jnp.ones(()),
            "masked": rows["masked"].sum(),
            "correct": rows["correct"].sum(),
            "target_perplexity": masked.perplexity(chosen),
            "prediction_perplexity": masked.perplexity(likely),
        }
        return rows["nats"].sum(), rows["masked"].sum(), {"state": state, "sums": sums}

    def predict(
        self, params: Any, state: Any, batch: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """How well masked frames are named: {'nats', 'correct', 'masked'}, sums of [B]."""
        return self._predict(params, state, batch, None)[0]

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """As in Contrastive."""
        return masked.figures(sums, ("target_perplexity", "prediction_perplexity"))

    def check(self, figures: Mapping[str, float], step: int) -> None:
        """Raises CollapseError where nearly all frames are given the same code."""
        cure = "lower the learning rate or warm up for longer"
        masked.check_collapse(
            figures,
            "prediction_perplexity",
            groups=1,
            codes=self.codes,
            fraction=self.collapse_fraction,
            after=self.collapse_after,
            step=step,
            cure=cure,
        )

    def _predict(
        self, params: Any, state: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array, Any]:
        train = rng is not None
        mask_rng, noise_rng, dropout_rng = jax.random.split(rng if train else jax.random.key(0), 3)
        inputs, lengths = self.frontend(batch)
        stacked, each = self._frames(batch, inputs, lengths)
        state = dict(state)
        fixed = {name: state.pop(name) for name in ("projection", "codebook")}
        targets = nearest_code(stacked, **fixed)
        size = stacked.shape[1]
        frames = self.encoder.output_lengths(lengths)
        keys = masked.row_keys(mask_rng, batch)
        mask = masked.row_spans(keys, frames, size, self.mask_fraction, self.mask_length)
        settings = {"mask": mask}
        if each:
            hidden = jnp.repeat(mask, each, axis=1)[:, : inputs.shape[1], None]
            draw = lambda key: self.noise * jax.random.normal(key, inputs.shape[1:])
            noise = jax.vmap(draw)(masked.row_keys(noise_rng, batch))
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

    def _frames(
        self, batch: Mapping[str, jax.Array], inputs: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, int]:
        """What each encoder frame's target is of [B, T', C], and how many inputs make a frame.

        That number is 0 for an encoder of waveforms: there, one log-mel window is as long as what a
        frame of the encoder sees.
        """
        size = self.encoder.output_lengths(inputs.shape[1])
        if self.encoder.listens == "waveform":
            rate = self.frontend.log_mel["sample_rate"]
            window, hop = (1000 * samples / rate for samples in self.encoder.geometry())
            settings = {**self.frontend.log_mel, "window_ms": window, "hop_ms": hop}
            waveform = features.to_waveform(batch["audio"])
            mels = features.log_mel(waveform, lengths, **settings)[0][:, :size, None]
            each = 0
        else:
            rows, frames, bands = inputs.shape
            each = -(-frames // size)
            mels = jnp.pad(inputs, ((0, 0), (0, each * size - frames), (0, 0)))
            mels = mels.reshape(rows, size, each, bands)  # [B, T', inputs of a frame, mels]
        # Two thirds of the variance of log-mel is loudness: projected as they are, the frames fall
        # on a tenth of the codes, which say little beside loudness.
        shapes = features.cosine_transform(mels, CEPSTRA, axis=3)
        shapes = features.cosine_transform(shapes, SLOPES, axis=2)
        shapes = shapes.reshape(*shapes.shape[:2], -1)
        return features.normalize(shapes, self.encoder.output_lengths(lengths)), each


def nearest_code(x: jax.Array, projection: jax.Array, codebook: jax.Array) -> jax.Array:
    """Rows of `codebook` [V, D] nearest by cosine to x [B, T, M] @ projection: int32 [B, T]."""
    exactly = {"precision": lax.Precision.HIGHEST}
    projected = jnp.einsum("bti,id->btd", x, projection, **exactly)
    codebook = codebook / jnp.sqrt(
        jnp.maximum(jnp.square(codebook).sum(axis=-1, keepdims=True), 1e-16)
    )
    # The length of the projection scales all similarities alike.
    return jnp.einsum("btd,vd->btv", projected, codebook, **exactly).argmax(axis=-1)
