#!/usr/bin/env bash
# Runs one training as N processes on this machine: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh [--dry-run] [--port=PORT] N -- FLAGS...

Runs `python -m speech_jax.main FLAGS...` as N processes on this machine that train together, as the
hosts of a pod do: on CPU (collectives by gloo) to try a distributed run, on GPU with one process for
each (set CUDA_VISIBLE_DEVICES_EACH=1 to give process i only GPU i).

  launch/local.sh 2 -- --config=configs/quickstart.py --workdir=runs/two

A process that fails ends the others at once, and its status is the status of this script. SIGTERM
and Ctrl-C go to all of them: they save a checkpoint and leave, and the same command goes on.

  N            how many processes
  --port=PORT  where process 0 coordinates the others (default: a free port)
  --dry-run    print each command and run none
  --help       this text

Environment: PYTHON (default: python), JAX_PLATFORMS=cpu and
XLA_FLAGS=--xla_force_host_platform_device_count=4 (for 4 CPU devices a process) pass through.
TEXT
}

fail() {
  echo "local.sh: $1 (see launch/local.sh --help)" >&2
  exit 2
}

dry_run=false port='' count=''
while (($#)); do
  case $1 in
    --help) usage && exit 0 ;;
    --dry-run) dry_run=true ;;
    --port=*) port=${1#*=} ;;
    --) shift && break ;;
    -*) fail "unknown option $1: the program's own flags come after --" ;;
    *) count=$1 ;;
  esac
  shift
done
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "say how many processes, not '$count'"
(($#)) || fail "the program's flags are missing: give them after --"

python=${PYTHON:-python}
cd "$(dirname "$0")/.."
if [[ -z $port ]]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi

pids=()
for ((i = 0; i < count; i++)); do
  command=(env "SPEECH_JAX_COORDINATOR=localhost:$port" "SPEECH_JAX_NUM_PROCESSES=$count"
    "SPEECH_JAX_PROCESS_ID=$i")
  if [[ -n ${CUDA_VISIBLE_DEVICES_EACH:-} ]]; then
    command+=("CUDA_VISIBLE_DEVICES=$i")
  fi
  command+=("$python" -m speech_jax.main "$@")
  if $dry_run; then
    printf '%q ' "${command[@]}" && echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
status=0
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if ((code != 0 && status == 0)); then
      status=$code
      echo "local.sh: process $i failed with status $code; ending the others" >&2
      # They wait for it in a collective, where they cannot save: what is saved is saved.
      ((${#pids[@]})) && kill -KILL "${pids[@]}" 2>/dev/null
    fi
  done
  ((${#pids[@]})) && sleep 0.2
done
exit "$status"
