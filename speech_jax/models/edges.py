"""What a convolution sees beyond its piece: zeros around a whole, kept frames between pieces."""

import dataclasses

import jax
import jax.numpy as jnp

from speech_jax.ops import convolution, masking

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

    def whole(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, ...] between zeros, zero past the lengths [B] too; the lengths of the outputs.

        Each window of past + 1 + future frames, `stride` apart, is of an output.
        """
        zero = ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(_zeroed(x, mask_of(lengths, x)), ((0, 0), (self.past, self.future), *zero))
        return x, (lengths + self.stride - 1) // self.stride

    def piece(
        self, x: jax.Array, valid: jax.Array, kept: Kept
    ) -> tuple[jax.Array, jax.Array, Kept]:
        """The same of a piece [B, N, ...] behind what has been kept, and what to keep of both.

        `valid`, and what comes of it, says which frames are: bool [B, N].
        """
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
