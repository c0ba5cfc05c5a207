"""Adversarial training in the step: the gradient of the loss makes the inputs that it trains on.

`gradients(task, adversary)` takes the place of `step.gradients(task)`. Methods: `fgsm` (Goodfellow
et al. 2015; with a random start Wong et al. 2020), `pgd` (Madry et al. 2018) and `vat` (virtual
adversarial training without labels, Miyato et al. 2018). Whatever the task and the encoder, the
input is perturbed row by row inside a ball.

Cost, in passes forward and backward over a batch: none 1; fgsm 2, for the clean pass yields the
gradients of parameters and inputs together; pgd 1 + steps; vat 2.3 + steps. A random start costs
fgsm and pgd one more where alpha < 1, because the clean loss is then taken elsewhere. Inner passes
need no gradient of the parameters, which makes them cheaper by about a third.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.errors import UserError
from speech_jax.ops import features, masking
from speech_jax.training import step as steps
from speech_jax.training.step import Loss

Batch = dict[str, jax.Array]

METHODS = ("none", "fgsm", "pgd", "vat")
SPACES = ("waveform", "features")
NORMS = ("linf", "l2")
STATISTICS = ("clean", "adversarial", "both")

# Perturbations are whole multiples of this, and PCM of 2**-15. Added to PCM they are then exact in
# float32, so that no rounding carries a sample out of its ball.
_GRID = 2.0**-24
_LOW, _HIGH = -1.0, 32767.0 / 32768.0  # what int16 holds
# A float32 mean of squares over minutes of audio is right to this fraction.
_SLACK = 1e-4
# Random streams beside those that tasks and accumulation fold in, which count from 0.
_START, _OUTER = 1 << 20, 1 << 21


@dataclasses.dataclass(frozen=True)
class Adversary:
    """What is done to the inputs in training: the section `adversarial` of a configuration.

    Attributes:
      method: none, fgsm, pgd or vat.
      space: 'waveform' (full scale is 1) or 'features' (log-mel in nats, before normalization).
      norm: 'linf' bounds the largest change of a sample, 'l2' the root mean square over an
        utterance, so that a bound means the same for short and long ones.
      epsilon: the bound.
      snr_db: in place of epsilon, of waveforms: the bound is so many decibels below the utterance's
        root mean square.
      alpha: the loss is (1 - alpha) clean + alpha adversarial; of vat, clean + alpha divergence.
      steps: ascents of pgd and vat.
      step_size: of an ascent, as a fraction of epsilon; 0 stands for 1 (fgsm), 1.25 (fgsm from a
        random start), 2.5 / steps (pgd) or 2 (vat).
      random_start: begin at a random point of the ball. vat always begins close to the centre.
      warmup: steps over which epsilon rises from 0.
      every: only every so many steps are adversarial; the others are clean and cost as much.
      same_masks: dropout and SpecAugment of the adversarial pass are those of the clean one.
      statistics: which pass batch normalization learns from: clean, adversarial or both in turn.
      int16: perturbations are whole steps of int16, as an audio file would hold them.
    """

    method: str = "none"
    space: str = "waveform"
    norm: str = "linf"
    epsilon: float = 0.001
    snr_db: float | None = None
    alpha: float = 0.5
    steps: int = 3
    step_size: float = 0.0
    random_start: bool = False
    warmup: int = 0
    every: int = 1
    same_masks: bool = True
    statistics: str = "clean"
    int16: bool = False

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS, "space": SPACES, "norm": NORMS, "statistics": STATISTICS
        }  # fmt: skip
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise _error(key, getattr(self, key), f"must be one of {', '.join(known)}")
        for key in ("epsilon", "step_size", "warmup"):
            if getattr(self, key) < 0:
                raise _error(key, getattr(self, key), "must not be negative")
        for key in ("steps", "every"):
            if getattr(self, key) < 1:
                raise _error(key, getattr(self, key), "must be at least 1")
        if not 0 <= self.alpha <= 1 and self.method != "vat":
            raise _error("alpha", self.alpha, "must be in [0, 1]")
        if self.space == "features" and (self.snr_db is not None or self.int16):
            raise _error("space", self.space, "has neither snr_db nor int16: use space='waveform'")

    @property
    def rate(self) -> float:
        """The size of an ascent as a fraction of the ball's radius."""
        usual = {"pgd": 2.5 / self.steps, "vat": 2.0, "fgsm": 1.25 if self.random_start else 1.0}
        return self.step_size or usual.get(self.method, 1.0)

    def ball(self, task: Any, batch: Batch, step: jax.Array | int) -> "Ball":
        """What may be added to a batch at a step."""
        scale = jnp.minimum(1.0, step / self.warmup) if self.warmup else 1.0
        return Ball(
            task,
            batch,
            space=self.space,
            norm=self.norm,
            epsilon=_round_down(self.epsilon),
            snr_db=self.snr_db,
            scale=scale,
            int16=self.int16,
        )


