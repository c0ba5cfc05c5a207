"""Metrics survive a kill."""

import json

from speech_jax.training.report import Writer


def test_resumed_runs_write_each_step_once(tmp_path):
    writer = Writer(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    resumed = Writer(tmp_path)
    resumed.truncate(20)
    resumed.write(30, {"loss": 0.5})
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    assert list((tmp_path / "tensorboard").iterdir())
