"""A short run of the fuzzer: mutated inputs of every kind are right, or refused in one line."""

import json
import sys

import runs


def test_mutated_inputs_are_right_or_refused_in_one_line(tmp_path):
    file = tmp_path / "table.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--inputs=105", "--seed=7"]
    done = runs.run([*command, f"--json={file}"], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert rows[-1]["inputs"] == rows[-1]["right"] + rows[-1]["one line"] == 105
    for row in rows:  # neither are all inputs refused, nor does every mutation do nothing
        assert row["right"] > 0, row
        assert row["one line"] > 0, row
