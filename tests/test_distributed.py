"""The same training on one device, on eight in any arrangement, and on two processes of four."""

import json
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import follow
import runs
import test_classify
from benchmarks import kill_resume

pytestmark = pytest.mark.optax

# Only the first of two processes would find its program in the cache, and gloo waits for the other
# no longer than 30 seconds.
COMPILE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.fixture(scope="module")
def reference(tones, tmp_path_factory):
    """Twenty steps on eight devices (fsdp 4, tensor 2), with a checkpoint after the tenth."""
    folder = tmp_path_factory.mktemp("reference")
    run = follow.Run(tones, folder, (1, 4, 2))
    found = run.go(0, follow.STEPS, save=folder / "checkpoints")
    return folder, found, run


@pytest.fixture(scope="module")
def alone(tones, reference):
    """The same on one device."""
    return follow.Run(tones, reference[0], (1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def two_processes(tones, reference):
    """What two processes of four devices each found: fresh, and from the checkpoint."""
    folder = reference[0]
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        address = f"localhost:{taken.getsockname()[1]}"
    outputs = [folder / f"process_{index}.json" for index in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, str(runs.ROOT / "tests" / "follow.py"), str(tones), str(folder)]
            + [str(folder / "checkpoints"), str(output), address, str(index)],
            env=runs.environment(4, PYTHONPATH=str(runs.ROOT), **COMPILE),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, output in enumerate(outputs)
    ]
    errors = [child.communicate(timeout=300)[1] for child in children]
    for child, error in zip(children, errors, strict=True):
        assert child.returncode == 0, error[-3000:]
    first, second = (json.loads(output.read_text()) for output in outputs)
    for name in ("fresh", "restored"):
        assert first[name]["losses"] == second[name]["losses"]
        # Each process loads its half of the rows of every batch.
        pairs = zip(first[name]["ids"], second[name]["ids"], strict=True)
        first[name]["ids"] = [a + b for a, b in pairs]
    return first


def test_an_epoch_holds_every_utterance_once(reference):
    _, found, _ = reference
    for epoch in (0, 6, 12):
        ids = [place for batch in found["ids"][epoch : epoch + 6] for place in batch]
        assert sorted(ids) == list(range(48))
    assert found["losses"][-1] < 0.7 * found["losses"][0], "a wrong step would not show"


def test_one_device_computes_the_same(reference, alone):
    same(alone.go(0, follow.STEPS), reference[1])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_every_mesh_computes_the_same(reference, tones, shape):
    run = follow.Run(tones, reference[0], shape)
    same(run.go(0, follow.STEPS), reference[1])
    assert_placed(run)


def test_two_processes_compute_the_same(reference, two_processes):
    same(two_processes["fresh"], reference[1])


def test_arrays_are_where_the_rules_say(reference):
    assert_placed(reference[2])


def test_a_checkpoint_of_eight_goes_on_on_one(reference, alone):
    folder, found, _ = reference
    continues(alone.go(follow.SAVED, follow.SAVED + 3, restore=folder / "checkpoints"), found)


def test_a_checkpoint_of_eight_goes_on_on_two(reference, tones):
    folder, found, _ = reference
    run = follow.Run(tones, folder, (1, 1, 2), jax.devices()[:2])
    continues(run.go(follow.SAVED, follow.SAVED + 3, restore=folder / "checkpoints"), found)


def test_a_checkpoint_of_one_process_goes_on_on_two_processes(reference, two_processes):
    continues(two_processes["restored"], reference[1])


def same(found, expected):
    assert found["ids"] == expected["ids"]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4)


def continues(found, expected):
    steps = slice(follow.SAVED, follow.SAVED + 3)
    assert found["ids"] == expected["ids"][steps]
    np.testing.assert_allclose(found["losses"], expected["losses"][steps], rtol=1e-5)


def assert_placed(run):
    """The state that came out of a step lies as its abstract one says, the moments as well."""
    for array, sharding in zip(
        jax.tree.leaves(run.state), jax.tree.leaves(run.setup.shardings), strict=True
    ):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), array.shape
    split = {x.sharding.spec for x in jax.tree.leaves(run.state.params) if x.size > 1000}
    moments = {x.sharding.spec for x in jax.tree.leaves(run.state.opt_state) if x.size > 1000}
    assert split == moments


# ---- Killed, and told to leave -----------------------------------------------------------------


def test_kills_change_nothing(tones, tmp_path):
    flags = runs.command(tmp_path, tones, steps=40, eval_every=5, log_every=1)[3:]
    flags = [flag for flag in flags if not flag.startswith("--workdir")]
    found = kill_resume.compare(flags, tmp_path, kills=2, seed=0, env=runs.environment())
    assert found["kills"] == 2
    assert found["differences"] == []


