"""A workdir in a bucket (gs://), against a storage emulator on this machine."""

import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gcsfs", reason="the gcs extra is not installed")
pytest.importorskip("gcp_storage_emulator", reason="the storage emulator is not installed")

import runs
import test_report
from speech_jax import config as settings
from speech_jax import experiment, files
from speech_jax import workdir as workdirs
from speech_jax.data import audio, sources
from speech_jax.data.batch import Bucket
from speech_jax.data.parts.category import Category
from speech_jax.errors import UserError
from speech_jax.evaluators import accuracy, layer_weights, robustness
from speech_jax.training.checkpoint import Checkpoints, load_best
from speech_jax.workdir import Workdir, WorkdirError

pytestmark = pytest.mark.filterwarnings("default")  # those of the storage's clients are not ours

# Where gcsfs, tensorstore and ArrayRecord are told of an emulator.
VARIABLES = (
    "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT",
)  # fmt: skip
SERVER = """
import sys
from gcp_storage_emulator.server import create_server
create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, address)
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("NO_PROXY", "localhost")
        null = subprocess.DEVNULL
        command = [sys.executable, "-c", SERVER, str(port)]
        with subprocess.Popen(command, stdout=null, stderr=null) as server:
            while True:
                assert server.poll() is None
                try:
                    socket.create_connection(("localhost", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield "gs://bucket"
            server.kill()


def test_a_run_in_a_bucket(bucket):
    workdir = Workdir(f"{bucket}/runs/x")
    config = settings.default()
    with workdir.locked():
        workdir.check(config)
        workdir.prepare(["dev", "/a/b"])
        workdir.record(config)
        plan = (Bucket(2, (("samples", 5),)),)
        workdir.record_plan(plan, "abc", 3)
        state = {"params": {"w": jnp.arange(6.0)}, "key": jax.random.key(3)}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        with Checkpoints(workdir.checkpoints, keep=1) as checkpoints:
            for step in (1, 2):
                data = {"next_batch": step}
                checkpoints.save(step, state, data=data, stopper={}, config={})
            restored = checkpoints.restore(shapes)
        for first in (0, 2):  # killed after update 4, resumed from 2
            with test_report.report(workdir.folder, first=first) as report:
                test_report.go(report, first, 5)
        files.write_atomically(workdir.predictions("/a/b"), "é\n")
        workdir.write_results({"dev": {"wer": 0.1}})
        workdir.write_results({"test": {"wer": 0.2}})

    workdir.check(config)
    assert workdir.recorded_plan() == (plan, "abc", 3)
    assert (restored.step, restored.data) == (2, {"next_batch": 2})
    assert jnp.array_equal(restored.state["key"], state["key"])
    found = load_best(workdir.checkpoints, ["params"])
    np.testing.assert_array_equal(found["params/w"], np.arange(6.0))
    assert [line["step"] for line in test_report.lines(workdir.folder)] == [2, 4]
    assert len(test_report.events(workdir.folder)) == 2
    assert files.read_json(workdir.results)["splits"].keys() == {"dev", "test"}
    left = {path.name for path in workdir.folder.iterdir()}
    assert left == {
        "checkpoints", "config.json", "metrics.jsonl", "plan.json", "predictions", "results.json",
        "tensorboard",
    }  # fmt: skip


def test_what_is_learned_of_the_data_and_curves_are_in_the_bucket(
    bucket, tones, tmp_path, monkeypatch
):
    """And nowhere else. (Checkpoints of many arrays at once are more than the emulator holds.)"""
    monkeypatch.chdir(tmp_path)
    config, folder = runs.tiny_config(tones), files.expand(f"{bucket}/runs/tiny")
    made = experiment.make_parts(config, folder, experiment.open_training(config))
    for found in (made, experiment.restore_parts(config, folder)):
        assert found["labels"].tokenizer.alphabet == " ABC"
        np.testing.assert_array_equal(
            found["audio"].statistics["mean"], made["audio"].statistics["mean"]
        )
    point = {"wer": 0.5, "epsilon": 0.1, "snr_db": 5.0}
    curves = {"clean": point, "fgsm": [point], "pgd10": [point], "noise": [point]}
    robustness.plot({"x": {"dev": curves}}, folder / "robustness.png")
    assert (folder / "robustness.png").read_bytes().startswith(b"\x89PNG")
    layer_weights.draw([0.25, 0.75], folder / "layer_weights.png")
    accuracy.Accuracy(Category(("a", "b"))).draw(folder / "dev.png")
    for name in ("layer_weights", "dev"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == []


def test_prepared_data_is_read_from_a_bucket(bucket, tones, tmp_path):
    """A record at a time; other data, and what is written there, is refused in one sentence."""
    pytest.importorskip("tensorflow_datasets", reason="the extra 'tfds' is not installed")
    from speech_jax.data import prepare

    corpus = sources.open_source("librispeech", root=tones, split="dev")
    prepare.prepare(corpus, "dev", tmp_path)
    there = files.expand(f"{bucket}/prepared")
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            (there / path.relative_to(tmp_path)).write_bytes(path.read_bytes())
    found = sources.open_source("prepared", root=f"{bucket}/prepared", split="dev")
    assert found.utterances == corpus.utterances
    for index in (5, 0):
        expected = audio.decode(corpus.open(index), 16_000)
        np.testing.assert_array_equal(audio.decode(found.open(index), 16_000), expected)
    for message, use in (
        ("no prepared split 'test' .*; it has dev", {"kind": "prepared", "root": there}),
        ("root=.* is in a bucket", {"kind": "manifest", "root": f"{bucket}/data"}),
        ("cache=.* is in a bucket", {"kind": "manifest", "root": tones, "cache": "gs://x/y"}),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_source(**use, split="test")
    with pytest.raises(UserError, match=r"out=.* is in a bucket"):
        prepare.prepare(corpus, "dev", f"{bucket}/elsewhere")


def test_one_run_at_a_time(bucket, monkeypatch):
    monkeypatch.setattr(workdirs._Heartbeat, "SECONDS", 1.0)
    workdir = Workdir(f"{bucket}/locked")
    with (
        workdir.locked(),
        pytest.raises(WorkdirError, match=f"in use by process {os.getpid()} on "),
    ):
        Workdir(workdir.folder).locked().__enter__()
    assert not workdir.lock.exists()
    workdir.lock.write_bytes(b"process 1 on a host that died since\n3\n")
    with workdir.locked():
        assert f"process {os.getpid()} on " in workdir.lock.read_text()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("gs://bucket/a[1]", "takes .* for patterns"),
        ("gs://no-such-bucket/x", "cannot write .*no-such-bucket"),
        ("foo://bucket/x", "cannot be reached"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_before_any_work(bucket, folder, message):
    with pytest.raises(UserError, match=message) as raised:
        Workdir(folder).prepare(["dev"])
    assert "\n" not in str(raised.value)
