"""The loss of recognition: of two layers, and of two views of an utterance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speech_jax import models
from speech_jax.errors import UserError
from speech_jax.models.frontend import FrontEnd
from speech_jax.ops import augment, ctc
from speech_jax.tasks import recognize
from speech_jax.training import adversarial, step

ROWS = 4
MASKS = augment.POLICIES["switchboard_mild"] | {"time_width": 30, "time_fraction": 0.5}


class Alike(FrontEnd):
    """Says that its views differ, and they do not."""

    varies = True


class Halved(FrontEnd):
    """Its second view is half as loud, which is no chance."""

    varies = True

    def __call__(self, batch, rng=None, step=0, views=1):
        inputs, lengths = super().__call__(batch, rng, step, views)
        return (inputs.at[1::2].multiply(0.5) if views == 2 else inputs), lengths


def make_task(masks=None, scan=False, front=FrontEnd, **settings):
    small = {"width": 16, "num_layers": 2, "heads": 2, "kernel": 5, "dropout": 0.0, "scan": scan}
    encoder = models.make_encoder(
        **models.settings("conformer", "tiny", **small, subsampling_kind="time")
    )
    log_mel = {"sample_rate": 8_000, "mels": 20, "window_ms": 25.0, "hop_ms": 10.0}
    front = front("log_mel", log_mel, "utterance", spec_augment=masks)
    return recognize.Recognize(encoder, front, {"labels": 6}, **settings)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "audio": jnp.asarray(rng.integers(-9_000, 9_000, (ROWS, 8_000)), jnp.int16),
        "audio_length": jnp.array([8_000, 7_000, 6_000, 8_000]),
        "labels": jnp.asarray(rng.integers(1, 6, (ROWS, 5)), jnp.int32),
        "labels_length": jnp.array([5, 4, 3, 5]),
        "weight": jnp.array([1.0, 1.0, 1.0, 0.0]),
        "index": jnp.arange(ROWS),
    }


@pytest.fixture(scope="module")
def params(batch):
    found, _ = jax.jit(make_task().init)(jax.random.key(0), batch)
    return jax.tree.map(lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), found)


def loss(task, params, batch, step=0, train=True):
    return jax.jit(task.loss)(params, {}, batch, jax.random.key(5) if train else None, step)


@pytest.mark.parametrize("scan", [False, True])
def test_the_middle_layer_has_its_part_of_the_loss(scan, batch, params):
    tree = {**params, "encoder": models.stack_layers(params["encoder"])} if scan else params
    task = make_task(scan=scan, inter_ctc=0.3)
    inputs, frames = task.frontend(batch)
    apply = jax.jit(task.encoder.apply, static_argnums=(3, 4))
    every, frames = apply({"params": tree["encoder"]}, inputs, frames, True, True)
    nats = [
        ctc.ctc_loss(
            every[:, :, layer] @ params["head"]["kernel"] + params["head"]["bias"][None, None],
            frames, batch["labels"], batch["labels_length"],
        )
        for layer in (1, 2)
    ]  # fmt: skip
    middle, last = ((one * batch["weight"]).sum() for one in nats)
    total, tokens, aux = loss(task, tree, batch)
    assert tokens == 12
    assert aux["sums"]["middle"] == pytest.approx(float(middle), rel=1e-5)
    assert abs(float(middle - last)) > 0.1
    assert total == pytest.approx(float(0.3 * middle + 0.7 * last), rel=1e-5)
    # It is not for evaluation.
    assert loss(task, tree, batch, train=False)[0] == pytest.approx(float(last), rel=1e-5)


def test_views_that_are_alike_are_one(batch, params):
    both, one = make_task(front=Alike, consistency=0.2), make_task()
    found, expected = (loss(task, params, batch, step=5_000)[:2] for task in (both, one))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_two_views_are_pulled_together(batch, params):
    task = make_task(MASKS, consistency=0.2, consistency_warmup=100)
    run = jax.jit(task.loss)
    rng = jax.random.key(5)
    none, half, whole, later = (run(params, {}, batch, rng, n)[0] for n in (0, 50, 100, 900))
    assert none < half < whole == later
    assert half - none == pytest.approx(float(whole - none) / 2, rel=1e-3)
    read = jax.jit(functools.partial(task._logits, views=2))
    logits, frames, _ = read(params, {}, batch, rng, 0)
    apart = recognize.inconsistency(logits, frames, batch["weight"])
    assert whole - none == pytest.approx(0.2 * float(apart), rel=1e-3)
    sums = run(params, {}, batch, rng, 100)[2]["sums"]
    assert sums["inconsistency"] == pytest.approx(float(apart), rel=1e-5)
    figures = task.figures({**sums, "loss": 6.0, "weight": 12.0})
    assert figures["inconsistency_per_label"] == pytest.approx(float(apart) / 12, rel=1e-5)
    expected = loss(make_task(), params, batch, train=False)[0]
    assert loss(task, params, batch, train=False)[0] == expected


def test_inconsistency_is_both_divergences_and_pulls_one_to_the_other():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 6, 5)).astype(np.float32)
    lengths, weight = jnp.array([6, 6, 3, 3]), jnp.array([1.0, 0.5])
    value, slope = jax.value_and_grad(recognize.inconsistency)(logits, lengths, weight)
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected, gradient = 0.0, np.zeros_like(logits)
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        for frame in range(lengths[row]):
            p, q = share[other, frame], share[row, frame]
            expected += weight[row // 2] * (p * np.log(p / q)).sum() / 2
            gradient[row, frame] = weight[row // 2] * (q - p) / 2
    assert value == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(slope, gradient, atol=1e-6)


def test_views_are_accumulated_and_attacked(batch, params):
    """Micro-batches add up, and with an adversary that can do nothing, nothing changes."""
    task = make_task(front=Halved, consistency=0.2, inter_ctc=0.3)
    assert not np.isclose(*(loss(one, params, batch, 900)[0] for one in (task, make_task())))
    adversary = adversarial.Adversary(method="fgsm", space="features", epsilon=1e-9)
    plain = step.gradients(task)
    both = step.accumulate(adversarial.gradients(task, adversary), 2)
    run = lambda function: jax.jit(function)(params, {}, batch, jax.random.key(1), 10)
    (ours, total), (expected, wanted) = run(both), run(plain)
    assert total.sum == pytest.approx(float(wanted.sum), rel=1e-4)
    assert total.weight == wanted.weight
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), ours, expected)


def test_rows_that_do_not_fit_are_not_compared(batch, params):
    task = make_task(front=Halved, consistency=0.2)
    short = batch | {"audio_length": jnp.full(ROWS, 400)}  # a frame or two for five labels
    value, tokens, _ = loss(task, params, short, step=5_000)
    assert (value, tokens) == (0, 0)


def test_masks_of_an_encoder_make_views_differ():
    encoder = models.make_encoder(**models.settings("wav2vec2", "tiny", dropout=0.0, mask_time=0.1))
    front = FrontEnd("waveform", make_task().frontend.log_mel)
    assert recognize.Recognize(encoder, front, {"labels": 6}, consistency=0.2).consistency


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"consistency": 0.2}, "without masks and dropout they are the same"),
        ({"inter_ctc": 0.3, "layers": 1}, "num_layers to 2 or more"),
        ({"inter_ctc": 0.3, "encoder": "deepspeech"}, "more behind its last layer"),
    ],
)
def test_what_can_do_nothing_is_refused(changes, said):
    name, layers = changes.pop("encoder", "conformer"), changes.pop("layers", 2)
    encoder = models.make_encoder(**models.settings(name, "tiny", num_layers=layers, dropout=0.0))
    with pytest.raises(UserError, match=said):
        recognize.Recognize(encoder, make_task().frontend, {"labels": 6}, **changes)
