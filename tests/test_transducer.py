"""Transducer losses against brute force in float64; the joint in pieces, and in a band."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax.ops import transducer, transducer_band
from speech_jax.ops.transducer import Joint

PLAIN = ((1, 0), (0, 1))
DURATIONS = (0, 1, 2, 3, 4)


def by_paths(arcs, moves, frames, labels):
    """Log-likelihood and occupancy [A, T, U1] in float64, path by path of nodes.

    A path is followed arc by arc from the first node, with the logarithms of all that leads to a
    node and of all that follows it; what `moves` means is written out here once more.
    """
    A, T, U1 = arcs.shape
    into = np.full((T + 1, U1), -np.inf)
    into[0, 0] = 0
    steps = []
    for t, u in itertools.product(range(frames), range(labels + 1)):
        for a in range(A):
            to = t + moves[a][0], u + moves[a][1]
            ends = to == (frames, labels) and moves[a][1] == 0
            if to[1] <= labels and (to[0] < frames or ends):
                steps.append((a, t, u, *to))
    for a, t, u, x, y in steps:
        into[x, y] = np.logaddexp(into[x, y], into[t, u] + arcs[a, t, u])
    outof = np.full((T + 1, U1), -np.inf)
    outof[frames, labels] = 0
    occupancy = np.zeros((A, T, U1))
    for a, t, u, x, y in reversed(steps):
        outof[t, u] = np.logaddexp(outof[t, u], arcs[a, t, u] + outof[x, y])
        occupancy[a, t, u] = into[t, u] + arcs[a, t, u] + outof[x, y]
    total = into[frames, labels]
    for a, t, u, _, _ in steps:
        occupancy[a, t, u] = np.exp(occupancy[a, t, u] - total) if total > -np.inf else 0
    return total, occupancy


def counted(arcs, moves, frames, labels):
    """The likelihood by naming every path: the brute force of the brute force."""

    def on(t, u):
        if (t, u) == (frames, labels):
            return 1.0
        total = 0.0
        for a, (taken, said) in enumerate(moves):
            ends = (t + taken, u + said) == (frames, labels) and not said
            if t < frames and u + said <= labels and (t + taken < frames or ends):
                total += np.exp(arcs[a, t, u]) * on(t + taken, u + said)
        return total

    return np.log(on(0, 0))


def problem(rng, B, T, U, K, durations=0):
    logits = (3 * rng.standard_normal((B, T, U + 1, K + durations))).astype(np.float32)
    frames = rng.integers(1, T + 1, B).astype(np.int32)
    labels_length = rng.integers(0, U + 1, B).astype(np.int32)
    labels = rng.integers(1, K, (B, U)).astype(np.int32)
    return logits, labels, frames, labels_length


def joint_of(logits, labels, durations=0):
    """The materialised joint, by jax alone."""
    by_duration = jax.nn.log_softmax(logits[..., -durations:]) if durations else None
    logits = jax.nn.log_softmax(logits[..., : logits.shape[-1] - durations])
    ids = jnp.broadcast_to(jnp.pad(labels, ((0, 0), (0, 1)))[:, None], logits.shape[:3])
    label = jnp.take_along_axis(logits, ids[..., None], axis=3)[..., 0]
    return Joint(logits[..., 0], label, by_duration)


def in_float64(logits, labels, frames, labels_length, values=None, sigma=0.0):
    """Loss [B] and its gradient to the logits, row by row."""
    losses, gradient = np.zeros(len(logits)), np.zeros(logits.shape)
    N = len(values or ())
    moves = PLAIN
    if values:
        moves = tuple((v, 0) for v in values if v) + tuple((v, 1) for v in values)
    for row, own in enumerate(logits.astype(np.float64)):
        _, U1, width = own.shape
        parts = [slice(0, width - N), slice(width - N, width)] if N else [slice(0, width)]
        log_probs = np.concatenate(
            [own[..., p] - np.log(np.exp(own[..., p]).sum(-1, keepdims=True)) for p in parts], -1
        )
        kinds = []  # of each arc: the classes that it is made of
        for taken, said in moves:
            ids = np.append(labels[row], 0) if said else np.zeros(U1, int)
            duration = [width - N + values.index(taken)] if values else []
            kinds.append([[int(i), *duration] for i in ids])
        arcs = np.stack(
            [
                np.stack([log_probs[:, u, kinds[a][u]].sum(-1) for u in range(U1)], 1)
                for a in range(len(moves))
            ]
        )
        total, occupancy = by_paths(arcs - sigma, moves, frames[row], labels_length[row])
        losses[row] = -total
        for a, u in itertools.product(range(len(moves)), range(U1)):
            for one in kinds[a][u]:
                part = next(p for p in parts if p.start <= one < p.stop)
                soft = np.exp(log_probs[:, u, part])
                gradient[row, :, u, part] += occupancy[a, :, u, None] * soft
                gradient[row, :, u, one] -= occupancy[a, :, u]
    return losses, gradient


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_reference_counts_every_path():
    rng = np.random.default_rng(0)
    tdt = tuple((v, 0) for v in (1, 2)) + tuple((v, 1) for v in (0, 1, 2))
    for moves in (PLAIN, tdt):
        arcs = -rng.random((len(moves), 4, 4))
        for frames, labels in ((4, 3), (1, 3), (3, 0), (1, 0)):
            total, _ = by_paths(arcs, moves, frames, labels)
            np.testing.assert_allclose(total, counted(arcs, moves, frames, labels))


# Shapes [T, U] of 17 rows of any lengths each; more labels than frames, one frame, no label.
@pytest.mark.parametrize(("T", "U"), [(12, 5), (5, 9), (1, 4)])
@pytest.mark.parametrize("values", [None, DURATIONS])
def test_the_loss_and_its_gradient_are_those_of_brute_force(T, U, values):
    rng = np.random.default_rng(T)
    logits, labels, frames, labels_length = problem(rng, 17, T, U, 6, len(values or ()))
    frames[:3], labels_length[:3] = T, (0, U, U)
    frames[2] = 1
    sigma = 0.05 if values else 0.0
    weight = rng.random(17).astype(np.float32)

    @jax.jit
    def ours(logits):
        def loss(logits):
            if values:
                joint = joint_of(logits, labels, len(values))
                each = transducer.duration_loss(joint, frames, labels_length, values, sigma)
            else:
                each = transducer.transducer_loss(joint_of(logits, labels), frames, labels_length)
            return (each * weight).sum(), each

        return jax.value_and_grad(loss, has_aux=True)(logits)

    (_, each), gradient = ours(logits)
    theirs, their_gradient = in_float64(logits, labels, frames, labels_length, values, sigma)
    close(each, theirs)
    close(gradient, their_gradient * weight[:, None, None, None])


def test_long_and_peaked_paths_are_exact():
    rng = np.random.default_rng(5)
    logits, labels, frames, labels_length = problem(rng, 2, 150, 40, 5)
    logits *= 10
    frames[:], labels_length[:] = (150, 120), (40, 30)

    @jax.jit
    def ours(logits):
        loss = lambda x: transducer.transducer_loss(joint_of(x, labels), frames, labels_length)
        each, pull = jax.vjp(loss, logits)
        return each, pull(jnp.ones_like(each))[0]

    each, gradient = ours(logits)
    theirs, their_gradient = in_float64(logits, labels, frames, labels_length)
    np.testing.assert_allclose(each, theirs, rtol=1e-5)
    np.testing.assert_allclose(gradient, their_gradient, atol=3e-5)


def test_rows_without_frames_are_infinite_and_have_no_gradient():
    rng = np.random.default_rng(1)
    logits, labels, frames, labels_length = problem(rng, 3, 4, 3, 5)
    frames[:], labels_length[:] = (0, 0, 3), (2, 0, 2)

    def loss(logits):
        each = transducer.transducer_loss(joint_of(logits, labels), frames, labels_length)
        return jnp.where(jnp.isinf(each), 0, each).sum(), each

    (_, each), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    assert np.isinf(each[0])
    assert each[1] == 0
    assert np.isfinite(each[2])
    assert np.isfinite(gradient).all()
    assert not gradient[:2].any()
    assert gradient[2].any()


@pytest.fixture(scope="module")
def parts():
    """A joint's inputs: (encoded, predicted, kernel, bias), labels, frames, labels_length."""
    rng = np.random.default_rng(2)
    B, T, U, D, K = 4, 13, 6, 8, 7
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs = draw(B, T, D), draw(B, U + 1, D), draw(D, K + 2), draw(K + 2)
    labels = rng.integers(1, K, (B, U)).astype(np.int32)
    frames, labels_length = np.array([13, 9, 13, 5]), np.array([6, 0, 3, 6])
    return inputs, labels, frames.astype(np.int32), labels_length.astype(np.int32)


