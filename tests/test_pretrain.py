"""Pretraining: what is drawn, what is compared, and that it learns; parity is in test_hf.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speech_jax import models, tasks
from speech_jax.models.frontend import FrontEnd
from speech_jax.tasks import best_rq, contrastive, masked

LOG_MEL = {"sample_rate": 16_000, "mels": 20, "window_ms": 25.0, "hop_ms": 10.0}
SMALL = {"width": 16, "num_layers": 1, "heads": 2, "scan": False, "dropout": 0.0}
WAVEFORM = SMALL | {
    "feed_forward": 24, "input_dropout": 0.0,
    "conv_channels": (8, 8, 12), "conv_kernels": (10, 8, 8), "conv_strides": (5, 8, 8),
}  # fmt: skip
ENCODERS = {
    "wav2vec2": WAVEFORM | {"position_kernel": 8, "position_groups": 4},
    "wav2vec2_conformer": WAVEFORM | {"kernel": 5},
    "conformer": SMALL | {"kernel": 5, "subsampling_channels": 8},
}
LENGTHS = [16_000, 11_000, 9_000, 0]


def make(objective, encoder="wav2vec2", **settings):
    encoder = models.make_encoder(encoder, **ENCODERS[encoder])
    frontend = FrontEnd(encoder.listens, LOG_MEL)
    return tasks.constructor(objective)(encoder, frontend, codes=20, mask_length=4, **settings)


TASKS = {
    "contrastive": lambda: make("contrastive", negatives=10, feature_dropout=0.0),
    "contrastive-conformer": lambda: make(
        "contrastive", "wav2vec2_conformer", negatives=10, feature_dropout=0.0
    ),
    "best-rq-wav2vec2": lambda: make("best_rq"),
    "best-rq-conformer": lambda: make("best_rq", "conformer"),
}


def make_batch():
    rng = np.random.default_rng(0)
    # Noise whose band moves slowly: what a frame sounds like follows from its neighbours.
    time = np.arange(16_000) / 16_000
    rows = [
        np.sin(2 * np.pi * (300 + 200 * row) * time + 40 * np.sin(2 * np.pi * 2 * time))
        for row in range(4)
    ]
    audio = 8_000 * np.array(rows) + 300 * rng.standard_normal((4, 16_000))
    return {
        "audio": jnp.asarray(audio, jnp.int16),
        "audio_length": jnp.array(LENGTHS),
        "weight": jnp.array([1.0, 1.0, 0.0, 0.0]),
        "index": jnp.array([3, 7, -1, -1]),
    }


def init(task, batch):
    """About what task.init would return, made faster."""
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ones = name.rpartition("/")[2].startswith(("scale", "magnitude"))
        size = 1.0 if "quantizer" in name else 0.2
        return jnp.asarray(ones + size * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="module", params=TASKS)
def case(request):
    """A task, its parameters and state, and its compiled loss with gradient."""
    task = TASKS[request.param]()
    batch = make_batch()
    params, state = init(task, batch)

    def loss(params, batch, key):
        total, weight, aux = task.loss(params, state, batch, key, 3)
        return total, (weight, aux)

    return task, params, state, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_padding_and_rows_without_weight_count_for_nothing(case):
    task, params, state, loss = case
    batch = make_batch()
    (total, (weight, aux)), gradient = loss(params, batch, jax.random.key(1))
    assert weight > 0
    garbage = jnp.arange(16_000)[None] >= batch["audio_length"][:, None]
    dirty = jnp.where(garbage | (batch["weight"] == 0)[:, None], 9_999, batch["audio"])
    dirty = batch | {"audio": dirty.astype(jnp.int16)}
    if isinstance(task, contrastive.Contrastive):
        # The extractor's penalty is of all rows: only padding may change.
        dirty["audio"] = jnp.where(garbage, 9_999, batch["audio"]).astype(jnp.int16)
    (again, (same, _)), changed = loss(params, dirty, jax.random.key(1))
    assert same == weight
    np.testing.assert_allclose(again, total, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), changed, gradient)
    nothing = batch | {"weight": jnp.zeros(4)}
    (total, (weight, aux)), gradient = loss(params, nothing, jax.random.key(1))
    assert (total, weight) == (0.0, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, aux)))
    assert jax.tree.structure(aux["state"]) == jax.tree.structure(state)


def test_predictions_are_by_row(case):
    task, params, state, _ = case
    found = jax.jit(task.predict)(params, state, make_batch())
    assert set(found) == {"nats", "correct", "masked"}
    assert found["masked"].shape == (4,)
    assert (found["masked"] > 0).tolist() == [True, True, False, False]
    total, weight, _ = jax.jit(task.loss)(params, state, make_batch())
    assert weight == found["masked"].sum()
    if isinstance(task, best_rq.BestRQ):
        np.testing.assert_allclose(total, found["nats"].sum(), rtol=1e-5)
    # An utterance's masks and negatives are its own, wherever in a batch it is and however padded.
    batch = {name: value[::-1] for name, value in make_batch().items()}
    batch["audio"] = jnp.pad(batch["audio"], ((0, 0), (0, 3_200)))
    again = jax.jit(task.predict)(params, state, batch)
    np.testing.assert_array_equal(again["masked"][::-1], found["masked"])
    np.testing.assert_allclose(again["nats"][::-1], found["nats"], rtol=1e-4)


def test_it_learns(case):
    _, params, _, loss = case
    batch = make_batch()
    adam = optax.adam(3e-3)
    opt = adam.init(params)

    @jax.jit
    def update(params, opt, key):
        (total, (weight, aux)), gradient = loss(params, batch, key)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            change, opt = adam.update(gradient, opt)
        return (
            optax.apply_updates(params, change),
            opt,
            aux["sums"].get("contrastive", total) / weight,
        )

    seen = []
    for step in range(150):
        params, opt, nats = update(params, opt, jax.random.key(step))
        seen.append(float(nats))
    assert np.mean(seen[-10:]) < 0.85 * np.mean(seen[:5])


# ---- wav2vec 2.0 -------------------------------------------------------------------------------


def test_negatives_are_other_masked_frames_of_the_row():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((3, 30)) < 0.4).at[2].set(False)
    draw = jax.jit(lambda key: contrastive.sample_negatives(key, mask, 8))
    found = np.stack([draw(jax.random.key(seed)) for seed in range(100)])
    for row in range(2):
        masked = np.flatnonzero(mask[row])
        for frame in masked:
            drawn, counts = np.unique(found[:, row, frame], return_counts=True)
            assert drawn.tolist() == [other for other in masked if other != frame]
            assert counts.min() > 0.4 * counts.mean()


def test_a_negative_of_the_same_codes_is_left_out():
    rng = np.random.default_rng(0)
    context, targets = (jnp.asarray(rng.standard_normal((1, 5, 4)), jnp.float32) for _ in range(2))
    choices = jnp.array([[[0, 1], [0, 1], [0, 2], [3, 1], [3, 1]]])
    negatives = jnp.array([[[1, 2], [2, 3], [3, 4], [4, 0], [3, 1]]])
    logits = contrastive.contrastive_logits(context, targets, choices, negatives, 0.1)
    assert np.isneginf(logits[0, :, 1:]).tolist() == [
        [True, False], [False, False], [False, False], [True, False], [True, False],
    ]  # fmt: skip
    cosine = np.dot(context[0, 1], targets[0, 3]) / (
        np.linalg.norm(context[0, 1]) * np.linalg.norm(targets[0, 3])
    )
    np.testing.assert_allclose(logits[0, 1, 2], cosine / 0.1, rtol=1e-5)


def test_a_collapsed_codebook_is_not_counted_as_correct():
    logits = jnp.array([[[1.0, -jnp.inf, -jnp.inf], [1.0, 0.0, -jnp.inf], [0.0, 1.0, 0.5]]])
    rows = contrastive.contrastive_rows(logits, jnp.ones((1, 3), bool))
    assert rows["correct"].tolist() == [1.0]


def test_perplexity():
    perplexity = lambda probabilities, mask: masked.perplexity(masked.mean_of(probabilities, mask))
    uniform = jnp.full((2, 3, 2, 5), 0.2)
    mask = jnp.array([[True, False, True], [True, True, False]])
    np.testing.assert_allclose(perplexity(uniform, mask), 10.0, rtol=1e-5)
    one = jax.nn.one_hot(jnp.zeros((2, 3, 2), jnp.int32), 5)
    np.testing.assert_allclose(perplexity(one, mask), 2.0, rtol=1e-5)
    # Frames outside the mask do not count.
    mixed = jnp.where(mask[:, :, None, None], one, uniform)
    np.testing.assert_allclose(perplexity(mixed, mask), 2.0, rtol=1e-5)


def test_frequencies_count_what_one_hot_vectors_add_up_to():
    rng = np.random.default_rng(0)
    codes, mask = jnp.asarray(rng.integers(0, 5, (3, 7, 2))), jnp.asarray(rng.random((3, 7)) < 0.6)
    expected = masked.mean_of(jax.nn.one_hot(codes, 5), mask)
    np.testing.assert_allclose(masked.frequencies(codes, mask, 5), expected, atol=1e-6)
    assert not masked.frequencies(codes, jnp.zeros((3, 7), bool), 5).any()


def test_temperature_falls_to_its_last_value():
    task = make("contrastive")
    assert float(task.temperature(0)) == 2.0
    assert float(task.temperature(100_000)) == pytest.approx(2 * 0.999995**100_000, rel=1e-3)
    assert float(task.temperature(10_000_000)) == 0.5


def test_contrastive_needs_a_wav2vec2_encoder():
    with pytest.raises(ValueError, match="name='best_rq'"):
        make("contrastive", "conformer")


@pytest.mark.parametrize("objective", ["contrastive", "best_rq"])
def test_the_alarm(objective):
    task = make(objective, collapse_fraction=0.1, collapse_after=100)
    names = {
        "contrastive": ["code_perplexity", "soft_code_perplexity", "contrastive"]
        + ["feature_penalty", "gumbel_temperature"],
        "best_rq": ["target_perplexity", "prediction_perplexity"],
    }
    sums = dict.fromkeys(["loss", "weight", "masked", "correct", *names[objective]], 200.0)
    sums["parts"] = 10.0
    assert task.figures(sums)["accuracy"] == 1.0
    task.check(task.figures(sums), 200)
    # A hair above the least that there can be: 2 groups of codes, or 1.
    low = sums | {"code_perplexity": 21.0, "prediction_perplexity": 11.0}
    task.check(task.figures(low), 100)
    with pytest.raises(masked.CollapseError, match=r"collapsed: \w+_perplexity is [12].1 of"):
        task.check(task.figures(low), 200)
    # Skipped updates say nothing.
    task.check(task.figures(dict.fromkeys(sums, 0.0)), 200)


# ---- BEST-RQ -----------------------------------------------------------------------------------


def test_codes_are_the_nearest_by_cosine():
    rng = np.random.default_rng(0)
    x, projection, codebook = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 5), (5, 3), (7, 3))
    )
    found = best_rq.nearest_code(x, projection, codebook)
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    distance = np.linalg.norm(
        unit(x @ projection)[:, :, None] - unit(codebook)[None, None], axis=-1
    )
    np.testing.assert_array_equal(found, distance.argmin(-1))


@pytest.mark.parametrize("encoder", ["wav2vec2", "conformer"])
def test_a_target_is_of_what_the_frame_hears(encoder):
    task = make("best_rq", encoder)
    batch = make_batch()
    inputs, lengths = task.frontend(batch)
    before, _ = task._frames(batch, inputs, lengths)
    frame, hop = 10, 320 if encoder == "wav2vec2" else 640
    place = (frame + 1) * hop - 100
    changed = batch | {"audio": batch["audio"].at[0, place].set(30_000)}
    inputs, lengths = task.frontend(changed)
    after, _ = task._frames(changed, inputs, lengths)
    assert before.shape[1] == task.encoder.output_lengths(inputs.shape[1])
    moved = np.abs(after - before)[0].mean(-1)
    assert moved.argmax() in (frame, frame + 1) if encoder == "wav2vec2" else frame


class Listener(nn.Module):
    """An encoder of waveforms that says nothing of what a frame of it sees."""

    listens = "waveform"

    @nn.compact
    def __call__(self, inputs, lengths, deterministic: bool):
        return nn.Dense(8)(inputs.reshape(len(inputs), -1, 320)), lengths // 320


def test_an_encoder_of_waveforms_has_to_know_what_a_frame_sees():
    with pytest.raises(ValueError, match=r"which samples a frame of Listener sees: .*geometry\(\)"):
        best_rq.BestRQ(Listener(), FrontEnd("waveform", LOG_MEL))


@pytest.mark.parametrize("case_name", TASKS)
def test_utterances_without_a_frame_are_of_no_use(case_name):
    sizes = {"samples": np.asarray([0, 300, 16_000])}
    assert set(TASKS[case_name]().unusable(sizes)) == {0, 1}
