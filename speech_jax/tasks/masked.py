"""What the tasks of pretraining share: masked frames, and how a prediction of them is counted.

Both hide spans of frames from the encoder and ask what was there. Spans, negatives and statistics
are of valid frames of rows with weight, never of padding. The loss is a sum over masked frames with
their number beside it; a batch that is accumulated in parts takes the codebook's perplexity of each
part.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.evaluators.masked import Masked
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import masking


class CollapseError(UserError):
    """The model has found a way out of the objective; training on is of no use."""


class MaskedTask:
    """What such a task is to the rest of the house; it has an `encoder` and a `frontend`."""

    parts: ClassVar = {"audio": "crop"}
    along: ClassVar = "samples"
    augments: ClassVar = False
    best: ClassVar = ("error_rate", "min")

    encoder: nn.Module
    frontend: FrontEnd

    def unusable(self, sizes: Mapping[str, np.ndarray]) -> dict[int, str]:
        """Utterances that are too short for a frame of the encoder."""
        inputs = self.frontend.lengths(np.asarray(sizes["samples"]))
        frames = np.asarray(self.encoder.output_lengths(inputs))
        return {int(i): "too short: not a frame of the encoder" for i in np.flatnonzero(frames < 1)}

    def evaluator(self, parts: Mapping[str, Any]) -> Masked:
        """How well masked frames are told apart."""
        del parts
        return Masked()


def row_keys(rng: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """A key for each row that is its utterance's own: draws depend on neither batch nor mesh."""
    return jax.vmap(lambda index: jax.random.fold_in(rng, index))(batch["index"])


def row_spans(
    keys: jax.Array, lengths: jax.Array, size: int, fraction: float, span: int
) -> jax.Array:
    """Masks bool [B, size] by masking.random_spans, from a key for each row."""
    draw = lambda key, length: masking.random_spans(key, length[None], size, fraction, span)[0]
    return jax.vmap(draw)(keys, lengths)


def perplexity(mean: jax.Array) -> jax.Array:
    """Of distributions [..., V], summed over them: 1 to V for each."""
    entropy = -(mean * jnp.log(jnp.maximum(mean, 1e-20))).sum(axis=-1)
    return jnp.exp(entropy).sum()


def mean_of(probabilities: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean distribution [G, V] of [B, T, G, V] over the frames where mask [B, T] holds."""
    weight = mask.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    return jnp.einsum("bt,btgv->gv", weight, probabilities) / count


def frequencies(codes: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """How often each of `size` codes is chosen [G, size], of int [B, T, G], where the mask holds.

    By counting, without an array of a number for every frame and code.
    """
    groups = codes.shape[-1]
    chosen = codes + size * jnp.arange(groups, dtype=codes.dtype)[None, None]
    weight = jnp.broadcast_to(mask.astype(jnp.float32)[:, :, None], chosen.shape)
    counts = jnp.zeros(groups * size).at[chosen.reshape(-1)].add(weight.reshape(-1))
    return counts.reshape(groups, size) / jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)


def figures(sums: Mapping[str, float], means: Sequence[str]) -> dict[str, float]:
    """Nats a masked frame, accuracy, and the means over updates of what is not of frames."""
    values = {"loss_per_frame": sums["loss"] / max(sums["weight"], 1.0)}
    values["accuracy"] = sums["correct"] / max(sums["masked"], 1.0)
    values |= {name: sums[name] / max(sums["parts"], 1.0) for name in means}
    return values | {"masked_frames": sums["masked"]}


def check_collapse(
    figures: Mapping[str, float],
    name: str,
    *,
    groups: int,
    codes: int,
    fraction: float,
    after: int,
    step: int,
    cure: str,
) -> None:
    """Raises CollapseError where, `after` so many updates, a perplexity is close to its least.

    The perplexity `name` is summed over groups of codes, so it lies between `groups` and groups *
    codes; too close is below this `fraction` of the way.
    """
    total = groups * codes
    floor = groups + fraction * (total - groups)
    if step > after and figures["masked_frames"] and figures[name] < floor:
        raise CollapseError(
            f"pretraining collapsed: {name} is {figures[name]:.1f} of {total} codes at update "
            f"{step}, below {floor:.1f}; {cure}"
        )