# A recipe whose evaluations take their time, and say so.
SLOW = """
import time
from speech_jax.evaluators import loop
plain = loop.by_utterance
def slow(*arguments):
    print("evaluating", flush=True, file=sys.stderr)
    time.sleep(0.7)
    return plain(*arguments)
loop.by_utterance = slow
"""
# The first process takes its time to put a checkpoint aside, which the other one must wait for.
SLOW_RENAME = """
import time
from etils import epath
Path = type(epath.Path("/"))
rename = Path.rename
def slow(*arguments):
    time.sleep(2)
    return rename(*arguments)
Path.rename = slow
"""


def test_sigterm_saves_on_two_processes_and_they_go_on(tones, tmp_path):
    """Within an evaluation, which the command that goes on does first, and between updates."""
    flags = runs.command(tmp_path, tones, "--config.mesh.data=2", steps=2000, eval_every=4)[3:]
    flags += ["--config.data.eval_splits=train", "--config.data.batch_seconds=4"]
    command = [str(runs.ROOT / "launch" / "local.sh"), "2", "--", *flags]
    command.append("--config.checkpoint.every=5000")
    recipe = tmp_path / "recipe.py"
    quick = recipe.read_text()
    recipe.write_text(quick + SLOW)
    first = told_to_leave(command, "evaluating")
    assert "saved update 4; the same command goes on from there" in first
    assert first.count("evaluating") < 12, "of 12 batches"
    checkpoint = tmp_path / "work" / "checkpoints" / "4"
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert json.loads((checkpoint / "record" / "metadata").read_text())["data"]["pending"]
    recipe.write_text(quick + SLOW_RENAME)
    again = told_to_leave(command)
    assert "from update 4\n" in again
    assert re.search("^step .*", again, re.M)[0].startswith("step 4  train: WER")
    saved = int(re.search(r"saved update (\d+)", again)[1])
    assert 4 < saved < 2000
    lines = runs.metrics(tmp_path / "work")
    assert next(line["step"] for line in lines if "train/wer" in line) == 4
    steps = [line["step"] for line in lines if "loss_per_label" in line]
    assert steps == list(range(2, steps[-1] + 1, 2)), "no logged step is missing or twice there"


COMPARED = """
import sys
sys.path.insert(0, {tests!r})
import test_classify
def get_config():
    config = test_classify.configure({calls!r}, {base!r})
    config.task.layer_sum = False
    config.data.update({{"eval_splits": "dev", "test_splits": ""}})
    config.train.update({{"steps": 1, "log_every": 1}})
    config.data.cache = {cache!r}
    return config
"""


def test_before_and_after_on_two_processes(tones, finished, tmp_path):
    """The head alone is fitted on states that both have computed and one has written."""
    tests, base = str(runs.ROOT / "tests"), str(finished.workdir.folder)
    calls = test_classify.write_calls(tones, tmp_path)
    text = COMPARED.format(tests=tests, calls=str(calls), base=base, cache=str(tmp_path / "cache"))
    (tmp_path / "recipe.py").write_text(text)
    flags = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'work'}"]
    command = [str(runs.ROOT / "launch" / "local.sh"), "2", "--", *flags]
    runs.run(command, 1, PYTHON=sys.executable, **COMPILE)
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    head = results["before"]["head"]["dev"]
    assert head["utterances"] == results["splits"]["dev"]["utterances"] == 6
    assert results["gain"]["dev"]["before"] == pytest.approx(head["error_rate"])
    assert len(list((tmp_path / "cache" / "hidden").iterdir())) == 2


FAILS = """
import os
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, index)
from speech_jax.errors import UserError
from speech_jax.training import sharding
def fail():
    raise UserError("only the first one knows")
assert sharding.from_first(lambda: {"first": jax.process_index() == 0}) == {"first": True}
try:
    sharding.from_first(fail)
except UserError as error:
    print(error)
"""


def test_an_error_of_the_first_process_is_raised_on_all():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        address = f"localhost:{taken.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS, address, str(index)],
            env=runs.environment(1, PYTHONPATH=str(runs.ROOT)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [output.splitlines()[-1] for output in outputs] == ["only the first one knows"] * 2


def told_to_leave(command, at=r"step \d+/2000") -> str:
    """What a command says until it has exited with 0, a SIGTERM after a line that begins so."""
    environment = runs.environment(2, PYTHON=sys.executable, **COMPILE)
    process = subprocess.Popen(
        command, cwd=runs.ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.match(at, line):
            break
    process.send_signal(signal.SIGTERM)
    text = "".join(lines) + process.communicate(timeout=300)[1]
    assert process.returncode == 0, text[-3000:]
    return text
