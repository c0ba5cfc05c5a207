"""The transducer: its predictors step by step, its searches against plain loops, its task."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepwise
from speech_jax import bundle, experiment, models, rules, tasks
from speech_jax import config as defaults
from speech_jax.data.parts.audio import Audio
from speech_jax.data.parts.transcript import Transcript
from speech_jax.data.text import CharacterTokenizer
from speech_jax.decoding import fusion, lm
from speech_jax.decoding import transducer as searches
from speech_jax.deploy import acoustic, export
from speech_jax.errors import UserError
from speech_jax.models import transducer
from speech_jax.tasks.transduce import Transduce
from speech_jax.training import adversarial, peft

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


@pytest.mark.parametrize("order", [0, 1, 3], ids=lambda order: f"{order}-grams")
def test_a_wide_beam_finds_the_best_labels_of_all(order):
    made, encoded, lengths = model()
    encoded, lengths = encoded[:, :3], jnp.asarray([3, 2, 1], jnp.int32)
    width = 1 + 3 + 9  # whatever can be said before the last of 3 frames
    known = lm.build(["abb", "cab", "ab", "b"], order) if order else None
    tables = fusion.make(known, ("", *"abc"), weight=0.7, bonus=0.3) if known else None
    settings = {"width": width, "nbest": 3, "fusion": tables}
    found, said = jax.jit(lambda *given: searches.beam(made, *given, **settings))(encoded, lengths)
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
        if known:
            for text in totals:
                spelled = ["_abc"[label] for label in text]
                totals[text] += 0.7 * known.score(spelled) + 0.3 * len(text)
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


# ---- The task ----------------------------------------------------------------------------------

PARTS = {"audio": Audio(), "labels": Transcript(CharacterTokenizer("abc"))}
ROWS, SAMPLES = 2, 8_000
BATCH = {
    "audio": np.zeros((ROWS, SAMPLES), np.int16),
    "audio_length": np.full(ROWS, SAMPLES, np.int32),
    "labels": np.ones((ROWS, 3), np.int32),
    "labels_length": np.asarray([3, 1], np.int32),
    "weight": np.ones(ROWS, np.float32),
    "index": np.arange(ROWS, dtype=np.int32),
}


def configure(name="transduce", **task):
    config = defaults.default()
    config.task = tasks.settings(name, **task)
    config.model = models.settings(
        "conformer", "tiny", width=8, num_layers=1, heads=2, subsampling_channels=4, dropout=0.0
    )
    return config


@pytest.mark.optax
@pytest.mark.parametrize("wrapped", ["fgsm", "lora", "no ctc", "band", "durations"])
def test_it_goes_with_the_rest(wrapped):
    """Shapes alone: the gradient has that of the parameters, and a prediction its rows."""
    of_task = {
        "no ctc": {"ctc_weight": 0.0}, "band": {"span": 2}, "durations": {"durations": (0, 1, 2)},
    }  # fmt: skip
    task = experiment.make_task(configure(width=8, **of_task.get(wrapped, {})), PARTS)
    if wrapped == "lora":
        task = peft.Adapted(task, peft.LoRA(rank=2))
    params, state = jax.eval_shape(task.init, jax.random.key(0), BATCH)
    adversary = adversarial.Adversary(method="fgsm" if wrapped == "fgsm" else "none")
    gradients = adversarial.gradients(task, adversary)
    found = jax.eval_shape(gradients, params, state, BATCH, jax.random.key(1), jnp.int32(3))
    assert jax.tree.map(lambda x: x.shape, found[0]) == jax.tree.map(lambda x: x.shape, params)
    assert ("head" in params) == (wrapped != "no ctc")
    said = jax.eval_shape(task.predict, params, state, BATCH)
    assert said["labels_length"].shape == (ROWS,)


@pytest.mark.optax
def test_beside_ctc_the_transducer_counts_as_its_warm_up_goes_on():
    """CTC alone at first, and in the end as without a warm-up."""
    make = lambda **settings: experiment.make_task(configure(width=8, **settings), PARTS)
    params, state = jax.jit(make().init)(jax.random.key(0), BATCH)

    def loss(step, **settings):
        key = jax.random.key(1)
        return float(jax.jit(make(**settings).loss)(params, state, BATCH, key, step)[0])

    first, half, last = (loss(step, ctc_weight=0.25, warmup=10) for step in (0, 5, 10))
    assert first == pytest.approx(0.25 * loss(0, ctc_weight=1.0))
    assert half == pytest.approx((first + last) / 2)
    assert last == pytest.approx(loss(0, ctc_weight=0.25, warmup=0))
    assert first < 0.5 * last


@pytest.mark.parametrize(
    ("name", "task", "usual"),
    [
        ("recognize", {}, "greedy"),
        ("transduce", {}, "transducer"),
        ("transduce", {"ctc_weight": 0.0}, "transducer"),
        ("attend", {}, "joint"),
        ("attend", {"ctc_weight": 0.0}, "attention"),
    ],
)
def test_a_task_searches_its_own_way_where_nothing_is_said(name, task, usual):
    config = configure(name, **task)
    assert experiment.make_task(config, PARTS).decoder.settings.name == usual
    config.decoder.name = "beam"
    if "ctc_weight" in task:
        with pytest.raises(UserError, match=f"ctc_weight=0 leaves out: .*'{usual}'"):
            experiment.make_task(config, PARTS)
    else:
        assert experiment.make_task(config, PARTS).decoder.settings.name == "beam"


def test_a_narrow_beam_asks_the_language_model_about_labels_that_sound_less_probable():
    made, encoded, _ = model()
    lengths = jnp.ones(3, jnp.int32)
    known = lm.build(["c"] * 9 + ["b"], 2)
    tables = fusion.make(known, ("", *"abc"), weight=5.0, bonus=30.0)
    found, _ = searches.beam(made, encoded, lengths, width=1, labels=3, fusion=tables)
    said = [
        tuple(row[0, : int(n[0])].tolist())
        for row, n in zip(found.labels, found.count, strict=True)
    ]
    log_probs = jax.nn.log_softmax(made.join(encoded[:, 0], searches.start(made, 3).predicted))
    gain = np.asarray([5 * known.score([letter]) + 30 for letter in "abc"])
    assert said == [
        (int(row[1:].argmax()) + 1,) for row in np.asarray(log_probs) + np.pad(gain, (1, 0))
    ]
    # Without it, another label would have been said.
    assert any(
        int(row.argmax()) + 1 != label for row, (label,) in zip(log_probs[:, 1:], said, strict=True)
    )


@pytest.mark.parametrize("durations", [(1, 2), (0, 1, 1), (0, 1, 1.5)])
def test_durations_that_cannot_be_are_named(durations):
    with pytest.raises(UserError, match=r"durations=.*whole numbers, each once, with 0 and 1"):
        experiment.make_task(configure(durations=durations), PARTS)


def test_a_band_of_one_position_is_refused():
    with pytest.raises(UserError, match=r"span=1 .*give 2 or more"):
        experiment.make_task(configure(span=1), PARTS)


def test_without_ctc_there_is_a_text_and_no_file(tmp_path, capsys):
    """A bundle is searched as its task does, and what is of CTC is refused by name."""
    config = configure(width=8, ctc_weight=0.0)
    task = experiment.make_task(config, PARTS)
    params, state = jax.jit(task.init)(jax.random.key(0), BATCH)
    bundle.save(bundle.Bundle(config, PARTS, *jax.device_get((params, state))), tmp_path / "model")
    heard = acoustic.open_acoustic(tmp_path / "model")
    assert heard.decoder["name"] == "transducer"
    assert heard.search(heard.decoder) is not None
    assert export.main([str(tmp_path / "model"), str(tmp_path / "model.sjx")]) == 1
    assert "needs CTC, which config.task.ctc_weight=0 leaves out" in capsys.readouterr().err
    assert not (tmp_path / "model.sjx").exists()


@pytest.mark.parametrize("durations", [(), (0, 1, 2, 3)], ids=["plain", "durations"])
def test_a_stream_says_what_the_whole_says(durations):
    """Log-mel in pieces, through an encoder that hears a little of the future."""
    settings = models.settings(
        "deepspeech", "tiny", width=WIDTH, num_layers=1, cell="gru", bidirectional=False,
        lookahead=2, subsampling=2, conv_channels=(2,), conv_kernels=(3,), conv_bands=(3,),
    )  # fmt: skip
    encoder, (made, _, _) = models.make_encoder(**settings), model(durations)
    inputs, lengths = jax.random.normal(jax.random.key(5), (3, 32, 8)), jnp.asarray([32, 20, 7])
    init = jax.jit(encoder.init, static_argnums=3)
    variables = init(jax.random.key(6), inputs, lengths, True)
    # What is heard, as what the joiner is asked about: of its width, and large.
    hear = lambda hidden: 3 * hidden
    whole, frames = jax.jit(encoder.apply, static_argnums=3)(variables, inputs, lengths, True)
    greedy = jax.jit(lambda *given: searches.greedy(made, *given, 3))
    wanted, _ = greedy(searches.start(made, 3), hear(whole), frames)
    assert wanted.count[0] > 3

    advance = jax.jit(lambda *given: encoder.apply(variables, *given, method="advance"))
    carry, size, found = encoder.start(3, 8), 8, [[] for _ in lengths]
    # The first outputs are of nothing: frames that are taken already.
    state = searches.start(made, 3)._replace(ahead=jnp.full(3, encoder.delay, jnp.int32))
    for begin in range(0, 32 + 2 * encoder.delay, size):
        piece = jnp.pad(inputs, ((0, 0), (0, 16), (0, 0)))[:, begin : begin + size]
        valid = begin + jnp.arange(size)[None] < lengths[:, None]
        hidden, carry = advance(carry, (piece, valid))
        left = jnp.clip(frames + encoder.delay - begin // 2, 0, size // 2)
        said, state = greedy(state, hear(hidden), left)
        for row, labels in enumerate(found):
            labels += said.labels[row, : said.count[row]].tolist()
    for row, labels in enumerate(found):
        assert labels == wanted.labels[row, : wanted.count[row]].tolist()