def _round_down(value: float) -> np.float32:
    rounded = np.float32(value)
    return rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(0))


def _error(key: str, value: Any, cure: str) -> UserError:
    return UserError(f"config.adversarial.{key}={value!r} {cure}")


# ---- The ball ----------------------------------------------------------------------------------


class Ball:
    """The inputs of a batch and what may be added to them, for use inside a traced function.

    A perturbation is float32 of the inputs' shape ([B, T] or [B, F, mels]), exactly 0 on padding.
    In the waveform, the perturbed samples stay in the range of int16 and, where the batch is PCM,
    `perturb` adds without rounding: the bounds hold for the sums to the last bit.
    """

    def __init__(
        self,
        task: Any,
        batch: Batch,
        *,
        space: str,
        norm: str,
        epsilon: jax.Array | float,
        snr_db: float | None = None,
        int16: bool = False,
        scale: jax.Array | float = 1.0,
    ):
        """The settings of Adversary; `scale` multiplies the radius. It and epsilon may be traced.

        Of the task, its front end is needed; of the batch, the audio, its lengths and the index.
        """
        self.batch, self.norm, self.waveform, self.int16 = batch, norm, space == "waveform", int16
        if self.waveform:
            self.inputs = features.to_waveform(batch["audio"])
            self.valid = masking.length_mask(batch["audio_length"], self.inputs.shape[1])
        else:
            if task.frontend.listens == "waveform":
                raise UserError(
                    "config.adversarial.space='features' needs an encoder of log-mel; this one "
                    "listens to the waveform: use space='waveform'"
                )
            self.inputs, frames = task.frontend.features(batch)
            self.valid = masking.length_mask(frames, self.inputs.shape[1])[:, :, None]
        if snr_db is None:
            radius = jnp.full((1,) * self.inputs.ndim, epsilon, jnp.float32)
        else:
            radius = self._rms(self.inputs) * (1 - _SLACK) * 10.0 ** (-snr_db / 20)
        self.radius = radius * scale

    def place(self, inputs: jax.Array) -> Batch:
        """The batch with other inputs; its other fields stay as they are."""
        return {**self.batch, "audio" if self.waveform else "features": inputs}

    def perturb(self, delta: jax.Array) -> Batch:
        """The batch with a perturbation."""
        return self.place(self.inputs + delta)

    def zeros(self) -> jax.Array:
        """The centre."""
        return jnp.zeros_like(self.inputs)

    def random(self, rng: jax.Array) -> jax.Array:
        """Uniform in an L-infinity ball; a random direction and length in an L2 ball.

        A row is drawn by the index of its utterance: it depends on neither the batch nor the mesh.
        """
        keys = jax.vmap(lambda index: jax.random.fold_in(rng, index))(self.batch["index"])
        row = self.inputs.shape[1:]
        if self.norm == "linf":
            drawn = jax.vmap(lambda key: jax.random.uniform(key, row, minval=-1.0))(keys)
        else:
            keys = jax.vmap(jax.random.split)(keys)
            drawn = self._direction(jax.vmap(lambda key: jax.random.normal(key, row))(keys[:, 0]))
            lengths = jax.vmap(lambda key: jax.random.uniform(key, (1,) * len(row)))(keys[:, 1])
            drawn = drawn * lengths
        return self.project(drawn * self.radius)

    def ascend(self, delta: jax.Array, slope: jax.Array, rate: jax.Array | float) -> jax.Array:
        """A step of `rate` radii along the gradient `slope`, back into the ball."""
        return self.project(delta + rate * self.radius * self._direction(slope))

    def maximize(
        self,
        loss: Callable[[Batch], jax.Array],
        delta: jax.Array,
        steps: jax.Array | int,
        rate: jax.Array | float,
    ) -> jax.Array:
        """`steps` (an int, or traced) ascents of a function of the batch, from `delta`."""
        slope = jax.grad(lambda inputs: loss(self.place(inputs)))
        return jax.lax.fori_loop(
            0, steps, lambda _, d: self.ascend(d, slope(self.inputs + d), rate), delta
        )

    def finish(self, delta: jax.Array) -> jax.Array:
        """The part of a perturbation that is kept: all of it, or whole steps of int16."""
        # Towards 0, so neither the ball nor the range is left. Only at the end: an ascent of less
        # than a step would otherwise never move.
        return jnp.trunc(delta * 32768.0) / 32768.0 if self.int16 else delta

    def project(self, delta: jax.Array) -> jax.Array:
        """The closest perturbation that is allowed (but for rounding towards 0)."""
        delta = jnp.where(self.valid, delta, 0.0)
        if self.norm == "linf":
            delta = jnp.clip(delta, -self.radius, self.radius)
        else:
            longest = self.radius * (1 - _SLACK)
            delta = delta * jnp.minimum(1.0, longest / jnp.maximum(self._rms(delta), 1e-30))
        if self.waveform:
            delta = jnp.trunc(delta / _GRID) * _GRID
            delta = jnp.clip(self.inputs + delta, _LOW, _HIGH) - self.inputs
        return delta

    def _direction(self, slope: jax.Array) -> jax.Array:
        """The steepest ascent of length 1 in the norm; 0 where there is no slope."""
        slope = jnp.where(self.valid, slope, 0.0)
        if self.norm == "linf":
            return jnp.sign(slope)
        # Scaled first: squares of small gradients are not float32 numbers.
        axes = tuple(range(1, slope.ndim))
        slope = slope / jnp.maximum(jnp.abs(slope).max(axes, keepdims=True), 1e-30)
        return slope / jnp.maximum(self._rms(slope), 1e-30)

    def _rms(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        valid = jnp.broadcast_to(self.valid, x.shape)
        count = valid.astype(jnp.float32).sum(axes, keepdims=True)
        power = jnp.where(valid, jnp.square(x), 0.0).sum(axes, keepdims=True)
        return jnp.sqrt(power / jnp.maximum(count, 1.0))


# ---- Gradients ---------------------------------------------------------------------------------


def gradients(task: Any, adversary: Adversary) -> Callable:
    """The gradient function (training/step.py) of what the adversary makes of a task's loss.

    vat needs `task.logits(params, state, batch, rng, step) -> (logits [B, T', K], frames [B],
    state)`. The model must pass a gradient to its inputs (wav2vec2 with feature_gradient=0 does
    not).

    Raises:
      UserError: the task or encoder has no such space, or no logits.
    """
    clean = steps.gradients(task)
    nothing = adversary.epsilon == 0 and adversary.snr_db is None
    if adversary.method == "none" or nothing:
        return clean
    if adversary.method == "vat":
        if not hasattr(task, "logits"):
            raise UserError(
                "config.adversarial.method='vat' needs a task with logits, and this one has none: "
                "use fgsm or pgd with the task's own loss"
            )
        function = _virtual(task, adversary)
    else:
        function = _adversarial(task, adversary)
    if adversary.every == 1:
        return function

    def sometimes(params, state, batch, rng, step):
        turn = step % adversary.every == 0
        return jax.lax.cond(turn, function, clean, params, state, batch, rng, step)

    return sometimes


def _adversarial(task: Any, adversary: Adversary) -> Callable:
    """FGSM and PGD: a clean pass, ascents, a pass over the perturbed batch."""
    alpha = adversary.alpha
    ascents = adversary.steps if adversary.method == "pgd" else 1
    gradient_at = steps.gradients(task)

    def function(params, state, batch, rng, step):
        ball = adversary.ball(task, batch, step)
        remaining, first = ascents, None
        if alpha < 1 and not adversary.random_start:
            first, slope = _with_slope(task, params, state, ball, ball.inputs, rng, step)
            delta, remaining = ball.ascend(ball.zeros(), slope, adversary.rate), ascents - 1
        else:
            if alpha < 1:
                first = gradient_at(params, state, batch, rng, step)
            elif adversary.statistics != "adversarial" and jax.tree.leaves(state):
                first = None, Loss(*task.loss(params, state, batch, rng, step))
            random = adversary.random_start
            delta = ball.random(jax.random.fold_in(rng, _START)) if random else ball.zeros()
        first, delta = _after(first, delta)
        if remaining:
            loss = lambda batch: task.loss(params, state, batch, rng, step)[0]
            delta = ball.maximize(loss, delta, remaining, adversary.rate)
        second_state = first[1].aux["state"] if first and adversary.statistics == "both" else state
        second_rng = rng if adversary.same_masks else jax.random.fold_in(rng, _OUTER)
        second = gradient_at(
            params, second_state, ball.perturb(ball.finish(delta)), second_rng, step
        )
        if not first:
            return second
        new_state = (first if adversary.statistics == "clean" else second)[1].aux["state"]
        if alpha < 1:
            second = _without_state(second)
            # In this form the result is the clean one, bit for bit, where the two are equal.
            second = jax.tree.map(lambda c, a: c + alpha * (a - c), _without_state(first), second)
        second[1].aux["state"] = new_state
        return second

    return function


def _virtual(task: Any, adversary: Adversary) -> Callable:
    """VAT: the loss, and alpha times the divergence from the clean output that can be reached."""
    gradient_at = steps.gradients(task)

    def function(params, state, batch, rng, step):
        ball = adversary.ball(task, batch, step)
        second_rng = rng if adversary.same_masks else jax.random.fold_in(rng, _OUTER)
        gradient, first = gradient_at(params, state, batch, rng, step)
        clean = jax.nn.log_softmax(task.logits(params, state, batch, rng, step)[0])

        def divergence(params, state, batch, rng):
            logits, frames, state = task.logits(params, state, batch, rng, step)
            gaps = jnp.exp(clean) * (clean - jax.nn.log_softmax(logits))
            valid = masking.length_mask(frames, logits.shape[1])
            nats = jnp.where(valid, gaps.sum(-1), 0.0).sum(1)
            return adversary.alpha * (nats * batch["weight"]).sum(), state

        # At the centre the divergence has no slope.
        delta = ball.project(0.1 * ball.random(jax.random.fold_in(rng, _START)))
        (gradient, first, clean), delta = _after((gradient, first, clean), delta)
        loss = lambda batch: divergence(params, state, batch, rng)[0]
        delta = ball.maximize(loss, delta, adversary.steps, adversary.rate)
        both = adversary.statistics == "both"
        (total, new_state), other = jax.value_and_grad(divergence, has_aux=True)(
            params,
            first.aux["state"] if both else state,
            ball.perturb(ball.finish(delta)),
            second_rng,
        )
        if adversary.statistics != "clean":
            first.aux["state"] = new_state
        gradient = jax.tree.map(jnp.add, gradient, other)
        return gradient, first._replace(sum=first.sum + total)

    return function


def _with_slope(
    task: Any,
    params: Any,
    state: Any,
    ball: Ball,
    inputs: jax.Array,
    rng: jax.Array,
    step: jax.Array | int,
) -> tuple[tuple[Any, Loss], jax.Array]:
    """((gradient of the parameters, Loss), gradient of the inputs), in one pass back."""

    def loss(params, inputs):
        total, weight, aux = task.loss(params, state, ball.place(inputs), rng, step)
        return total, (weight, aux)

    passes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, (weight, aux)), (gradient, slope) = passes(params, inputs)
    return (gradient, Loss(total, weight, aux)), slope


def _after(first: Any, delta: jax.Array) -> tuple[Any, jax.Array]:
    """Holds what comes after back until all of the first pass is done, and its activations gone."""
    return jax.lax.optimization_barrier((first, delta)) if first else (first, delta)


def _without_state(result: tuple[Any, Loss]) -> tuple[Any, Loss]:
    gradient, loss = result
    aux = {name: value for name, value in loss.aux.items() if name != "state"}
    return gradient, loss._replace(aux=aux)
