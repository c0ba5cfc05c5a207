#!/usr/bin/env bash
# What runs on each host of a pod that may be preempted: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/run.sh [--dry-run] FLAGS...

Runs `python -m speech_jax.main FLAGS...` on a host of tpu_vm.sh, or in a container of k8s/. SIGTERM
(a preempted host, a deleted pod) is passed on: the run saves a checkpoint and leaves. The status is
then 75, not 0, so that the run is started again: 0 is for one that has written its results.json.

  --dry-run  print the command and do not run it
  --help     this text

Environment: PYTHON (default: python).
TEXT
}

dry_run=false
case ${1:-} in
  --help) usage && exit 0 ;;
  --dry-run) dry_run=true && shift ;;
esac
workdir=''
for flag in "$@"; do
  if [[ $flag == --workdir=* ]]; then workdir=${flag#*=}; fi
done
[[ -n $workdir ]] || { echo "run.sh: --workdir=... is missing (see --help)" >&2; exit 2; }

train=("${PYTHON:-python}" -m speech_jax.main "$@")
if $dry_run; then
  printf '%q ' "${train[@]}" && echo
  exit 0
fi
started=$(mktemp)
told=false
# Before there is a child to pass it on to: a signal may come at any time.
trap 'told=true; [[ -n ${!:-} ]] || exit 75; kill -TERM $! 2>/dev/null || true' TERM
"${train[@]}" &
child=$!
code=0
wait $child || code=$?
if $told; then # the trap ended that wait, not the run, which may have ended since
  code=0
  wait $child || code=$?
fi
if ((code == 0)) && [[ ! $workdir/results.json -nt $started ]]; then
  code=75
fi
rm -f "$started"
exit $code
