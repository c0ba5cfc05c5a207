"""A Transformer decoder that writes labels one after another (Vaswani et al. 2017).

It looks at what it has written, by attention with rotary positions, and at the memory, the hidden
frames of an encoder, by cross attention. Layers normalize their input (pre-norm). Its table has one
symbol more than the tokenizer, `begin`, which is what it reads first and writes last. Label 0, the
blank of CTC, is never written.

Shapes: B rows of memory, R = B * k rows of text (k hypotheses for each), U symbols, T frames of
memory, S symbols that a row has room for, H heads of W = D / H, V symbols of the table.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speech_jax.errors import UserError
from speech_jax.models import layers
from speech_jax.ops import attention, masking, partition
from speech_jax.rules import Rules

NEVER = -1e30  # the logit of what is never written


class Seen(NamedTuple):
    """What attention looks at: keys and values, [B, S, H, W] each."""

    key: jax.Array
    value: jax.Array


class Carry(NamedTuple):
    """A text that is being written.

    at: int32 [R], how many symbols were read, the same in all rows; written: of each layer,
    [R, S, H, W] each; memory: of each layer, [B, T, H, W] each; mask: bool [B, T], the frames of
    the memory.
    """

    at: jax.Array
    written: tuple[Seen, ...]
    memory: tuple[Seen, ...]
    mask: jax.Array


class TextDecoder(nn.Module):
    """Symbols that were written, int32 [B, U], and a memory [B, T, ...] to the logits of the next.

    Attributes:
      vocabulary_size: labels of the tokenizer, the blank included.
      width: of the residual stream (D).
      num_layers, heads: depth, attention heads.
      expansion: feed-forward width over D.
      dropout: on every residual branch, attention weights and the embedding.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    vocabulary_size: int
    width: int = 256
    num_layers: int = 6
    heads: int = 4
    expansion: int = 4
    dropout: float = 0.1
    dtype: Any = "float32"

    delay: ClassVar = 0
    rules: ClassVar[Rules] = (
        *layers.TRANSFORMER_RULES,
        (r"embedding/embedding", ("tensor", "fsdp")),
        (r"cross_attention/query/kernel", ("fsdp", "tensor", None)),
        (r"cross_attention/query/bias", ("tensor", None)),
        (r"cross_attention/key_value/kernel", ("fsdp", None, "tensor", None)),
        (r"cross_attention/key_value/bias", (None, "tensor", None)),
        (r"cross_attention/project/kernel", ("tensor", None, "fsdp")),
        (r"cross_attention/project/bias", ()),
        (r"output/kernel", ("fsdp", "tensor")),
        (r"output/bias", ("tensor",)),
    )

    @property
    def begin(self) -> int:
        """The symbol that stands before a text, and behind it."""
        return self.vocabulary_size

    def setup(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(
                f"a decoder of the width {self.width} cannot be split into {self.heads} heads of "
                "even width"
            )
        self.embedding = nn.Embed(self.vocabulary_size + 1, self.width, dtype=self.dtype)
        settings = (self.heads, self.expansion * self.width, self.dropout, self.dtype)
        self.layer = [Layer(self.width, *settings) for _ in range(self.num_layers)]
        self.norm = layers.LayerNorm(self.dtype)
        self.output = nn.Dense(self.vocabulary_size + 1, dtype=self.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        memory: jax.Array,
        memory_lengths: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Logits float32 [B, U, V] of the symbol behind each of `tokens` [B, U].

        Args:
          tokens: `begin`, then labels; lengths: int32 [B], symbols of each row. Logits past them
            are 0.
          memory: [B, T, D'] of any width; memory_lengths: int32 [B], its frames.
        """
        seeds = [None] * (self.num_layers + 1)
        if not deterministic:  # one draw for all layers, as in the encoders
            seeds = jax.random.bits(self.make_rng("dropout"), (len(seeds), 2), jnp.uint32)
        mask = masking.length_mask(memory_lengths, memory.shape[1])
        looked_at = tuple(layer.remember(memory) for layer in self.layer)
        none = (None,) * self.num_layers
        logits, _ = self._write(tokens, jnp.int32(0), none, looked_at, mask, seeds)
        inside = masking.length_mask(lengths, tokens.shape[1])
        return jnp.where(inside[:, :, None], logits, 0)

    def start(self, rows: int, memory: jax.Array, memory_lengths: jax.Array, steps: int) -> Carry:
        """What `advance` begins with: nothing is written, and the memory has been looked at.

        Args:
          rows: of text; a multiple of the rows of the memory, those of one memory side by side.
          memory: [B, T, D']; memory_lengths: int32 [B].
          steps: symbols that `advance` reads at most, `begin` included (S).
        """
        shape = (rows, steps, self.heads, self.width // self.heads)
        empty = Seen(*(jnp.zeros(shape, self.dtype) for _ in Seen._fields))
        return Carry(
            at=jnp.zeros(rows, jnp.int32),
            written=(empty,) * self.num_layers,
            memory=tuple(layer.remember(memory) for layer in self.layer),
            mask=masking.length_mask(memory_lengths, memory.shape[1]),
        )

    def advance(self, carry: Carry, piece: jax.Array) -> tuple[jax.Array, Carry]:
        """Reads int32 [R, N] symbols more: (logits float32 [R, N, V] behind each, new carry)."""
        seeds = [None] * (self.num_layers + 1)
        logits, written = self._write(
            piece, carry.at[0], carry.written, carry.memory, carry.mask, seeds
        )
        return logits, carry._replace(at=carry.at + piece.shape[1], written=written)

    @staticmethod
    def pick(carry: Carry, rows: jax.Array) -> Carry:
        """The carry in which row i goes on from row rows[i], of the same memory; int32 [R]."""
        return carry._replace(written=jax.tree.map(lambda x: x[rows], carry.written))

    def _write(
        self,
        tokens: jax.Array,
        at: jax.Array,
        written: tuple[Seen | None, ...],
        memory: tuple[Seen, ...],
        mask: jax.Array,
        seeds: Any,
    ) -> tuple[jax.Array, tuple[Seen, ...]]:
        x = self.embedding(tokens) * jnp.asarray(np.sqrt(self.width), self.dtype)  # [R, U, D]
        x = layers.dropout(x, self.dropout, seeds[-1])
        kept = []
        for layer, past, seen, seed in zip(self.layer, written, memory, seeds[:-1], strict=True):
            x, past = layer(x, past, at, seen, mask, seed)
            kept.append(past)
        logits = self.output(self.norm(x)).astype(jnp.float32)
        blank = jnp.arange(logits.shape[-1]) == 0
        return jnp.where(blank[None, None], NEVER, logits), tuple(kept)


class Layer(nn.Module):
    """Attention to what was written, to the memory, and a feed-forward; each is added."""

    width: int
    heads: int
    feed_forward_width: int
    dropout: float
    dtype: Any

    def setup(self):
        common = {"dropout": self.dropout, "dtype": self.dtype}
        self.attention = CausalAttention(self.width, self.heads, site=0, **common)
        self.cross_attention = CrossAttention(self.width, self.heads, site=2, **common)
        self.feed_forward = layers.FeedForward(self.feed_forward_width, site=4, **common)

    def remember(self, memory: jax.Array) -> Seen:
        """What cross attention looks at in a memory [B, T, D']."""
        return self.cross_attention.remember(memory)

    def __call__(
        self,
        x: jax.Array,
        written: Seen | None,
        at: jax.Array,
        memory: Seen,
        mask: jax.Array,
        seed: jax.Array | None,
    ) -> tuple[jax.Array, Seen]:
        x = partition.split_rows(x)
        change, written = self.attention(x, written, at, seed)
        x = x + change
        x = x + self.cross_attention(x, memory, mask, seed)
        return x + self.feed_forward(x, seed), written


class CausalAttention(nn.Module):
    """Each symbol attends to itself and to those before it; positions are rotary."""

    width: int
    heads: int
    dropout: float
    dtype: Any
    site: int

    def setup(self):
        each = self.width // self.heads
        self.norm = layers.LayerNorm(self.dtype)
        self.qkv = nn.DenseGeneral((3, self.heads, each), dtype=self.dtype)
        self.project = _projection(self.width, self.dtype)

    def __call__(
        self, x: jax.Array, written: Seen | None, at: jax.Array, seed: jax.Array | None
    ) -> tuple[jax.Array, Seen]:
        """What is added to x [R, U, D], and `written` with x in its place.

        x are the symbols from `at` on; `written` is what is before, None at the start.
        """
        projected = self.qkv(self.norm(x))
        query, key, value = (projected[:, :, i] for i in range(3))  # [R, U, H, W]
        first = 0 if written is None else at
        query, key = layers.rotate(query, first), layers.rotate(key, first)
        now = Seen(key, value)
        if written is not None:
            put = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, at, axis=1)
            now = jax.tree.map(put, written, now)
        places = jnp.arange(now.key.shape[1])[None]  # [1, S]
        mask = places <= first + jnp.arange(x.shape[1])[:, None]  # [U, S]
        context = attention.attend(
            query,
            *now,
            mask[None],
            layers.dropping(self.dropout, seed, self.site),
            np.sqrt(query.shape[-1]),
        )
        return layers.dropout(self.project(context), self.dropout, seed, self.site + 1), now


class CrossAttention(nn.Module):
    """Each symbol attends to the frames of a memory."""

    width: int
    heads: int
    dropout: float
    dtype: Any
    site: int

    def setup(self):
        each = self.width // self.heads
        self.norm = layers.LayerNorm(self.dtype)
        self.query = nn.DenseGeneral((self.heads, each), dtype=self.dtype)
        self.key_value = nn.DenseGeneral((2, self.heads, each), dtype=self.dtype)
        self.project = _projection(self.width, self.dtype)

    def remember(self, memory: jax.Array) -> Seen:
        """The keys and values of a memory [B, T, D'], whose frames say where they are."""
        places = layers.sinusoids(0, memory.shape[1], 1, memory.shape[2])[None]  # [1, T, D']
        projected = self.key_value(memory + jnp.asarray(places, memory.dtype))
        return Seen(projected[:, :, 0], projected[:, :, 1])

    def __call__(
        self, x: jax.Array, memory: Seen, mask: jax.Array, seed: jax.Array | None
    ) -> jax.Array:
        """What is added to x [R, U, D]; mask: bool [B, T]."""
        query = self.query(self.norm(x))  # [R, U, H, W]
        # The hypotheses of one memory are queries of one row: it is kept once.
        together = query.reshape(mask.shape[0], -1, *query.shape[2:])
        context = attention.attend(
            together,
            *memory,
            mask,
            layers.dropping(self.dropout, seed, self.site),
            np.sqrt(query.shape[-1]),
        )
        context = context.reshape(query.shape)
        return layers.dropout(self.project(context), self.dropout, seed, self.site + 1)


def _projection(width: int, dtype: Any) -> nn.Module:
    zeros = nn.initializers.zeros
    return nn.DenseGeneral(width, axis=(-2, -1), dtype=dtype, kernel_init=zeros)
