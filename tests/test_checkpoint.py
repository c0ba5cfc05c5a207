"""Checkpoints survive kills, damage and full disks, and restore onto any mesh and process count.

Run as a program, this file is one process of the two-process tests.
"""

import functools
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import runs
from speech_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    restore_params,
)
from speech_jax.training.stopping import EarlyStopping, catch_preemption

P = PartitionSpec
SHARDINGS = {
    "params": {"kernel": P("fsdp", "tensor"), "bias": P("data"), "mask": P()},
    "moments": ({"kernel": P(("data", "fsdp"), "tensor")}, P()),
    "step": P(),
    "key": P(),
}


def make_mesh(*shape):
    return jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[: int(np.prod(shape))],
    )


def shardings(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SHARDINGS)


@functools.cache
def initializer(mesh, rows):
    def init(step):
        key = jax.random.key(step)
        kernel = jax.random.normal(key, (rows, 8))
        return {
            "params": {
                "kernel": kernel,
                "bias": jnp.arange(8).astype(jnp.bfloat16) * step.astype(jnp.bfloat16),
                "mask": kernel[0] > 0,
            },
            "moments": ({"kernel": kernel**2}, jnp.full((3,), step, jnp.int8)),
            "step": step,
            "key": key,
        }

    return jax.jit(init, out_shardings=shardings(mesh))


def make_state(mesh, step, rows=16):
    """A tiny train state of every kind of leaf, a function of `step`."""
    return initializer(mesh, rows)(jnp.int32(step))


def abstract(mesh, rows=16):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(initializer(mesh, rows), jnp.int32(0)),
        shardings(mesh),
    )


def bits(tree):
    """The leaves' types, shapes and bytes."""

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        host = np.asarray(leaf)
        return str(host.dtype), host.shape, host.tobytes()

    return jax.tree.map(one, tree)


def save(checkpoints, step, mesh, **metrics):
    checkpoints.save(
        step,
        make_state(mesh, step),
        data={"next_index": step},
        stopper={"best": step / 3, "count": 0},
        config={"layers": [1, 2]},
        metrics=metrics,
    )


def steps_in(directory):
    return sorted(int(path.name) for path in pathlib.Path(directory).iterdir())


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("wants XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return make_mesh(2, 2, 2)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """A directory with checkpoints 1 and 2: copy it before changing it."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        save(checkpoints, 1, mesh)
        save(checkpoints, 2, mesh)
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of `saved` whose checkpoint 2 has lost its arrays' data."""
    directory = shutil.copytree(saved, tmp_path / "damaged")
    shutil.rmtree(directory / "2" / "state" / "d")
    shutil.rmtree(directory / "2" / "state" / "ocdbt.process_0")
    return directory


# ---- Saving and restoring ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1), (8, 1, 1), (1, 4, 2), (1, 2, 1)])
def test_restores_bit_for_bit_onto_any_mesh(saved, shape):
    target = make_mesh(*shape)
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(abstract(target))
    assert restored.step == 2
    assert restored.data == {"next_index": 2}
    assert restored.stopper == {"best": 2 / 3, "count": 0}
    assert restored.config == {"layers": [1, 2]}
    assert bits(restored.state) == bits(make_state(target, 2))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == shardings(target)


def test_an_empty_directory_has_no_checkpoint(mesh, tmp_path):
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.restore(abstract(mesh)) is None


def test_a_saved_state_may_be_donated_at_once(mesh, tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    kernel = jax.device_put(jnp.ones((1024, 512)), NamedSharding(mesh, P("fsdp")))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 4):
            state = {"kernel": kernel * step, "replicated": jnp.full((1024, 512), float(step))}
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                state,
            )
            checkpoints.save(step, state, data={}, stopper={}, config={})
            jax.block_until_ready(update(update(state)))
            restored = checkpoints.restore(shapes).state
            assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(restored))


def test_keeps_the_last_and_the_best(mesh, tmp_path):
    scores = {1: float("nan"), 2: 0.1, 3: 0.5, 4: 0.3, 5: None, 6: 0.4}
    for step, score in scores.items():  # a new process each time: the best is not forgotten
        with Checkpoints(tmp_path, keep=2, best_metric="wer") as checkpoints:
            save(checkpoints, step, mesh, **({} if score is None else {"wer": score}))
    assert steps_in(tmp_path) == [2, 5, 6]
    params = abstract(mesh)["params"]
    for which, step in (("best", 2), ("latest", 6)):
        restored = restore_params(tmp_path, params, which=which)
        assert bits(restored) == bits(make_state(mesh, step)["params"])


def test_the_best_may_be_the_highest(mesh, tmp_path):
    with Checkpoints(tmp_path, keep=1, best_metric="accuracy", best_mode="max") as checkpoints:
        for step, score in enumerate([0.2, 0.9, 0.9, 0.1]):
            save(checkpoints, step, mesh, accuracy=score)
    assert steps_in(tmp_path) == [2, 3]


