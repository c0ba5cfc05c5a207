"""The transducer: its predictors step by step, its searches against plain loops, its task."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepwise
from speech_jax import models, rules
from speech_jax.decoding import transducer as searches
from speech_jax.models import transducer
from speech_jax.tasks.transduce import Transduce

K, WIDTH = 4, 6
LEAVES = ("kernel", "bias")


@pytest.mark.parametrize(
    "predictor",
    [transducer.Stateless(K, WIDTH), transducer.Stateless(K, WIDTH, 1), transducer.Recurrent(K, 6)],
    ids=["stateless", "last label", "recurrent"],
)
def test_predictors_are_stepwise(predictor):
    labels = jax.random.randint(jax.random.key(0), (3, 11), 0, K)
    variables = predictor.init(jax.random.key(1), labels)
    whole = predictor.apply(variables, labels)
    stepwise.check(predictor, variables["params"], labels, whole, sizes=(1, 4))


def model(durations=(), predictor=None):
    """A transducer of random parameters, and frames that it is asked about [B, T, D], lengths."""
    predictor = predictor or transducer.Stateless(K, WIDTH)
    joiner = transducer.Joiner(WIDTH, K + len(durations))
    encoded = 2 * jax.random.normal(jax.random.key(2), (3, 8, WIDTH))
    labels = jnp.zeros((1, 1), jnp.int32)
    of_predictor = predictor.init(jax.random.key(3), labels)
    said = predictor.apply(of_predictor, labels)
    of_joiner = joiner.init(
        jax.random.key(4), said, method=lambda m, x: m(m.encoded(x), m.predicted(x))
    )
    # Larger logits, so that several labels are said, some of them in one frame.
    of_joiner = jax.tree.map(lambda x: 3 * x, of_joiner)

    def advance(carry, labels):
        said, carry = predictor.apply(of_predictor, carry, labels, method="advance")
        return joiner.apply(of_joiner, said, method=lambda m, x: m.predicted(x)), carry

    join = lambda *given: joiner.apply(of_joiner, *given)
    made = searches.Transducer(predictor.start, advance, join, durations)
    return made, encoded, jnp.asarray([8, 5, 1], jnp.int32)


def by_hand(made, frames, most):
    """The greedy search of a row: (labels, frames, log probability, steps, frames cut short)."""
    labels, when, score, steps, bounded = [], [], 0.0, 0, 0
    predicted, carry = made.advance(made.start(1), jnp.zeros((1, 1), jnp.int32))
    t = here = 0
    while t < len(frames):
        logits = np.asarray(made.join(frames[t][None], predicted[:, 0]))[0]
        log_probs = np.asarray(jax.nn.log_softmax(logits[:K]))
        best, steps = int(log_probs.argmax()), steps + 1
        taken = made.durations[int(logits[K:].argmax())] if made.durations else int(best == 0)
        score += log_probs[best]
        if best:
            labels.append(best)
            when.append(t)
            predicted, carry = made.advance(carry, jnp.asarray([[best]], jnp.int32))
        else:
            taken = max(taken, 1)
        here = 0 if taken else here + 1
        if here == most:
            taken, here, bounded = 1, 0, bounded + 1
        t += taken
    return labels, when, score, steps, bounded


@pytest.mark.parametrize("durations", [(), (0, 1, 2, 3)], ids=["plain", "durations"])
@pytest.mark.parametrize("predictor", [None, transducer.Recurrent(K, WIDTH)], ids=["s", "r"])
def test_greedy_is_what_a_plain_loop_says_in_pieces_too(durations, predictor):
    made, encoded, lengths = model(durations, predictor)
    most = 1 if durations else 2
    greedy = jax.jit(lambda *given: searches.greedy(made, *given, most))
    whole, _ = greedy(searches.start(made, 3), encoded, lengths)
    assert durations or whole.bounded.sum() > 0
    for row, length in enumerate(lengths):
        labels, when, score, steps, bounded = by_hand(made, encoded[row, :length], most)
        count = int(whole.count[row])
        assert whole.labels[row, :count].tolist() == labels
        assert not whole.labels[row, count:].any()
        assert whole.frames[row, :count].tolist() == when
        assert (int(whole.steps[row]), int(whole.bounded[row])) == (steps, bounded)
        np.testing.assert_allclose(whole.score[row], score, atol=1e-5)
    # The frames in pieces of 3; the last one holds 2, and what follows it is of no row.
    state, found = searches.start(made, 3), [[] for _ in lengths]
    for begin in range(0, 9, 3):
        piece = jnp.pad(encoded, ((0, 0), (0, 1), (0, 0)))[:, begin : begin + 3]
        said, state = greedy(state, piece, jnp.clip(lengths - begin, 0, 3))
        for row in range(3):
            count = int(said.count[row])
            pairs = zip(said.labels[row, :count], said.frames[row, :count], strict=True)
            found[row] += [(int(a), begin + int(b)) for a, b in pairs]
    for row in range(3):
        count = int(whole.count[row])
        assert [a for a, _ in found[row]] == whole.labels[row, :count].tolist()
        assert [b for _, b in found[row]] == whole.frames[row, :count].tolist()


def test_a_wide_beam_finds_the_best_labels_of_all():
    made, encoded, lengths = model()
    encoded, lengths = encoded[:, :3], jnp.asarray([3, 2, 1], jnp.int32)
    width = 1 + 3 + 9  # whatever can be said before the last of 3 frames
    found, said = jax.jit(lambda *given: searches.beam(made, *given, width=width, nbest=3))(
        encoded, lengths
    )
    advance = jax.jit(lambda labels: made.advance(made.start(len(labels)), labels)[0])
    for row, length in enumerate(lengths):
        paths = np.asarray(list(itertools.product(range(K), repeat=int(length))))  # [P, T]
        texts = [(*(int(label) for label in path if label),) for path in paths]
        before = np.asarray([(0, *text, *[0] * (3 - len(text))) for text in texts], np.int32)
        place = np.cumsum(paths > 0, axis=1) - (paths > 0)  # what was said before each frame
        predicted = np.take_along_axis(np.asarray(advance(before)), place[..., None], 1)
        logits = made.join(encoded[row, : int(length)][None], predicted)
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        scores = np.take_along_axis(log_probs, paths[..., None], 2).sum((1, 2))
        totals = {}
        for text, score in zip(texts, scores, strict=True):
            totals[text] = np.logaddexp(totals.get(text, -np.inf), score)
        best = sorted(totals, key=totals.get, reverse=True)[:3]
        ours = [tuple(found.labels[row, n, : int(found.count[row, n])].tolist()) for n in range(3)]
        assert ours == best
        np.testing.assert_allclose(found.score[row], [totals[key] for key in best], atol=1e-4)
        count = int(said.count[row])
        assert tuple(said.labels[row, :count].tolist()) == best[0]
        assert (np.diff(said.frames[row, :count]) > 0).all()
        assert ((said.sure[row, :count] > 0) & (said.sure[row, :count] <= 1)).all()
        assert not said.sure[row, count:].any()


@pytest.mark.parametrize("encoder", models.ENCODERS)
def test_no_rule_of_an_encoder_is_of_the_rest(encoder):
    """Each parameter has one rule of sharding, whatever the encoder is."""
    task = Transduce(
        models.make_encoder(encoder), frontend=None, counts={"labels": K}, predictor="recurrent"
    )
    names = [
        *(f"predictor/{name}" for name in ("embedding", "recurrent")),
        *(f"predictor/{layer}/{leaf}" for layer in ("window", "inputs") for leaf in LEAVES),
        *(f"joiner/{layer}/{leaf}" for layer in ("encoded", "logits") for leaf in LEAVES),
        *(f"simple/{layer}/{leaf}" for layer in ("encoded", "predicted") for leaf in LEAVES),
        *(f"head/{leaf}" for leaf in LEAVES),
        "joiner/predicted/kernel",
    ]
    for name in names:
        rules.only(task.rules, name, "sharding")
