"""What a step needs: from the program's text, for this machine, and for others."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest

import runs
from speech_jax import experiment
from speech_jax.errors import UserError
from speech_jax.preflight import assumed, hlo
from speech_jax.preflight import compile as preflight
from speech_jax.training import costs, sharding

pytestmark = pytest.mark.optax

PROGRAM = """HloModule example, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%take (p: f32[8,100], i: s32[]) -> f32[1,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,100}
}

%body (state: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %state = (s32[], f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[8,100]{1,0} get-tuple-element(%state), index=1
  %one = f32[1,100]{1,0} fusion(%all, %i), kind=kLoop, calls=%take
  %gathered = f32[4,100]{1,0} all-gather(%one), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %next = (s32[], f32[8,100]{1,0}) tuple(%i, %all)
}

%below (state: (s32[], f32[8,100])) -> pred[] {
  %state = (s32[], f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(8)
  ROOT %go = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8,100], y: bf16[6]) -> f32[] {
  %x = f32[8,100]{1,0} parameter(0)
  %y = bf16[6]{0:T(128)S(1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,100]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,100]{1,0}) while(%start), condition=%below, body=%body
  %sums = (f32[8,100]{1,0}, bf16[6]{0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
  %moved = f32[8,100]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %part = f32[2,100]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}
}
"""


def test_a_program_is_read():
    moved = hlo.traffic(PROGRAM, 8)
    gather, reduce, permute, scatter = (
        next(one for one in moved.collectives if one.kind == kind)
        for kind in ("all-gather", "all-reduce", "collective-permute", "reduce-scatter")
    )
    assert len(moved.collectives) == 4
    # A ring of n sends n - 1 times the part of each, or twice the part that is left out.
    assert (gather.times, gather.sent, gather.group) == (8, 400 * 3, (0, 2, 4, 6))
    assert (reduce.times, reduce.sent, reduce.group) == (1, 3212, (0, 1))
    assert (permute.times, permute.sent) == (1, 3200)
    assert (scatter.times, scatter.sent, scatter.group) == (1, 2400, (0, 1, 2, 3))
    # Eight slices (and their index) are read and written, eight gathers, and the three below.
    # y is on the chip.
    loop = 8 * ((400 + 4 + 400) + (400 + 1600))
    assert moved.memory == loop + (3200 + 3200 + 12) + 6400 + 4000


def test_lines_that_are_not_understood_are_counted_and_hide_nothing_else():
    strange = """  %odd = f32[2]{0}
  %new = f32[2,100]{1,0} fusion(%x), kind=kLoop, calls=%gone
  %loop2 = f32[] while(%x), condition=%gone, body=%gone
"""
    text = PROGRAM.replace("  ROOT %part", strange + "  ROOT %part")
    moved, before = hlo.traffic(text, 8), hlo.traffic(PROGRAM, 8)
    assert (before.unread, moved.unread) == (0, 2)
    assert moved[:2] == before[:2]


def test_the_longest_bucket_is_that_of_a_corpus():
    config = runs.tiny_config("nowhere")
    config.data.speeds = (0.9, 1.0, 1.1)
    config.data.batch_seconds = 23.0
    parts = assumed.make_parts(config)
    task = experiment.make_task(config, parts)
    bucket = assumed.longest_bucket(config, task, parts, sharding.make_mesh(data=4, fsdp=2))
    # 2 s at a speed of 0.9, rounded up to a tenth; rows in multiples of the eight devices.
    assert (bucket.rows, bucket.size("samples")) == (8, 36_800)
    assert bucket.size("labels") >= 2 * assumed.LABELS_PER_SECOND["characters"]


def test_a_gpu_is_described_to_its_compiler():
    target = costs.gpu_target("h200")
    assert 'device_description_str: "NVIDIA H200"' in target
    assert f"device_memory_size: {int(costs.CHIPS['H200'].memory)}" in target
    assert costs.gpu_target("h100") != target


def test_this_machine_is_measured_and_fsdp_sends_parameters_only():
    config = runs.tiny_config("nowhere")
    config.model.num_layers, config.model.scan = 2, True
    config.data.batch_seconds = 16.0
    figures = preflight.measure(config, preflight.find_devices(""))
    assert figures["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert (figures["devices"], figures["rows"], figures["seconds"]) == (8, 8, 2.0)
    assert figures["temporary"] > 0
    assert figures["optimizer"] > 2 * figures["parameters"] * 0.99  # two moments
    assert figures["total"] >= figures["parameters"] + figures["optimizer"] + figures["temporary"]
    assert "step_seconds" not in figures, "this device's rates are unknown"
    # Parameters are gathered forwards and backwards, and gradients are summed: no activations.
    assert figures["collectives"].keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    whole = 8 * figures["parameters"]
    assert figures["collectives"]["all-gather"]["bytes"] < 2 * whole
    assert sum(moved["bytes"] for moved in figures["collectives"].values()) < 4.5 * whole


def test_it_says_whether_it_fits_and_what_limits_it(monkeypatch, capsys):
    config = runs.tiny_config("nowhere")
    monkeypatch.setitem(costs.CHIPS, "cpu", costs.Chip(1e12, 2**30, 1e9, 1e9))
    figures = preflight.run(config)
    printed = capsys.readouterr().out
    for line in ("parameters per chip", "sent by all-gather", "roofline step", "data sheets"):
        assert line in printed
    assert figures["bound"] == "memory"
    assert figures["step_seconds"] == figures["memory_traffic"] / 1e9
    assert 0 < figures["mfu"] < 1
    audio = figures["rows"] * figures["seconds"] / 3600
    assert figures["audio_hours_per_second"] == pytest.approx(audio / figures["step_seconds"])

    small = figures | {"fits": False, "why": "2.0 of 1.0 GiB"}
    preflight.show(small)
    assert "NO: 2.0 of 1.0 GiB" in capsys.readouterr().out
    monkeypatch.setitem(costs.CHIPS, "cpu", costs.Chip(1e12, 2**10, 1e9, 1e9))
    monkeypatch.setattr(preflight, "measure", lambda *_: small)
    with pytest.raises(UserError, match=r"it does not fit this machine: 2\.0 of 1\.0 GiB"):
        preflight.run(config)


def test_a_group_that_spans_hosts_sends_over_their_adapters():
    chip = costs.CHIPS["H100"]
    assert preflight._rate((0, 1, 2, 3), 8, chip) == chip.link
    assert preflight._rate((0, 8), 8, chip) == chip.network
    assert preflight._rate(tuple(range(16)), 8, chip) == 8 * chip.network
    assert preflight._rate((0, 8), 8, costs.CHIPS["TPU v6"]) == costs.CHIPS["TPU v6"].link


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H200", 989e12)],
)
def test_a_chip_is_found_by_what_jax_calls_it(kind, peak):
    assert costs.chip(kind).flops == peak
    assert costs.chip("cpu") is None


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "is not KIND:SHAPE"),
        ("v5e:4*4", "is not KIND:SHAPE"),
        ("v9:4x4", "is not known"),
        ("h200:1x2x3", "is not known"),
    ],
)
def test_a_topology_that_is_not_understood_is_refused(topology, message):
    with pytest.raises(UserError, match=message):
        preflight.find_devices(topology)


def test_the_command_needs_no_workdir_but_training_does():
    command = [sys.executable, "-m", "speech_jax.main"]
    config = f"--config={runs.ROOT / 'configs' / 'quickstart.py'}"
    done = runs.run([*command, config, "--mode=compile", "--topology=v9:3"], check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: --topology='v9:3' is not known" in done.stderr
    done = runs.run([*command, config], check=False)
    assert done.returncode == 1
    assert "error: --mode=train needs a --workdir" in done.stderr


def test_a_tpu_slice_that_is_not_here():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("NO TPU COMPILER: pip install 'speech_jax[tpu-aot]'")
    config = runs.tiny_config("nowhere")
    figures = preflight.measure(config, preflight.find_devices("v5e:2x2"))
    assert figures["fits"]
    assert figures["device"] == "TPU v5 lite"
    assert figures["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert figures["step_seconds"] > 0
    assert jax.devices()[0].platform == "cpu"


def test_products_are_counted_in_the_compiled_program():
    """As costs.py counts them before: those of loops and fusions, convolutions too."""

    def function(x, kernel):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]
        seen = jax.lax.conv_general_dilated(
            x[None, :, :, None], kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return seen.sum() + (x * 2 @ x).sum()

    traced = jax.jit(jax.value_and_grad(function)).trace(jnp.ones((48, 48)), jnp.ones((3, 3, 1, 4)))
    text = traced.lower().compile().as_text()
    assert hlo.products(text) == pytest.approx(costs.matmul_flops(traced.jaxpr), rel=0.05)
    found = hlo.costs(text)
    largest = max(products for _, products in found.values())
    assert largest == pytest.approx(2 * 48**3)
    assert all(moved >= 0 for moved, _ in found.values())