def test_a_step_is_saved_once(mesh, saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "copy")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, make_state(mesh, 7), data={}, stopper={}, config={})
        restored = checkpoints.restore(abstract(mesh))
    assert bits(restored.state) == bits(make_state(mesh, 2))


def test_params_alone_and_in_part(mesh, saved):
    kernel = jax.ShapeDtypeStruct((16, 8), jnp.float32)  # says no place: the first device
    restored = restore_params(saved, {"kernel": kernel})
    want = make_state(mesh, 2)
    assert bits(restored) == bits({"kernel": want["params"]["kernel"]})
    assert restored["kernel"].devices() == {jax.local_devices()[0]}
    restored = restore_params(saved, {"kernel": kernel}, prefix="moments/0")
    assert bits(restored) == bits(want["moments"][0])
    with pytest.raises(CheckpointError, match="has no params/decoder"):
        restore_params(saved, {"decoder": kernel})
    with pytest.raises(CheckpointError, match="train first"):
        restore_params(saved / "elsewhere", {"kernel": kernel})
    with pytest.raises(ValueError, match="'best' or 'latest'"):
        restore_params(saved, {"kernel": kernel}, which="newest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["params"].update(kernel=tree["step"]), r"params/kernel as float32\[16,"),
        (lambda tree: tree["params"].update(bias=tree["key"]), r"params/bias as bfloat16\[8\]"),
        (lambda tree: tree["params"].update(extra=tree["step"]), "has no params/extra"),
        (lambda tree: tree.pop("moments"), "has moments/0/kernel, unknown to this model"),
    ],
)
def test_another_tree_is_refused_by_the_first_leaf_that_differs(mesh, saved, change, message):
    tree = abstract(mesh)
    change(tree)
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match=message) as raised:
        checkpoints.restore(tree)
    assert "\n" not in str(raised.value)


def test_a_leaf_that_is_no_array_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="a/0 is a float"):
        checkpoints.save(1, {"a": [1.0]}, data={}, stopper={}, config={})


# ---- Damage --------------------------------------------------------------------------------------


def corrupt(checkpoint, generator):
    """Flips a bit of, truncates or deletes a random file of a checkpoint, or deletes a folder."""
    path = generator.choice(sorted(checkpoint.rglob("*")))
    if path.is_dir():
        shutil.rmtree(path)
        return
    data = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "flip", "truncate", "delete"])
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: generator.randrange(len(data))])
    else:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)


def test_fifty_corruptions_never_give_wrong_weights(mesh, saved, tmp_path):
    want = {step: bits(make_state(mesh, step)) for step in (1, 2)}
    target, counts = abstract(mesh), {1: 0, 2: 0}
    for seed in range(50):
        directory = shutil.copytree(saved, tmp_path / str(seed))
        corrupt(directory / "2", random.Random(seed))
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore(target)
        assert restored.data == {"next_index": restored.step}, seed
        assert bits(restored.state) == want[restored.step], seed
        counts[restored.step] += 1
    assert counts[1] > 25  # some bytes do not matter: those of orbax's own bookkeeping


def test_damage_is_reported_on_one_line_and_the_run_goes_on(mesh, damaged, caplog):
    with Checkpoints(damaged, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(mesh)).step == 1
        (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.msg]
        assert "Checkpoint 2" in line
        assert "\n" not in line
        save(checkpoints, 2, mesh)  # in the place of the damaged one
        restored = checkpoints.restore(abstract(mesh))
        assert (restored.step, bits(restored.state)) == (2, bits(make_state(mesh, 2)))
    assert steps_in(damaged) == [1, 2]


def test_a_damaged_checkpoint_does_not_count_as_kept(mesh, damaged):
    (damaged / "2").rename(damaged / "20")
    with Checkpoints(damaged, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(mesh)).step == 1
        save(checkpoints, 3, mesh)
    assert steps_in(damaged) == [1, 3]


def test_all_damaged_is_an_error_with_a_cure(mesh, damaged):
    (damaged / "1" / "digests.json").unlink()
    with (
        Checkpoints(damaged) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"None of the 2 checkpoints .* move it away"
        ) as raised,
    ):
        checkpoints.restore(abstract(mesh))
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="None of the 2"):
        restore_params(damaged, abstract(mesh)["params"])


def test_params_of_a_damaged_best_come_from_the_newest_good_one(mesh, damaged):
    restored = restore_params(damaged, abstract(mesh)["params"])
    assert bits(restored) == bits(make_state(mesh, 1)["params"])


# ---- Disks ---------------------------------------------------------------------------------------


def fill_and_recover(directory, mesh, large, limit=lambda: None, unlimit=lambda: None):
    """Saves one that fits and one that does not, then starts again."""
    checkpoints = Checkpoints(directory)
    save(checkpoints, 1, mesh)
    checkpoints.wait()
    limit()
    try:
        checkpoints.save(2, large, data={}, stopper={}, config={})
        with pytest.raises(CheckpointError, match=r"Cannot write checkpoint 2 .*free") as raised:
            checkpoints.wait()
    finally:
        unlimit()
    assert "\n" not in str(raised.value)
    checkpoints.close()
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(abstract(mesh))
        assert (restored.step, bits(restored.state)) == (1, bits(make_state(mesh, 1)))
        save(checkpoints, 2, mesh)
    assert steps_in(directory) == [1, 2]


