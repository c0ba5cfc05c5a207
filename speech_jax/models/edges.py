"""What a convolution sees beyond its piece: zeros around a whole, kept frames between pieces."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speech_jax.errors import UserError
from speech_jax.ops import convolution, masking

Carry = dict[str, Any]  # what an encoder keeps between pieces, by layer
Kept = tuple[jax.Array, jax.Array]  # frames [B, K, ...], and which of them are valid [B, K]


@dataclasses.dataclass(frozen=True)
class Edge:
    """The frames that a layer sees for each of its outputs, around one in the middle.

    Attributes:
      past, future: frames before and after the one in the middle.
      stride: frames from the middle of an output to that of the next.
      lag: frames that come late where the layer gets them piece by piece.
    """

    past: int
    future: int
    stride: int = 1
    lag: int = 0

    @property
    def delay(self) -> int:
        """Outputs that come late, piece by piece; a layer behind has it for its lag."""
        # All of the last output's frames are there; the first output's have all been kept.
        waits = (self.lag + self.future + 1 - self.stride, self.lag - self.past, 0)
        return max(-(-wait // self.stride) for wait in waits)

    @property
    def kept(self) -> int:
        """Frames of earlier pieces that the next piece needs, K."""
        return self.stride * self.delay - self.lag + self.past

    def start(self, rows: int, *shape: int, dtype: str) -> Kept:
        """What is kept before the first piece, of frames of a shape."""
        return jnp.zeros((rows, self.kept, *shape), dtype), jnp.zeros((rows, self.kept), bool)

    def surround(
        self, x: jax.Array, valid: jax.Array | None, kept: Kept | None = None
    ) -> tuple[jax.Array, jax.Array | None, Kept | None]:
        """Frames [B, T, ...] with those that their outputs see beside them.

        Each window of past + 1 + future frames, `stride` apart, is then of an output.

        Args:
          x: a whole, which lies between zeros; or, with `kept`, a piece behind what has been kept.
          valid: the lengths of wholes, int [B], or which frames of a piece are, bool [B, T]; what
            is not valid is zero. None: all frames of wholes are.

        Returns:
          The frames, what is valid of the outputs in the same form, and what to keep.
        """
        if kept is None:
            return *self._whole(x, valid), None
        return self._piece(x, valid, kept)

    def _whole(self, x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        if lengths is not None:
            x = _zeroed(x, mask_of(lengths, x))
            lengths = (lengths + self.stride - 1) // self.stride
        return jnp.pad(x, ((0, 0), (self.past, self.future), *((0, 0),) * (x.ndim - 2))), lengths

    def _piece(
        self, x: jax.Array, valid: jax.Array, kept: Kept
    ) -> tuple[jax.Array, jax.Array, Kept]:
        count = x.shape[1] // self.stride  # outputs
        x = jnp.concatenate([kept[0], _zeroed(x, valid)], axis=1)
        valid = jnp.concatenate([kept[1], valid], axis=1)
        kept = (x[:, x.shape[1] - self.kept :], valid[:, x.shape[1] - self.kept :])
        needed = self.past + (count - 1) * self.stride + 1
        middles = valid[:, self.past : needed : self.stride]
        return convolution.at_length(x, needed + self.future), middles, kept


def mask_of(valid: jax.Array, x: jax.Array) -> jax.Array:
    """Which frames of x [B, T, ...] are valid, bool [B, T]; `valid` is that, or their lengths."""
    return masking.length_mask(valid, x.shape[1]) if valid.ndim == 1 else valid


def _zeroed(x: jax.Array, mask: jax.Array) -> jax.Array:
    mask = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


class LogMelStepwise(nn.Module):
    """An encoder of log-mel that runs over wholes, and piece by piece (stepwise.py), by one `_run`.

    `_run(inputs [B, F, M], valid, carry, deterministic, layers_too)` gives hidden frames [B, T, D]
    and the next carry. With an empty carry it is of wholes of the lengths `valid` [B]; else of
    pieces of which the frames are valid that `valid` [B, F] says. `subsampling` and
    `output_lengths` are those of an encoder (models/__init__.py).
    """

    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool, layers_too: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        x, _ = self._run(inputs, lengths, {}, deterministic, layers_too)
        return x, self.output_lengths(lengths)

    def advance(self, carry: Carry, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Carry]:
        """The next hidden frames [B, N / subsampling, width] for log-mel frames [B, N, M].

        A piece has beside the frames which of them are valid, bool [B, N]: from an utterance's
        first one to its last. N is a multiple of `subsampling`.
        """
        inputs, valid = piece
        if inputs.shape[1] % self.subsampling:
            raise UserError(
                f"a piece of {inputs.shape[1]} log-mel frames is no multiple of "
                f"subsampling={self.subsampling}"
            )
        return self._run(inputs, valid, carry, True, False)