def gradients(loss, inputs):
    return jax.jit(jax.value_and_grad(loss, argnums=range(len(inputs))))(*inputs)


def same(one, other, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


@pytest.fixture(scope="module")
def whole(parts):
    """Value and gradient by the materialised joint, with two durations."""
    inputs, labels, frames, labels_length = parts

    def loss(encoded, predicted, kernel, bias):
        hidden = jnp.tanh(encoded[:, :, None] + predicted[:, None])
        logits = hidden @ kernel + bias[None, None, None]
        joint = joint_of(logits, labels, 2)
        each = transducer.duration_loss(joint, frames, labels_length, (0, 1))
        return (each + transducer.transducer_loss(joint, frames, labels_length)).sum()

    return gradients(loss, inputs)


# Chunks of 3 frames, which do not divide 13, and of all; a band that holds everything.
@pytest.mark.parametrize(("chunk", "span"), [(3 * 4 * 7 * 9, 0), (10**6, 0), (3 * 4 * 7 * 9, 7)])
def test_a_joint_in_pieces_is_that_of_the_whole(parts, whole, chunk, span):
    inputs, labels, frames, labels_length = parts
    starts = np.zeros((4, 13), np.int32) if span else None

    def loss(*inputs):
        joint = transducer.joint_log_probs(
            *inputs, labels, durations=2, chunk=chunk, starts=starts, span=span
        )
        each = transducer.duration_loss(joint, frames, labels_length, (0, 1))
        return (each + transducer.transducer_loss(joint, frames, labels_length)).sum()

    same(gradients(loss, inputs), whole)


def test_a_band_gives_the_loss_of_the_paths_in_it(parts):
    inputs, labels, frames, labels_length = parts
    span = 3
    occupancy = np.random.default_rng(3).random((2, 4, 13, 7)).astype(np.float32)
    starts = np.asarray(transducer_band.band(occupancy, frames, labels_length, span))
    assert starts.dtype == np.int32
    assert (starts[:, 0] == 0).all()
    assert (np.diff(starts) >= 0).all()
    assert (np.diff(starts) < span).all()
    for row in range(4):
        assert starts[row, frames[row] - 1] == max(labels_length[row] + 1 - span, 0)

    def banded(*inputs):
        joint = transducer.joint_log_probs(*inputs, labels, durations=2, starts=starts, span=span)
        return transducer_band.banded_loss(joint, starts, frames, labels_length).sum()

    def spread(*inputs):
        joint = transducer.joint_log_probs(*inputs, labels, durations=2, starts=starts, span=span)
        joint = transducer_band.spread(joint, starts, 7)
        return transducer.transducer_loss(joint, frames, labels_length).sum()

    def masked(*inputs):
        joint = transducer.joint_log_probs(*inputs, labels, durations=2)
        at = jnp.arange(7)[None, None] - starts[..., None]
        blank, label = (
            jnp.where((at >= 0) & (at < span), x, -jnp.inf) for x in (joint.blank, joint.label)
        )
        return transducer.transducer_loss(Joint(blank, label), frames, labels_length).sum()

    value = gradients(banded, inputs)
    assert np.isfinite(value[0])
    expected = gradients(masked, inputs)
    same(value, expected)
    same(gradients(spread, inputs), expected)


@pytest.mark.parametrize("span", [2, 5])
def test_in_a_band_hard_paths_are_exact(span):
    """Long rows, short ones, one without frames and one whose labels do not fit, peaked arcs."""
    rng = np.random.default_rng(5)
    B, T, U = 6, 40, 30
    frames = np.array([40, 31, 40, 1, 0, 8], np.int32)
    labels_length = np.array([30, 30, 0, 1, 2, 30], np.int32)
    occupancy = rng.random((2, B, T, U + 1)).astype(np.float32)
    starts = transducer_band.band(occupancy, frames, labels_length, span)
    arcs = jnp.asarray(-rng.exponential(60, (2, B, T, span)), jnp.float32)
    weights = jnp.asarray(rng.random(B), jnp.float32)
    total = lambda each: (jnp.where(jnp.isfinite(each), each, 0) * weights).sum()

    def banded(blank, label):
        each = transducer_band.banded_loss(Joint(blank, label), starts, frames, labels_length)
        return total(each), each

    def whole(blank, label):
        joint = transducer_band.spread(Joint(blank, label), starts, U + 1)
        each = transducer.transducer_loss(joint, frames, labels_length)
        return total(each), each

    ours, theirs = (
        jax.jit(jax.value_and_grad(one, (0, 1), has_aux=True))(*arcs) for one in (banded, whole)
    )
    assert np.isfinite(ours[0][1]).tolist() == [True] * 4 + [False, span == 5]
    np.testing.assert_allclose(ours[0][1], theirs[0][1], rtol=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_band_lies_where_the_paths_are():
    """Where one path is likely, the loss in the band is the whole one."""
    rng = np.random.default_rng(4)
    logits, labels, frames, labels_length = problem(rng, 4, 20, 12, 6)
    frames[:], labels_length[:] = (20, 15, 20, 8), (12, 12, 3, 9)
    for row in range(4):
        at = np.sort(np.arange(labels_length[row]) * frames[row] // labels_length[row])
        for t in range(frames[row]):
            before, after = np.searchsorted(at, (t, t + 1))
            for u in range(before, after):
                logits[row, t, u, labels[row, u]] += 12
            logits[row, t, after, 0] += 12

    @jax.jit
    def both(logits):
        joint = joint_of(logits, labels)
        each, occupancy = transducer.loss_and_occupancy(joint, frames, labels_length)
        starts = transducer_band.band(occupancy, frames, labels_length, 4)
        at = jnp.arange(13)[None, None] - starts[..., None]
        kept = (jnp.where((at >= 0) & (at < 4), x, -jnp.inf) for x in joint[:2])
        return each, transducer.transducer_loss(Joint(*kept), frames, labels_length)

    each, banded = both(logits)
    np.testing.assert_allclose(banded, each, rtol=1e-3)


def test_the_simple_joint_is_a_softmax_of_sums(parts):
    _, labels, *_ = parts
    rng = np.random.default_rng(6)
    encoded, predicted = (rng.standard_normal((4, n, 7)).astype(np.float32) for n in (13, 7))
    encoded[0, 0, 1], predicted[0, 0, 2] = 300, 300
    logits = encoded[:, :, None] + predicted[:, None]
    alone = joint_of(jnp.broadcast_to(predicted[:, None], logits.shape), labels)
    full = joint_of(logits, labels)
    for scale in (0.0, 0.25):
        ours = transducer.simple_joint(encoded, predicted, labels, scale)
        for a, b, c in zip(ours[:2], full[:2], alone[:2], strict=True):
            mixed = (1 - scale) * b + scale * c
            # Where two peaks are 300 nats apart, the sum is none that float32 holds.
            np.testing.assert_allclose(a[1:], mixed[1:], atol=2e-5)
            assert np.isfinite(a).all()


def test_memory_is_a_quarter_of_the_materialised_joint():
    B, T, U, D, K = 16, 200, 100, 128, 1024
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    inputs = shape(B, T, D), shape(B, U + 1, D), shape(D, K), shape(K)
    rest = shape(B, U, dtype=jnp.int32), *(shape(B, dtype=jnp.int32),) * 2

    def ours(*args):
        *inputs, labels, frames, count = args
        joint = transducer.joint_log_probs(*inputs, labels)
        return transducer.transducer_loss(joint, frames, count).sum()

    compiled = jax.jit(jax.value_and_grad(ours, argnums=range(4))).lower(*inputs, *rest).compile()
    logits = 4 * B * T * (U + 1) * K  # bytes of the joint alone
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4
