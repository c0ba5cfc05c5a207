"""An n-gram language model on the device: hash tables of its arcs, one state a hypothesis.

A state is the longest context that the model knows of what was said; an arc leads from a state by
a label to a probability and the next state. Where there is no arc, the state falls back to a
shorter one. An arc is in one of two places (Pagh and Rodler, "Cuckoo hashing", 2004), so that
looking one up takes two reads, whatever the size.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speech_jax.decoding.ngram import BEGIN, END, SPACE, UNKNOWN, LanguageModelError, NGrams

_LN10 = math.log(10)
_SEEDS = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)
_NO_ARC = 2**32 - 1  # a key


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "keys", "gains", "targets", "backoff", "shorter", "root", "root_target", "ends", "weight",
        "bonus",
    ),
    meta_fields=("order", "start"),
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Fusion:
    """The tables. Called with states and labels, it gives what they add to a score.

    Attributes:
      keys: uint32 [2 M], state * K + label of the arc in each place of both tables.
      gains: float32 [2 M], nats; targets: int32 [2 M], the next states.
      backoff: float32 [S], nats; shorter: int32 [S], the state to fall back to.
      root: float32 [K], nats of each label without a context; root_target: int32 [K].
      ends: float32 [S], nats of the end of a text in each state.
      weight: float32, what nats are multiplied by; bonus: float32, nats added for each label.
      order: of the model; start: the state in which a text begins.
    """

    keys: jax.Array
    gains: jax.Array
    targets: jax.Array
    backoff: jax.Array
    shorter: jax.Array
    root: jax.Array
    root_target: jax.Array
    ends: jax.Array
    weight: jax.Array
    bonus: jax.Array
    order: int
    start: int

    def __call__(self, state: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(what is added, next state) for labels int32 [...] said in states int32 [...]."""
        total = jnp.zeros(state.shape, jnp.float32)
        place, done = jnp.zeros(state.shape, jnp.int32), jnp.zeros(state.shape, bool)
        for _ in range(self.order - 1):
            key = state.astype(jnp.uint32) * np.uint32(len(self.root)) + label.astype(jnp.uint32)
            for candidate in _places(key, len(self.keys)):
                hit = ~done & (self.keys[candidate] == key)
                place = jnp.where(hit, candidate, place)
                done |= hit
            total += jnp.where(done, 0.0, self.backoff[state])
            state = jnp.where(done, state, self.shorter[state])
        gain = total + jnp.where(done, self.gains[place], self.root[label])
        target = jnp.where(done, self.targets[place], self.root_target[label])
        return self.weight * gain + self.bonus, target

    def end(self, state: jax.Array) -> jax.Array:
        """What the end of a text adds in states int32 [...]."""
        return self.weight * self.ends[state]

    def weighed(self, weight: float, bonus: float) -> "Fusion":
        """The same tables with another weight and bonus."""
        return dataclasses.replace(self, weight=jnp.float32(weight), bonus=jnp.float32(bonus))


