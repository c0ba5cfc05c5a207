"""The accelerator's benchmark, as far as it can be right or wrong without one."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, ctc
from benchmarks.hardware import Table, forms, hottest, kernels, numerics, training
from benchmarks.hardware.build import config_of
from speech_jax.ops import convolution

pytestmark = pytest.mark.optax


@pytest.fixture
def table(tmp_path):
    made = Table(tmp_path / "out.md", "step")
    made.start("a title")
    return made


def test_a_measurement_is_written_at_once_and_a_failure_ends_nothing(table, tmp_path):
    with table.attempt("what fails"):
        raise ValueError("a | b\nc")
    table.add("what works", ms=1.23456)
    text = (tmp_path / "out.md").read_text()
    assert "| step | what fails | error ValueError: a / b c |" in text
    assert "| step | what works | ms 1.235 |" in text
    last = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert last == {"part": "step", "what": "what works", "ms": 1.23456}


def test_the_reference_of_the_kernels_is_right():
    logits, *others = kernels.problem(0, 4, 12, 5, 7, 2.0)
    wanted, pullback = jax.vjp(lambda logits: ctc.optax_loss(logits, *others), logits)
    gradient = pullback(jnp.ones(4))[0]
    found, slope = kernels.reference(logits, *others)
    fits = np.isfinite(found)
    assert fits.sum() >= 2
    np.testing.assert_allclose(found[fits], wanted[fits], rtol=1e-4)
    np.testing.assert_allclose(slope[fits], gradient[fits], atol=1e-4)
    assert kernels.worst(found, found) == 0
    assert kernels.worst(np.where(fits, found, 0), found) == (0 if fits.all() else np.inf)


@pytest.mark.parametrize("form", [forms.shifted, forms.banded, forms.grouped])
def test_the_forms_are_the_depthwise_convolution(form):
    def total(function):
        return lambda *arrays: jnp.sin(function(*arrays)).sum()

    for kernel, frames in ((31, 70), (4, 9), (34, 5)):
        x = jax.random.normal(jax.random.key(0), (2, frames, 3))
        weight, bias = jax.random.normal(jax.random.key(1), (kernel, 3)), jnp.arange(3.0)
        wanted = jax.value_and_grad(total(convolution.depthwise), (0, 1, 2))(x, weight, bias)
        found = jax.value_and_grad(total(form), (0, 1, 2))(x, weight, bias)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, wanted)


def test_a_profile_names_the_modules_that_kernels_are_of():
    def function(x):
        with jax.named_scope("layers/attention"):
            return jnp.tanh(x @ x).sum()

    program = jax.jit(jax.grad(function)).lower(jnp.ones((300, 300))).compile()
    found = hottest.profile(lambda: program(jnp.ones((300, 300))).block_until_ready(), 2,
                            program.as_text())  # fmt: skip
    assert found.milliseconds > 0
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1)
    products = [kernel for kernel in found.kernels if "dot_general" in kernel.place]
    assert products
    assert all(kernel.count == pytest.approx(1) for kernel in products)


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ("jit(step)/jvp(CTCModel)/encoder/while/body/eval_jaxpr/layers/attention/qkv/dot_general",
         "forward, layers/attention"),
        ("jit(step)/transpose(jvp(CTCModel))/encoder/subsampling/convolution_1/conv_general_dilated",
         "backward, subsampling/convolution_1"),
        ("jit(step)/transpose(jvp(CTCModel))/encoder/while/body/jit(dynamic_update_index_in_dim)/x",
         "kept for the gradient, by the loop over layers"),
        ("jit(step)/jvp()/while/body/add", "loops outside of the encoder"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_module_is_read_from_where_an_operation_was_written(place, module):
    assert hottest.module_of(place) == module


def test_the_updates_follow_from_the_slower_of_step_and_loader():
    rows = [
        {"what": "recipe, 20 rows of 16 s", "audio_s_per_s": 3_000.0},
        {"what": "recipe+banded, 20 rows of 16 s", "audio_s_per_s": 8_000.0},
        {"what": "loader, WAV, speeds (0.9, 1.0, 1.1)", "audio_s_per_s": 9_000.0},
    ]
    assert training.expected_rate(rows) == pytest.approx(0.85 * 8_000 / (0.92 * 320))
    rows[2]["audio_s_per_s"] = 2_000.0
    assert training.expected_rate(rows) == pytest.approx(0.85 * 2_000 / (0.92 * 320))
    assert training.expected_rate([]) > 0


def test_ratios_are_of_the_same_shapes(table, tmp_path):
    times = Table(tmp_path / "out.md", "ctc time")
    for shape in ("1,2,3,4", "5,6,7,8"):
        for name, ms in (("xla", 4.0), ("optax", 8.0), ("pallas_gpu", 1.0)):
            barriers = ", own barriers" if "pallas" in name else ""
            times.add(f"{name}, B,T,N,K = {shape}{barriers}", ms=ms)
    table.add("conformer-l+banded, 40 rows of 16 s", audio_s_per_s=300.0)
    Table(tmp_path / "out.md", "peer").add(
        "conformer-l, 40 rows of 16 s, eager", audio_s_per_s=100.0
    )
    accelerator._summary(table)
    rows = {row["what"]: row for row in table.rows()[1:]}
    kernel = rows["CTC, pallas_gpu: times as fast as, geometric mean"]
    assert (kernel["optax"], kernel["xla"]) == pytest.approx((8.0, 4.0))
    step = rows[
        "conformer-l+banded, 40 rows of 16 s: times the rate of conformer-l, 40 rows of 16 s, eager"
    ]
    assert step["ratio"] == 3.0


def test_a_part_that_takes_too_long_is_ended(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(accelerator, "MARGIN", -100.0)  # the part thinks that it has time
    flags = types.SimpleNamespace(
        out=tmp_path / "out.md", seconds=60.0, data=None, tiny=True, parts=""
    )
    run = accelerator._Run(flags, tmp_path, reserve=0.0)
    run.wait(run.start("numbers", "numerics", 1.0))  # waits for a reference that no one makes
    run.end()
    assert "out of time: ended" in (tmp_path / "out.md").read_text()


def test_the_models_that_are_compared_are_tiny_and_have_no_dropout():
    for name in numerics.MODELS:
        config = config_of(name, tiny=True, dtype="float32", dropout=0.0)
        assert (config.model.dtype, config.model.dropout, config.model.num_layers) == (
            "float32", 0.0, 2,
        )  # fmt: skip
