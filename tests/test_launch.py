"""The launch scripts, run for real with a recording gcloud, srun and python in front on PATH."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FLAGS = ["--config=configs/librispeech.py", "--workdir=/share/runs/it's a"]

# Stands for the trained program: takes the next outcome from a file and does it.
TRAINER = r"""#!/bin/bash
echo "$*" >> $FAKE/trained
outcome=$(head -n 1 $FAKE/outcomes)
sed -i 1d $FAKE/outcomes
echo "log: $outcome"
for flag; do case $flag in --workdir=*) workdir=${flag#*=} ;; esac; done
case $outcome in
  finish) mkdir -p "$workdir" && touch "$workdir/results.json" ;;
  leave) ;;
  preempt) echo PREEMPTED > $FAKE/state; echo SUSPENDED > $FAKE/queue; exit 1 ;;
  wait) trap 'kill $!; exit 0' TERM; touch $FAKE/waiting; sleep 30 & wait ;;
  *) exit $outcome ;;
esac
"""

# One TPU worker, in the folder $FAKE/home, and the state of its slice.
GCLOUD = r"""#!/bin/bash
echo "$*" >> $FAKE/calls
case "$3 $4" in
  "tpu-vm describe") cat $FAKE/state ;;
  "tpu-vm create") echo READY > $FAKE/state ;;
  "queued-resources create") echo PROVISIONING > $FAKE/queue ;;
  "queued-resources describe")  # ready when it is asked for the second time
    cat $FAKE/queue || exit 1
    if [ $(cat $FAKE/queue) = PROVISIONING ]; then
      echo ACTIVE > $FAKE/queue
      echo READY > $FAKE/state
    fi ;;
  *delete) rm -f $FAKE/state $FAKE/queue ;;
  "tpu-vm scp") cp "$5" "$FAKE/home/${6#*:}" ;;
  "tpu-vm ssh")
    for flag; do case $flag in --command=*) command=${flag#*=} ;; esac; done
    cd $FAKE/home && HOME=$FAKE/home bash -c "$command" ;;
esac
"""

UV = r"""#!/bin/bash
[ "$1" != venv ] || { mkdir -p env/bin && cp $FAKE/bin/python env/bin/; }
"""

SRUN = r"""#!/bin/bash
echo "$(basename $0) $*" >> $FAKE/calls
case $1 in --kill-on-bad-exit=1) shift && exec "$@" ;; esac
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder of recording programs, first on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "calls").write_text("")
    programs = {"gcloud": GCLOUD, "python": TRAINER, "python3": "#!/bin/bash\n", "uv": UV}
    for name, text in (programs | {"srun": SRUN, "scontrol": SRUN}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("POLL_SECONDS", "0")
    for name in [name for name in os.environ if name.startswith(("SLURM", "PYTHON"))]:
        monkeypatch.delenv(name)
    return tmp_path


def launch(script, *args):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *args], capture_output=True, text=True, timeout=60
    )


def outcomes(fake, *lines):
    (fake / "outcomes").write_text("".join(f"{line}\n" for line in lines))


def calls(fake):
    """The recorded commands, up to their options."""
    return [line.split(" --")[0] for line in (fake / "calls").read_text().splitlines()]


# ---- All scripts ---------------------------------------------------------------------------------


