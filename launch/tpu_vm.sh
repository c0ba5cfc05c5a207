#!/usr/bin/env bash
# Trains on a Cloud TPU slice: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE [OPTIONS] -- FLAGS...
       launch/tpu_vm.sh --name=NAME --zone=ZONE [OPTIONS] --delete

Trains with `python -m speech_jax.main FLAGS...` on all workers of a TPU slice: creates the slice or
uses the one of that name, copies this tree to every worker, installs it there, starts the run and
shows the log of worker 0. If the slice is preempted it is created again and the same command goes on
from the last checkpoint. Ctrl-C stops the showing, not the run: the same command shows it again.

  launch/tpu_vm.sh --name=asr --zone=us-east5-b --type=v6e-16 --spot --queued \
    --setup='sudo mkdir -p /share; mountpoint -q /share || sudo mount 10.0.0.2:/share /share' \
    -- --config=configs/librispeech.py:conformer_s --workdir=/share/runs/a \
    --config.data.root=/share/LibriSpeech
  launch/tpu_vm.sh --name=asr --zone=us-east5-b --queued --delete

The workdir must be on a file system that all workers see: mount one with --setup.

  --name=NAME        of the TPU VM (and of its queued resource)
  --zone=ZONE        such as us-east5-b
  --type=TYPE        of the slice: v4-32, v5litepod-16, v5p-64, v6e-16
  --version=VERSION  of the image (default: that of the type)
  --project=PROJECT  (default: gcloud's own)
  --spot             cheaper, may be preempted
  --queued           wait in the queue for the slice (a queued resource) instead of failing
  --setup=COMMAND    run on every worker before each start
  --restarts=N       start a run that failed again N times (default: 3); preemptions do not count
  --delete           delete the slice, and do nothing else
  --dry-run          print each command and run none
  --help             this text
TEXT
}

fail() {
  echo "tpu_vm.sh: $1 (see launch/tpu_vm.sh --help)" >&2
  exit 2
}

name='' zone='' type='' version='' project='' setup=true restarts=3
spot=false queued=false delete=false dry_run=false
while (($#)); do
  case $1 in
    --help) usage && exit 0 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=true ;;
    --queued) queued=true ;;
    --delete) delete=true ;;
    --dry-run) dry_run=true ;;
    --) shift && break ;;
    *) fail "unknown option $1: the program's own flags come after --" ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
if ! $delete; then
  [[ -n $type ]] || fail "--type is needed"
  (($#)) || fail "the program's flags are missing: give them after --"
fi
if [[ -z $version ]]; then
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5lite*) version=v2-alpha-tpuv5-lite ;;
    *) version='tpu-ubuntu2204-base' ;;
  esac
fi

tpu=(gcloud compute tpus)
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

# Prints the arguments as a shell would read them.
words() {
  local word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    line+=" $word"
  done
  echo "${line:1}"
}

# Runs a command, or prints it.
run() {
  if $dry_run; then
    words "$@"
  else
    "$@"
  fi
}

on_workers() { # WORKERS COMMAND
  run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

# The state of the tpu-vm (READY, PREEMPTED, ...) or queued-resources (ACTIVE, ...); empty if none is.
state() {
  local field=state
  if [[ $1 == queued-resources ]]; then field=state.state; fi
  $dry_run || "${tpu[@]}" "$1" describe "$name" "${where[@]}" "--format=value($field)" 2>/dev/null || true
}

delete_slice() {
  if $queued; then
    run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run "${tpu[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

create_slice() {
  local options=("${where[@]}" "--accelerator-type=$type")
  if $spot; then options+=(--spot); fi
  if $queued; then
    run "${tpu[@]}" queued-resources create "$name" "--node-id=$name" "${options[@]}" \
      "--runtime-version=$version"
  else
    run "${tpu[@]}" tpu-vm create "$name" "${options[@]}" "--version=$version"
  fi
}

# Waits in the queue, as long as there is hope.
wait_in_queue() {
  local place=''
  if $dry_run; then return; fi
  while true; do
    place=$(state queued-resources)
    echo "tpu_vm.sh: the queued resource $name is ${place:-gone}" >&2
    case $place in
      ACTIVE) return ;;
      ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) sleep "${POLL_SECONDS:-30}" ;;
      *) return 1 ;;
    esac
  done
}

# Makes the slice ready; one that was preempted is created again.
prepare_slice() {
  local now='' place=''
  now=$(state tpu-vm)
  if [[ $now == READY ]]; then return; fi
  if $queued; then place=$(state queued-resources); fi
  case $place in
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) ;;
    *)
      if [[ -n $now$place ]]; then delete_slice || return; fi
      create_slice || return
      ;;
  esac
  if $queued; then wait_in_queue; fi
}

install() {
  local folder
  folder=$(mktemp -d)
  run tar -czf "$folder/speech_jax.tar.gz" -C "$(dirname "$0")/.." \
    --exclude=.git --exclude='.venv*' --exclude=./runs . &&
    run "${tpu[@]}" tpu-vm scp "$folder/speech_jax.tar.gz" "$name:" "${where[@]}" --worker=all &&
    # The images' own Python may be too old for us; uv brings one.
    on_workers all "set -e; mkdir -p speech_jax; tar -xzf speech_jax.tar.gz -C speech_jax; \
python3 -m pip install --quiet --user uv; export PATH=\$HOME/.local/bin:\$PATH; \
[ -d env ] || uv venv --quiet --python 3.12 env; \
uv pip install --quiet --python env/bin/python --editable 'speech_jax[tpu]'" &&
    rm -r "$folder"
}

# The run goes on when the connection ends: its pid, log and status are in ~/run.
start() {
  on_workers all "$setup" && on_workers all "mkdir -p run; if [ -f run/pid ]; then kill -9 -- -\$(cat run/pid) 2> /dev/null; fi; \
rm -f run/status; : > run/log; cd speech_jax; \
SPEECH_JAX_DISTRIBUTED=1 PYTHON=../env/bin/python setsid nohup \
bash -c 'bash launch/run.sh \"\$@\" > ../run/log 2>&1; echo \$? > ../run/status' run $(words "$@") \
< /dev/null > /dev/null 2>&1 & echo \$! > ../run/pid"
}

# Shows the log until the run ends; its status is that of the run.
follow() {
  # shellcheck disable=SC2016 # expanded by the worker
  on_workers 0 'tail -n +1 -f --pid=$(cat run/pid) run/log; exit $(cat run/status || echo 1)'
}

is_running() {
  # shellcheck disable=SC2016 # expanded by the worker
  on_workers 0 'test -f run/pid -a ! -f run/status && kill -0 $(cat run/pid)'
}

if $delete; then
  delete_slice
  exit
fi
prepare_slice
if $dry_run || ! is_running; then
  install
  start "$@"
fi
while true; do
  code=0
  follow || code=$?
  if ((code == 0)); then exit 0; fi
  if [[ $(state tpu-vm) != READY ]]; then
    echo "tpu_vm.sh: $name was preempted; creating it again" >&2
    until prepare_slice; do sleep "${POLL_SECONDS:-30}"; done
    # Preempted again by now? Then following it says so.
    install && start "$@" || true
  elif ((code == 255)); then # ssh's own status: the connection ended, not the run
    sleep "${POLL_SECONDS:-30}"
  elif ((code == 75)); then
    echo "tpu_vm.sh: the run was told to leave, and saved; starting it again" >&2
    start "$@"
  elif ((restarts-- > 0)); then
    echo "tpu_vm.sh: the run failed with status $code; starting it again" >&2
    start "$@"
  else
    exit "$code"
  fi
done