def _places(key: Any, size: int) -> Iterator[Any]:
    """The two places of arcs, in tables that lie behind each other; numpy or jax arrays.

    `size` is that of both together, a power of 2.
    """
    for table, seed in enumerate(_SEEDS):
        mixed = key * seed
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
        mixed = mixed ^ (mixed >> np.uint32(13))
        half = np.uint32(size // 2)
        yield ((mixed & (half - np.uint32(1))) + np.uint32(table) * half).astype(np.int32)


def make(model: NGrams, spellings: Sequence[str], weight: float, bonus: float = 0.0) -> Fusion:
    """The tables of a language model whose units are a tokenizer's labels.

    Args:
      spellings: what each label writes, the blank first; the model has a unit for it with a
        '\u2581' for each space.
      weight: what the log probabilities are multiplied by.
      bonus: nats that are added for each label.

    Raises:
      LanguageModelError: its units are not labels, so it is of something else.
    """
    labels = np.asarray([model.ids.get(one.replace(" ", SPACE), -1) for one in spellings[1:]])
    if (labels >= 0).sum() < max(1, 0.9 * len(model.named)):
        raise LanguageModelError(
            f"{(labels >= 0).sum()} of the language model's {len(model.named)} units are labels of "
            "the model: build one of its labels with `python -m speech_jax.decoding.lm build TEXT "
            "OUT.arpa --model MODEL`"
        )
    label_of = np.full(len(model.units), -1)
    label_of[labels[labels >= 0]] = np.flatnonzero(labels >= 0) + 1
    states = _States(model)
    arcs = [states.arcs(n, label_of) for n in range(2, model.order + 1)]
    arcs = arcs or [tuple(np.zeros((4, 0), np.int64))]
    state, label, log10, target = (np.concatenate(one) for one in zip(*arcs, strict=True))
    keys = state * len(spellings) + label
    if len(states.backoff) * len(spellings) >= _NO_ARC:
        raise LanguageModelError(
            f"{len(states.backoff)} contexts of {len(spellings)} labels are too many for the "
            "device: build it with a lower --order"
        )
    slots = _cuckoo(keys.astype(np.uint32))
    placed = lambda value, empty: jnp.asarray(np.append(value, empty)[slots])  # the slot -1: empty
    first = model.levels[0]
    unknown = model.ids.get(UNKNOWN)
    rare = _LEAST if unknown is None else first.log10[unknown]
    root = np.where(labels >= 0, first.log10[labels], rare) * _LN10
    root_target = np.where(labels >= 0, states.kept[1][labels], 0)
    return Fusion(
        keys=placed(keys.astype(np.uint32), np.uint32(_NO_ARC)),
        gains=placed((log10 * _LN10).astype(np.float32), np.float32(0)),
        targets=placed(target.astype(np.int32), np.int32(0)),
        backoff=jnp.asarray(states.backoff * _LN10, jnp.float32),
        shorter=jnp.asarray(states.shorter, jnp.int32),
        root=jnp.asarray(np.append(0, root), jnp.float32),
        root_target=jnp.asarray(np.append(0, root_target), jnp.int32),
        ends=jnp.asarray(states.ends(model.ids[END]) * _LN10, jnp.float32),
        weight=jnp.float32(weight),
        bonus=jnp.float32(bonus),
        order=model.order,
        start=int(states.kept[1][model.ids[BEGIN]]),
    )


_LEAST = -7.0  # log10 of a label that a model without <unk> does not know


class _States:
    """The nodes of a model as numbers: 0 is no context, then level after level but the last.

    Attributes:
      kept: by level, the state that a text is in after each n-gram: its node, or that of its end if
        the node says nothing more (no n-gram goes on from it, and its backoff is 1).
      shorter: the state that each falls back to; backoff: log10.
    """

    def __init__(self, model: NGrams):
        self._model = model
        sizes = [1, *(len(level) for level in model.levels)]
        self._first = np.cumsum([0, *sizes])  # of the states of each level; 0: no context
        self.backoff = np.concatenate([[0.0], *(one.backoff for one in model.levels[:-1])])
        count = len(self.backoff)
        self.shorter = np.zeros(count, np.int64)
        self.kept = {0: np.zeros(1, np.int64)}
        kept = np.zeros(count, np.int64)
        for n, level in enumerate(model.levels, 1):
            # The end of an n-gram is the end of what is before its last unit, and that unit.
            if n == 1:
                end = np.zeros(len(level), np.int64)
            else:
                end = self._after(self.shorter[self._first[n - 1] + level.before], level.unit)
            if n == model.order:
                self.kept[n] = kept[end] if n > 1 else end
                break
            here = self._first[n] + np.arange(len(level))
            goes_on = np.bincount(model.levels[n].before, minlength=len(level)) > 0
            self.kept[n] = np.where(goes_on | (level.backoff != 0), here, kept[end])
            kept[here], self.shorter[here] = self.kept[n], kept[end]

    def _after(self, state: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """The longest state that is a state and one more unit, or the end of that."""
        found = np.full(len(state), -1)
        state = state.copy()
        while True:
            level = np.searchsorted(self._first, state, side="right") - 1
            for n in np.unique(level[found < 0]):
                at = np.flatnonzero((level == n) & (found < 0))
                node = self._model.find(n + 1, state[at] - self._first[n], unit[at])
                found[at] = np.where(node >= 0, self._first[n + 1] + node, -1)
            left = found < 0
            found[left & (state == 0)] = 0
            if not left.any():
                return found
            state = np.where(left, self.shorter[state], state)

    def arcs(self, n: int, label_of: np.ndarray) -> tuple[np.ndarray, ...]:
        """(state, label, log10, next state) of the n-grams of level n that end in a label."""
        level = self._model.levels[n - 1]
        label = label_of[level.unit]
        use = label >= 0
        state = self._first[n - 1] + level.before
        return state[use], label[use], level.log10[use], self.kept[n][use]

    def ends(self, unit: int) -> np.ndarray:
        """log10 of a unit in each state."""
        found = np.zeros(len(self.backoff))
        found[0] = self._model.levels[0].log10[unit]
        for n in range(1, self._model.order):
            here = np.arange(self._first[n], self._first[n + 1])
            node = self._model.find(n + 1, here - self._first[n], np.asarray(unit))
            falls = self.backoff[here] + found[self.shorter[here]]
            found[here] = np.where(node >= 0, self._model.levels[n].log10[node], falls)
        return found


def _cuckoo(keys: np.ndarray) -> np.ndarray:
    """Which of the distinct keys is in each place of both tables, int64 [2 M]; -1 for none."""
    size = 2 << max(1, math.ceil(1.1 * len(keys)) - 1).bit_length()
    while True:
        places = list(_places(keys, size))
        slots = np.full(size, -1)
        waiting = np.arange(len(keys))
        for turn in range(200):  # from one table to the other, and back
            place = places[turn % 2][waiting]
            evicted = slots[place]
            slots[place] = waiting
            beaten = waiting[slots[place] != waiting]
            waiting = np.concatenate([beaten, np.unique(evicted[evicted >= 0])])
            if not len(waiting):
                return slots
        size *= 2