def test_shellcheck_passes():
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    shellcheck = shellcheck or shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("NOT TESTED HERE: shellcheck is not installed (the extra test brings it)")
    result = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_teaches_every_option(script):
    result = launch(script.name, "--help")
    assert result.returncode == 0
    assert "Usage: " in result.stdout
    text = script.read_text()
    for option in {word.split("=")[0] for word in text.split() if word.startswith("--")}:
        if f"{option}=*)" in text or f"{option})" in text:
            assert option in result.stdout


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("local.sh", ["2"], "flags are missing"),
        ("local.sh", ["two", "--", "--config=c"], "not 'two'"),
        ("local.sh", ["--config=c"], "unknown option --config=c"),
        ("run.sh", ["--config=c"], "--workdir=... is missing"),
        ("slurm.sbatch", [], "flags are missing"),
        ("tpu_vm.sh", ["--name=a", "--", "--config=c"], "--zone are needed"),
        ("tpu_vm.sh", ["--name=a", "--zone=z", "--", "--config=c"], "--type is needed"),
        ("tpu_vm.sh", ["--name=a", "--zone=z", "--type=v4-8"], "flags are missing"),
        ("tpu_vm.sh", ["--nmae=a"], "unknown option --nmae=a"),
    ],
)
def test_wrong_use_says_so(fake, script, args, message):
    result = launch(script, *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert "--help" in result.stderr
    assert not calls(fake)


# ---- local.sh ------------------------------------------------------------------------------------

# A real python with this program in the place of speech_jax.main.
LOCAL = """#!/bin/bash
case $1 in
  -c) exec {python} "$@" ;;
  *) echo "$SPEECH_JAX_PROCESS_ID of $SPEECH_JAX_NUM_PROCESSES at $SPEECH_JAX_COORDINATOR: $*" ;;
esac
{then}
"""


def local_python(fake, then):
    (fake / "bin" / "python").write_text(LOCAL.format(python=sys.executable, then=then))


def test_local_runs_n_processes_that_know_of_each_other(fake):
    local_python(fake, "")
    result = launch("local.sh", "--port=1234", "3", "--", *FLAGS)
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [
        f"{i} of 3 at localhost:1234: -m speech_jax.main {' '.join(FLAGS)}" for i in range(3)
    ]


def test_local_ends_all_when_one_fails(fake):
    local_python(fake, "[ $SPEECH_JAX_PROCESS_ID != 1 ] || exit 7; trap '' TERM; exec sleep 50")
    start = time.monotonic()
    result = launch("local.sh", "3", "--", *FLAGS)
    assert result.returncode == 7
    assert "process 1 failed with status 7" in result.stderr
    assert time.monotonic() - start < 40  # not the 50 seconds that the others would sleep


def test_local_passes_sigterm_on_and_waits_for_the_checkpoint(fake):
    local_python(fake, "trap 'sleep 0.5; echo saved; kill $!; exit 0' TERM; sleep 50 & wait")
    command = ["bash", str(LAUNCH / "local.sh"), "2", "--", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert all(" of 2 " in line for line in lines)
        time.sleep(0.5)  # for the traps to be set
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\nsaved\n"
    assert process.returncode == 0


def test_local_dry_run(fake):
    local_python(fake, "")
    result = launch("local.sh", "--dry-run", "--port=1", "2", "--", "--config=c")
    assert result.stdout.splitlines() == [
        f"env SPEECH_JAX_COORDINATOR=localhost:1 SPEECH_JAX_NUM_PROCESSES=2 "
        f"SPEECH_JAX_PROCESS_ID={i} python -m speech_jax.main --config=c "
        for i in range(2)
    ]


# ---- run.sh --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outcome", "status"), [("finish", 0), ("leave", 75), ("3", 3)])
def test_run_tells_a_finished_run_from_one_that_was_told_to_leave(fake, tmp_path, outcome, status):
    outcomes(fake, outcome)
    result = launch("run.sh", "--config=c", f"--workdir={tmp_path}/the run")
    assert result.returncode == status
    assert (
        fake / "trained"
    ).read_text() == f"-m speech_jax.main --config=c --workdir={tmp_path}/the run\n"


def test_run_does_not_take_old_results_for_its_own(fake, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    outcomes(fake, "leave")
    time.sleep(0.02)
    assert launch("run.sh", f"--workdir={tmp_path}").returncode == 75


def test_run_passes_sigterm_on(fake, tmp_path):
    outcomes(fake, "wait")
    with subprocess.Popen(["bash", str(LAUNCH / "run.sh"), f"--workdir={tmp_path}"]) as process:
        while not (fake / "waiting").exists():
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=20) == 75


# ---- slurm.sbatch --------------------------------------------------------------------------------


def test_slurm_runs_srun_and_nothing_else(fake, tmp_path):
    outcomes(fake, "finish")
    result = launch("slurm.sbatch", f"--workdir={tmp_path}/it's")
    assert result.returncode == 0, result.stderr
    assert (fake / "calls").read_text() == (
        f"srun --kill-on-bad-exit=1 python -m speech_jax.main --workdir={tmp_path}/it's\n"
    )


def test_slurm_queues_a_failed_run_again_a_few_times(fake, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    outcomes(fake, "1")
    assert launch("slurm.sbatch", *FLAGS).returncode == 1
    assert calls(fake)[1:] == ["scontrol requeue 42"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    outcomes(fake, "1")
    assert launch("slurm.sbatch", *FLAGS).returncode == 1
    assert calls(fake)[2:] == ["srun"]


def test_slurm_saves_and_queues_again_before_the_time_limit(fake, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    outcomes(fake, "wait")
    with subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *FLAGS]) as process:
        while not (fake / "waiting").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=20) == 0
    assert calls(fake) == ["srun", "scontrol requeue 42"]


def test_slurm_dry_run(fake):
    result = launch("slurm.sbatch", "--dry-run", "--config=c")
    assert "srun --kill-on-bad-exit=1 python -m speech_jax.main --config=c" in result.stdout
    assert not calls(fake)


# ---- tpu_vm.sh -----------------------------------------------------------------------------------

SLICE = ["--name=asr", "--zone=us-east5-b", "--project=p", "--type=v6e-16"]


def tpu_flags(fake):
    return [FLAGS[0], f"--workdir={fake}/it's the run"]


def test_tpu_vm_creates_installs_runs_and_shows_the_log(fake):
    outcomes(fake, "finish")
    setup = "touch mounted"
    result = launch("tpu_vm.sh", *SLICE, "--spot", f"--setup={setup}", "--", *tpu_flags(fake))
    assert result.returncode == 0, result.stderr
    assert "log: finish" in result.stdout
    assert (fake / "home" / "mounted").exists()
    assert (fake / "home" / "speech_jax" / "speech_jax" / "train.py").exists()
    assert not (fake / "home" / "speech_jax" / ".git").exists()
    assert (fake / "trained").read_text() == f"-m speech_jax.main {' '.join(tpu_flags(fake))}\n"
    recorded = (fake / "calls").read_text()
    assert (
        "compute tpus tpu-vm create asr --zone=us-east5-b --project=p --accelerator-type=v6e-16 "
        "--spot --version=v2-alpha-tpuv6e\n"
    ) in recorded
    assert "--worker=all --command=touch mounted\n" in recorded


def test_tpu_vm_restarts_after_preemption_leaving_and_failure(fake):
    outcomes(fake, "preempt", "leave", "1", "finish")
    result = launch("tpu_vm.sh", *SLICE, "--queued", "--", *tpu_flags(fake))
    assert result.returncode == 0, result.stderr
    made = [call.split()[2:4] for call in calls(fake) if "describe" not in call]
    made = [name for kind, name in made if kind == "queued-resources"]
    assert made == ["create", "delete", "create"]
    assert len((fake / "trained").read_text().splitlines()) == 4
    for message in ("was preempted", "told to leave", "failed with status 1"):
        assert message in result.stderr


def test_tpu_vm_keeps_its_place_in_the_queue(fake):
    (fake / "queue").write_text("PROVISIONING\n")
    outcomes(fake, "finish")
    result = launch("tpu_vm.sh", *SLICE, "--queued", "--", *tpu_flags(fake))
    assert result.returncode == 0, result.stderr
    assert not [call for call in calls(fake) if "create" in call or "delete" in call]


def test_tpu_vm_gives_up_with_the_status_of_the_run(fake):
    (fake / "state").write_text("READY\n")
    outcomes(fake, "3", "4")
    result = launch("tpu_vm.sh", *SLICE, "--restarts=1", "--", *tpu_flags(fake))
    assert result.returncode == 4
    assert not [call for call in calls(fake) if "create" in call or "delete" in call]


def test_tpu_vm_follows_a_run_that_goes_on(fake):
    (fake / "state").write_text("READY\n")
    run = fake / "home" / "run"
    run.mkdir()
    (run / "log").write_text("log: from before\n")
    with subprocess.Popen(["sleep", "30"]) as training:
        (run / "pid").write_text(str(training.pid))
        command = ["bash", str(LAUNCH / "tpu_vm.sh"), *SLICE, "--", *tpu_flags(fake)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "log: from before\n"
            assert training.poll() is None
            (run / "status").write_text("0\n")
            training.kill()
            training.wait()
            assert process.wait(timeout=20) == 0
    assert not (fake / "trained").exists()


def test_tpu_vm_deletes(fake):
    for options, command in (([], "tpu-vm"), (["--queued"], "queued-resources")):
        (fake / "state").write_text("READY\n")
        assert launch("tpu_vm.sh", *SLICE, *options, "--delete").returncode == 0
        assert calls(fake)[-1] == f"compute tpus {command} delete asr"


def test_tpu_vm_dry_run_prints_what_a_shell_would_run(fake):
    result = launch("tpu_vm.sh", *SLICE, "--queued", "--dry-run", "--", *tpu_flags(fake))
    assert result.returncode == 0
    assert not calls(fake)
    outcomes(fake, "finish")
    script = "\n".join(line for line in result.stdout.splitlines() if not line.startswith("tar"))
    shutil.make_archive(str(fake / "tree"), "gztar", LAUNCH.parent, "launch")
    archive = next(line for line in result.stdout.splitlines() if line.startswith("tar")).split()[2]
    pathlib.Path(archive).parent.mkdir()
    shutil.copy(fake / "tree.tar.gz", archive)
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    shutil.rmtree(pathlib.Path(archive).parent)
    assert ran.returncode == 0, ran.stderr
    assert (fake / "trained").read_text() == f"-m speech_jax.main {' '.join(tpu_flags(fake))}\n"


# ---- k8s -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_jobsets_agree_with_themselves_and_with_main(name):
    jobset = yaml.safe_load((LAUNCH / "k8s" / f"{name}.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert all(isinstance(value, str | None) for value in environment.values())
    if name == "gpu":
        assert environment["SPEECH_JAX_NUM_PROCESSES"] == str(spec["completions"])
        host = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
        assert environment["SPEECH_JAX_COORDINATOR"].split(":")[0] == host
    else:
        assert environment == {"SPEECH_JAX_DISTRIBUTED": "1"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert any(argument.startswith("--workdir=/share/") for argument in container["args"])


def test_the_image_holds_the_project_and_nothing_else():
    lines = (LAUNCH.parent / ".dockerignore").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert lines[0] == "*", "what is not named must stay outside"
    taken = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((LAUNCH.parent / name).exists() for name in taken)
    # What is installed, and what the image starts.
    assert {"speech_jax", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= taken
    assert {"launch", "configs"} <= taken
    assert not {".git", "runs", "tests"} & taken