def test_a_file_too_large_fails_clearly_and_keeps_the_previous(mesh, tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill_and_recover(
        tmp_path,
        mesh,
        {"kernel": jnp.zeros((1024, 1024))},
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard)),
        unlimit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )
    assert not [record for record in caplog.records if record.exc_info]  # no pages of traceback


def test_a_full_disk_fails_clearly_and_keeps_the_previous(mesh, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("NOT TESTED HERE: a really full disk (mounting a small tmpfs wants root)")
    try:
        fill_and_recover(tmp_path / "checkpoints", mesh, {"kernel": jnp.zeros((1024, 1024))})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot keep checkpoints in .*writable"):
        Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize("setting", [{"keep": 0}, {"best_mode": "lowest"}])
def test_impossible_settings_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=r"keep|min"):
        Checkpoints(tmp_path, **setting)


# ---- Stopping ------------------------------------------------------------------------------------


def test_early_stopping_counts_evaluations_without_a_better_one():
    stopper = EarlyStopping(patience=2)
    improved = [stopper.update(value) for value in (3.0, 2.0, float("nan"))]
    assert improved == [True, True, False]
    assert not stopper.should_stop
    resumed = EarlyStopping(patience=2)
    resumed.from_dict(stopper.to_dict())
    assert not resumed.update(2.0)  # an equal is not better
    assert resumed.should_stop
    assert resumed.update(1.0)
    assert not resumed.should_stop


def test_early_stopping_by_the_highest_or_never():
    highest = EarlyStopping(patience=1, mode="max")
    assert [highest.update(value) for value in (-2.0, -1.0, -3.0)] == [True, True, False]
    assert highest.should_stop
    never = EarlyStopping(patience=0)
    never.update(float("nan"))
    assert not never.should_stop


def test_sigterm_is_noticed_in_a_single_process():
    before = signal.getsignal(signal.SIGTERM)
    try:
        reached = catch_preemption()
        assert not reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert reached(2)
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- Processes -----------------------------------------------------------------------------------


def start(role, directory, devices, *args):
    command = [sys.executable, __file__, role, str(directory), *map(str, args)]
    return subprocess.Popen(
        command,
        env=runs.environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kill_9_while_saving_leaves_the_previous_checkpoint(mesh, tmp_path):
    generator, last = random.Random(0), 0
    for _ in range(2):
        with start("save_forever", tmp_path, 1) as process:
            for line in process.stdout:
                if line.startswith("saving") and int(line.split()[1]) > last + 2:
                    break
            time.sleep(generator.random() / 5)
            process.kill()
            output = line + process.stdout.read()
        written = [int(line.split()[1]) for line in output.splitlines() if "saving" in line]
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(abstract(make_mesh(1, 1, 1), rows=40_000))
        assert restored.step in (written[-1], written[-1] - 1)  # a save waits for the one before
        want = make_state(make_mesh(1, 1, 1), restored.step, rows=40_000)
        assert bits(restored.state) == bits(want)
        last = restored.step


def save_forever(directory):
    """Saves step after step from the newest checkpoint on, printing each before it is saved."""
    mesh = make_mesh(1, 1, 1)
    checkpoints = Checkpoints(directory)
    restored = checkpoints.restore(abstract(mesh, rows=40_000))
    for step in range(restored.step + 1 if restored else 1, 10_000):
        state = make_state(mesh, step, rows=40_000)
        checkpoints.wait()
        print("saving", step, flush=True)
        checkpoints.save(step, state, data={}, stopper={}, config={})


def test_two_processes_restore_from_one_and_one_from_two(mesh, damaged):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start("pair", damaged, 4, port, index) for index in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    # The damaged one was not used; SIGTERM to one of them was the same step for both.
    leaving = [line for output in outputs for line in output.splitlines() if "leave" in line]
    assert len(leaving) == 2, outputs
    assert leaving[0] == leaving[1]
    with Checkpoints(damaged) as checkpoints:
        restored = checkpoints.restore(abstract(mesh))
    assert leaving[0] == f"leave {restored.step}"
    assert bits(restored.state) == bits(make_state(mesh, restored.step))


def pair(directory, port, index):
    """One of two processes: restores, is told to leave, saves and leaves."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    reached = catch_preemption()
    mesh = make_mesh(2, 2, 2)
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(abstract(mesh))
        assert restored.step == 1
        want = make_state(mesh, 1)
        same = jax.jit(
            lambda left, right: jnp.stack(
                jax.tree.leaves(jax.tree.map(jnp.array_equal, left, right))
            )
        )
        assert same(restored.state, want).all()
        if index == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        step = restored.step
        while not reached(step):
            assert step < 3_000
            time.sleep(0.01)
            step += 1
        save(checkpoints, step, mesh)
    print("leave", step)


if __name__ == "__main__":
    {"save_forever": save_forever, "pair": pair}[sys.argv[1]](*sys.argv[2:])
