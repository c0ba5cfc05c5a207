"""Steps are compiled beside the run, and what was compiled is kept for this processor alone."""

import concurrent.futures
import os
import threading

import jax
import pytest

from speech_jax import compiled
from speech_jax.errors import UserError
from speech_jax.training import programs
from speech_jax.training.programs import Program, Programs


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr(programs.os, "cpu_count", lambda: 1)


def test_the_run_goes_on_while_later_steps_are_compiled(one_thread):
    go, made = threading.Event(), []

    def maker(name, waits):
        def make():
            if waits:
                go.wait(10)
            made.append(name)
            return Program(name, 1.0)

        return make

    found = Programs(
        [(0, "a", maker("a", False)), (0, "b", maker("b", True)), (5, "a", maker("late", False))]
    )
    assert found.at(1, "a").run == "a"
    assert not found.has(2, "b")
    assert made == ["a"]
    go.set()
    assert found.at(6, "a").run == "late"
    assert found.at(5, "b").run == "b"  # the sixth update is the first with what thaws after five
    assert made == ["a", "b", "late"]


def test_what_cannot_be_compiled_is_heard_of_at_the_next_update(one_thread):
    def fails():
        raise UserError("it does not fit")

    found = Programs([(0, "a", lambda: Program("a", 1.0)), (0, "b", fails)])
    found.at(1, "a")
    with pytest.raises(UserError, match="does not fit"):
        found.at(2, "b")
    with pytest.raises(UserError, match="does not fit"):
        found.at(2, "a")


def test_a_run_that_ends_leaves_what_nobody_has_begun(one_thread):
    begun, go, made = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        go.wait(10)
        return Program("a", 1.0)

    found = Programs([(0, "a", first), (0, "b", lambda: made.append("b"))])
    begun.wait(10)
    found.close()
    go.set()
    with pytest.raises(concurrent.futures.CancelledError):
        found.at(1, "b")
    assert not made


@pytest.fixture
def nothing_kept():
    """JAX without a folder for programs, as a user has it; the session's is back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_another_processor_has_another_folder(nothing_kept, tmp_path, monkeypatch):
    folders = []
    for instructions in ("avx2", "avx2 avx512f", "avx2"):
        (tmp_path / "cpuinfo").write_text(f"flags : {instructions}\ncpu MHz : {len(folders)}\n")
        monkeypatch.setattr(compiled, "CPUS", tmp_path / "cpuinfo")
        compiled.keep(tmp_path / "cache")
        folders.append(jax.config.jax_compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", None)
    assert folders[0] == folders[2] != folders[1]
    assert os.path.dirname(folders[0]) == str(tmp_path / "cache" / "programs")


def test_the_users_own_folder_is_used(nothing_kept, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compiled.keep(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (tmp_path / "programs").exists()


def test_what_cannot_be_written_is_not_kept(nothing_kept, tmp_path):
    (tmp_path / "cache").write_text("a file")
    compiled.keep(tmp_path / "cache")
    assert jax.config.jax_compilation_cache_dir is None


def test_the_oldest_programs_go(nothing_kept, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LIMIT", 25)
    for number in range(4):
        file = tmp_path / "programs" / ("old" if number < 2 else "new") / f"{number}-cache"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(10))
        os.utime(file, (number, number))
    compiled.keep(tmp_path)
    left = sorted(path.name for path in (tmp_path / "programs").glob("*/*-cache"))
    assert left == ["2-cache", "3-cache"]
