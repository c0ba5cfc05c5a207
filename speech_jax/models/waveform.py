"""WaveNet (van den Oord et al. 2016) over the samples of a waveform, causal.

`WaveformWaveNet` is an encoder like any other; `SampleModel` is the model of the next sample around
it, which pretrains it and generates. Shapes: B rows, T samples, F frames of log-mel, L layers, D
the width.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speech_jax.errors import UserError
from speech_jax.models import layers, wavenet
from speech_jax.ops import convolution, masking, partition, waveform
from speech_jax.rules import Rules

Pytree = Any


class WaveformWaveNet(nn.Module):
    """Waveform [B, T] to hidden [B, T / hop, width]: the mean over the samples of a frame.

    A sample is heard twice, as it is and by mu-law, with those before it (`taps`): what linear
    prediction needs is there from the beginning, at the cost of a narrow layer. Hidden states hear
    no later samples.

    Attributes:
      width: of the residual stream, of the gates and of what is skipped (D).
      num_layers: of all; the dilations are 1, 2, 4, ... samples.
      cycle: layers after which the dilations start again.
      kernel: taps of a dilated convolution.
      taps: samples that the first layer's input is made of.
      bits: 8: samples are rounded to mu-law classes; 16: they are heard as they are.
      hop: samples of a frame.
      dropout: of what each layer adds.
      remat: whether what a layer computes is computed again for its gradient, to save memory.
      dtype: what the arithmetic runs in; parameters are float32.
    """

    width: int = 64
    num_layers: int = 30
    cycle: int = 10
    kernel: int = 2
    taps: int = 16
    bits: int = 8
    hop: int = 320
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = "float32"

    listens: ClassVar = "waveform"
    above: ClassVar = "(output|norm)/.*"
    rules: ClassVar[Rules] = (
        (r"input", (None, None, "fsdp")),
        (r"input_bias", ()),
        *wavenet.RULES,
    )
    # Tiny is for half an hour on two CPU cores: it hears 18 ms.
    VARIANTS: ClassVar = {
        "tiny": {"num_layers": 12, "cycle": 8},
        "base": {},
        "large": {"width": 256},
    }

    def setup(self):
        if self.bits not in (8, 16):
            raise UserError(
                f"config.model.bits={self.bits} must be 8 (mu-law classes) or 16 (samples as they "
                "are)"
            )
        if self.kernel < 2:
            raise UserError(
                f"config.model.kernel={self.kernel} must be 2 or more: layers hear earlier samples"
            )
        shape = (self.taps, 2, self.width)
        self.input = self.param("input", nn.initializers.lecun_normal(in_axis=(0, 1)), shape)
        self.input_bias = self.param("input_bias", nn.initializers.zeros, (self.width,))
        block = nn.remat(wavenet.Layer) if self.remat else wavenet.Layer
        self.layer = [
            block(self.width, self.kernel, dilation, True, self.dtype)
            for dilation in self.dilations
        ]
        self.output = nn.Dense(self.width, dtype=self.dtype)
        self.norm = layers.LayerNorm(self.dtype)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of each layer, in samples."""
        return tuple(2 ** (i % self.cycle) for i in range(self.num_layers))

    def output_lengths(self, lengths: int | jax.Array) -> int | jax.Array:
        """Hidden frames for `lengths` samples: the whole ones."""
        return convolution.output_length(lengths, self.hop, self.hop)

    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, deterministic: bool, layers_too: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        if inputs.shape[1] < self.hop:
            raise UserError(f"audio has {inputs.shape[1]} samples, a frame needs {self.hop}")
        x, each = self.samples(inputs, deterministic)
        frames = self._pool(x)
        lengths = self.output_lengths(lengths)
        mask = masking.length_mask(lengths, frames.shape[1])
        if layers_too:
            # A stream swings around 0 with the sound: its mean over a frame says little.
            frames = jnp.stack([*(self._pool(nn.relu(x)) for x in each[:-1]), frames], axis=2)
            mask = mask[:, :, None]
        return jnp.where(mask[..., None], frames, jnp.zeros((), frames.dtype)), lengths

    def samples(
        self, inputs: jax.Array, deterministic: bool, conditions: Any = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Hidden states of each sample [B, T, D], and what the layers are given and give.

        conditions: a function of a layer's number to what is added to its gates [B, T, 2 D].
        """
        seed = None
        if not deterministic and self.dropout:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        weight, bias = self.input.astype(self.dtype), self.input_bias.astype(self.dtype)
        heard = self.heard(inputs).astype(self.dtype)
        heard, _, _ = wavenet.reach(self.taps, 1, causal=True).surround(heard, None)
        x = convolution.dilated(heard, weight, 1) + bias[None, None]
        total, each = jnp.zeros_like(x), [x]
        for i, layer in enumerate(self.layer):
            change, skipped, _ = layer(x, None, conditions(i) if conditions else None)
            x = partition.split_rows(x + layers.dropout(change, self.dropout, seed, site=i))
            total = total + skipped
            each.append(x)
        return self.norm(self.output(nn.relu(total + x))), each

    def heard(self, inputs: jax.Array) -> jax.Array:
        """Samples [...] in the two ways in which they are heard: [..., 2]."""
        level = waveform.compress(inputs)
        if self.bits == 8:  # rounded, with the gradient of what is not
            rounded = waveform.level(waveform.classes(inputs))
            level = level + lax.stop_gradient(rounded - level)
            inputs = waveform.expand(level)
        return jnp.stack([inputs, level], axis=-1)

    def _pool(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to the means of frames [B, T', D]."""
        frames = self.output_lengths(x.shape[1])
        x = lax.slice_in_dim(x, 0, frames * self.hop, axis=1)
        x = x.reshape(x.shape[0], frames, self.hop, x.shape[2])
        return x.astype(jnp.float32).mean(axis=2).astype(x.dtype)


class SampleModel(nn.Module):
    """The next sample of a waveform, by those before it and by what it is conditioned on.

    Attributes:
      encoder: a WaveformWaveNet.
      outputs: numbers that the distribution of a sample is given by.
      hop: samples from one frame of log-mel to the next; 0: it is not conditioned on log-mel.
      speakers: how many there are to be conditioned on; 0: it is not.
    """

    encoder: nn.Module
    outputs: int
    hop: int = 0
    speakers: int = 0

    delay = 0
    rules: ClassVar[Rules] = (
        (r"condition/listen/kernel", ()),
        (r"condition/gates/kernel", ("fsdp", None, None)),
        (r"condition/(listen|gates)/bias", ()),
        (r"condition/speakers/embedding", ()),
        (r"head/kernel", ("fsdp", None)),
        (r"head/bias", ()),
    )

    def setup(self):
        if self.hop or self.speakers:
            encoder = self.encoder
            gates = (encoder.num_layers, 2 * encoder.width)
            self.condition = Condition(gates, encoder.width, self.speakers, encoder.dtype)
        self.head = nn.Dense(self.outputs)

    def __call__(
        self,
        previous: jax.Array,
        deterministic: bool,
        mels: jax.Array | None = None,
        frames: jax.Array | None = None,
        speaker: jax.Array | None = None,
    ) -> jax.Array:
        """The distribution of each sample, float32 [B, T, outputs].

        Args:
          previous: the waveform [B, T] a sample late: the one before each that is predicted.
          mels, frames: log-mel [B, F, M] and its lengths [B]; frame f is of sample f * hop on.
          speaker: int [B], -1 where nobody knows.
        """
        conditions, length = None, previous.shape[1]
        table = self.conditions(mels, frames, speaker)
        if table is not None:
            conditions = lambda i: self._over_time(table[:, :, i], length)
        x, _ = self.encoder.samples(previous, deterministic, conditions)
        return self.head(nn.relu(x).astype(jnp.float32))

    def conditions(
        self, mels: jax.Array | None, frames: jax.Array | None, speaker: jax.Array | None
    ) -> jax.Array | None:
        """What is added to the gates of all layers: [B, F, L, 2 D], F = 1 without log-mel."""
        if not self.hop and not self.speakers:
            return None
        return self.condition(mels if self.hop else None, frames, speaker)

    # ---- A sample at a time --------------------------------------------------------------------

    @nn.nowrap
    def start(self, rows: int) -> Pytree:
        """The carry before the first sample: what was heard and computed of those before it.

        The normalized inputs of all layers lie in one ring, where a sample is one write; `time`,
        the number of samples so far, is the same for all rows.
        """
        encoder = self.encoder
        longest = (encoder.kernel - 1) * max(encoder.dilations)
        ring = (rows, longest, encoder.num_layers, encoder.width)
        return {
            "heard": jnp.zeros((rows, encoder.taps - 1, 2)),
            "ring": jnp.zeros(ring, encoder.dtype),
            "time": jnp.zeros((), jnp.int32),
        }

    def advance(self, carry: Pytree, piece: Pytree) -> tuple[jax.Array, Pytree]:
        """Distributions float32 [B, N, outputs] of the samples after a piece: see stepwise.py.

        A piece is {"previous": float32 [B, N]}, and with a condition {"gates": [B, N, L, 2 D]},
        which is `gates_at` the samples that are predicted.
        """
        weights = self.weights()

        def one(carry, piece):
            outputs, carry = self.step(weights, carry, piece["previous"], piece.get("gates"))
            return carry, outputs

        over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), piece)
        carry, outputs = lax.scan(one, carry, over_time)
        return jnp.moveaxis(outputs, 0, 1), carry

    def weights(self) -> Pytree:
        """The parameters as `step` takes them: in the dtype of the arithmetic, what can be joined.

        They are made once for all samples.
        """
        params = self.variables["params"]
        encoder, head = params["encoder"], params["head"]
        each = [encoder[f"layer_{i}"] for i in range(self.encoder.num_layers)]
        join = lambda leaf: [
            jnp.concatenate([x["project"][leaf], x["skip"][leaf]], axis=-1) for x in each
        ]
        low = {
            "input": encoder["input"].reshape(-1, self.encoder.width),
            "input_bias": encoder["input_bias"],
            "past": jnp.stack([x["gate"][:-1] for x in each]),  # [L, K - 1, D, 2 D]
            "gate_bias": jnp.stack([x["gate_bias"] for x in each]),
            "now": [x["gate"][-1] for x in each],
            "both": join("kernel"),
            "both_bias": join("bias"),
            "output": encoder["output"],
        }
        low = jax.tree.map(lambda x: x.astype(self.encoder.dtype), low)
        norms = [x["norm"]["layer"] for x in (*each, encoder)]
        return {**low, "norms": norms, "head": head}

    @nn.nowrap
    def step(
        self, weights: Pytree, carry: Pytree, previous: jax.Array, gates: jax.Array | None = None
    ) -> tuple[jax.Array, Pytree]:
        """The distribution [B, outputs] of the sample after `previous` [B], and the next carry.

        It is what the whole gives, written for little work: what all layers hear of the past is
        read at once, and written at once.
        """
        encoder, ring, time = self.encoder, carry["ring"], carry["time"]
        rows, length, width = len(previous), ring.shape[1], encoder.width
        heard = encoder.heard(previous)[:, None]
        heard = jnp.concatenate([carry["heard"], heard.astype(jnp.float32)], axis=1)
        x = heard.reshape(rows, -1).astype(encoder.dtype) @ weights["input"]
        x = x + weights["input_bias"][None]
        # What each layer's taps heard, the oldest first.
        back = np.arange(encoder.kernel - 1, 0, -1)[None] * np.asarray(encoder.dilations)[:, None]
        places = (time - back + length * (back.max() // length + 1)) % length  # [L, K - 1]
        past = ring[:, places, np.arange(encoder.num_layers)[:, None]]  # [B, L, K - 1, D]
        opened = jnp.einsum("blkd,lkdg->blg", past, weights["past"]) + weights["gate_bias"][None]
        if gates is not None:
            opened = opened + gates
        total, hears = jnp.zeros_like(x), []
        for i in range(encoder.num_layers):
            hears.append(_normalized(x, weights["norms"][i], encoder.dtype))
            value, gate = jnp.split(opened[:, i] + hears[i] @ weights["now"][i], 2, axis=-1)
            hidden = jnp.tanh(value) * nn.sigmoid(gate)
            both = hidden @ weights["both"][i] + weights["both_bias"][i][None]
            x, total = x + both[:, :width], total + both[:, width:]
        hears = jnp.stack(hears, axis=1)[:, None]  # [B, 1, L, D]
        ring = lax.dynamic_update_slice_in_dim(ring, hears, time % length, axis=1)
        output = weights["output"]
        x = nn.relu(total + x) @ output["kernel"] + output["bias"][None]
        x = nn.relu(_normalized(x, weights["norms"][-1], encoder.dtype)).astype(jnp.float32)
        outputs = x @ weights["head"]["kernel"] + weights["head"]["bias"][None]
        return outputs, {"heard": heard[:, 1:], "ring": ring, "time": time + 1}

    @nn.nowrap
    def gates_at(self, table: jax.Array, time: jax.Array) -> jax.Array:
        """What `conditions` says of sample number `time`: [B, L, 2 D] of [B, F, L, 2 D]."""
        if not self.hop:
            return table[:, 0]
        frame, share = time // self.hop, (time % self.hop).astype(table.dtype) / self.hop
        first, second = (
            jnp.where(f < table.shape[1], lax.dynamic_index_in_dim(table, f, 1, False), 0.0)
            for f in (frame, frame + 1)
        )
        return first * (1 - share) + second * share

    def _over_time(self, table: jax.Array, length: int) -> jax.Array:
        """[B, F, 2 D] to [B, length, 2 D]."""
        return waveform.interpolate(table, self.hop, length) if self.hop else table


def _normalized(x: jax.Array, norm: Pytree, dtype: Any) -> jax.Array:
    """layers.LayerNorm of [B, D], by its parameters."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    x = (x - mean) * lax.rsqrt(variance + 1e-5)
    return (x * norm["scale"][None] + norm["bias"][None]).astype(dtype)


def generate(
    model: SampleModel,
    params: Pytree,
    rng: jax.Array,
    samples: int,
    mels: jax.Array | None = None,
    frames: jax.Array | None = None,
    speaker: jax.Array | None = None,
    rows: int = 1,
) -> jax.Array:
    """Waveforms [rows, samples] that the model draws, sample by sample, in one loop.

    The work of a sample does not grow with those before it (Paine et al. 2016).

    Args:
      rng: a key. mels, frames, speaker: as of SampleModel, of `rows` rows.
    """
    variables = {"params": params}
    weights = model.apply(variables, method="weights")
    table = model.apply(variables, mels, frames, speaker, method="conditions")
    draw = waveform.draw_class if model.encoder.bits == 8 else waveform.draw_logistic

    def one(state, given):
        carry, previous = state
        time, uniform = given
        gates = None if table is None else model.gates_at(table, time)
        outputs, carry = model.step(weights, carry, previous, gates)
        drawn = draw(outputs, uniform)
        return (carry, drawn), drawn

    first = (model.start(rows), jnp.zeros(rows))
    uniform = jax.random.uniform(rng, (samples, rows, 2))
    _, drawn = lax.scan(one, first, (jnp.arange(samples), uniform))
    return drawn.T


class Condition(nn.Module):
    """Log-mel [B, F, M], speakers int [B], or both, to what they add to gates: [B, F, *gates]."""

    gates: tuple[int, int]
    width: int
    speakers: int
    dtype: Any

    @nn.compact
    def __call__(
        self, mels: jax.Array | None, frames: jax.Array | None, speaker: jax.Array | None
    ) -> jax.Array:
        x = jnp.zeros((1, 1, self.width), self.dtype)
        if mels is not None:
            mask = masking.length_mask(frames, mels.shape[1])[:, :, None]
            # Nats of speech, to numbers around 0.
            x = jnp.where(mask, (mels + 6.0) / 4.0, 0.0).astype(self.dtype)
            # Two frames to each side: a frame's window begins with its samples, and ends later.
            x = nn.Conv(self.width, (5,), dtype=self.dtype, name="listen")(x)
        if self.speakers:
            known = (speaker >= 0)[:, None]
            embedding = nn.Embed(self.speakers, self.width, dtype=self.dtype, name="speakers")
            voice = jnp.where(known, embedding(jnp.maximum(speaker, 0)), 0.0)
            x = x + voice.astype(self.dtype)[:, None]
        zeros = nn.initializers.zeros
        x = nn.DenseGeneral(self.gates, dtype=self.dtype, kernel_init=zeros, name="gates")(
            nn.relu(x)
        )
        return x if mels is None else jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
