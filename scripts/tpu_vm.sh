#!/usr/bin/env bash
# A TPU pod slice on Google Cloud, from nothing to a run on all of its workers, with gcloud.
#
#   scripts/tpu_vm.sh create  --name=NAME --zone=ZONE --type=v5litepod-16 --version=VERSION [--spot]
#   scripts/tpu_vm.sh install --name=NAME --zone=ZONE [--nfs=HOST:/SHARE]
#   scripts/tpu_vm.sh run     --name=NAME --zone=ZONE -- --config=FILE --workdir=shared/runs/first
#   scripts/tpu_vm.sh tail    --name=NAME --zone=ZONE [--worker=N]
#   scripts/tpu_vm.sh stop    --name=NAME --zone=ZONE
#   scripts/tpu_vm.sh delete  --name=NAME --zone=ZONE
#
# create   asks for the slice (a queued resource) and waits until it is there
# install  copies the files of this checkout's HEAD to ~/lmjax on all workers and installs them there;
#          --nfs mounts a share that all workers see (Filestore) at ~/lmjax/shared
# run      starts `python -m lmjax.train --distributed` on all workers, which goes on when you log off;
#          --workdir must lie on the share. Paths are relative to ~/lmjax. The same again continues.
# tail     follows what a worker (0 by default) has printed
# stop     has the run save and end (SIGTERM)
# delete   gives the slice back; what it holds is lost
#
# --dry-run prints the commands instead of running them, and needs no gcloud. --project is gcloud's own
# by default. Flags can be set as TPU_NAME, TPU_ZONE, TPU_TYPE, TPU_VERSION, TPU_PROJECT.
set -euo pipefail
cd "$(dirname "$0")/.."

die() {
  echo "error: $*" >&2
  exit 2
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' scripts/tpu_vm.sh; }

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-} project=${TPU_PROJECT:-}
nfs='' worker=0 spot='' dry_run=''
command=${1:-help}
shift || true
while [ "$#" -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --) shift; break ;;
    *) die "unknown flag '$1'; scripts/tpu_vm.sh help lists them. The run's own flags follow a --." ;;
  esac
  shift
done
training=("$@")

needs() {
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || die "--$flag is not given (or TPU_${flag^^})."
  done
}

# Runs a command, or prints it so that it can be pasted.
act() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

where=()
tpu_vm() { act gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
on_workers() { tpu_vm ssh "$name" --worker="$1" --command="$2"; }

create() {
  needs type version
  act gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot} "${where[@]}"
  local state=''
  until [ -n "$dry_run" ] || [ "$state" = ACTIVE ]; do
    state=$(gcloud compute tpus queued-resources describe "$name" --format='value(state.state)' "${where[@]}")
    echo "$name: $state" >&2
    case "$state" in
      FAILED | SUSPENDED) die "the request ended as $state: 'delete' it, and try another zone or type." ;;
      ACTIVE) ;;
      *) sleep 30 ;;
    esac
  done
}

install() {
  local archive=lmjax.tar.gz folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$folder'" EXIT
  act git archive --format=tar.gz --output="$folder/$archive" HEAD
  tpu_vm scp "$folder/$archive" "$name:$archive" --worker=all
  on_workers all "mkdir -p lmjax && tar -xzf $archive -C lmjax && lmjax/scripts/setup tpu"
  if [ -n "$nfs" ]; then
    local mount
    mount="sudo mount -t nfs -o nolock $(printf %q "$nfs") lmjax/shared"
    on_workers all "sudo apt-get install -qq nfs-common && mkdir -p lmjax/shared && { mountpoint -q lmjax/shared || $mount; }"
  fi
}

run() {
  [ "${#training[@]}" -gt 0 ] || die "give the run's flags after a --, as: run ... -- --config=FILE --workdir=DIR"
  local flags
  flags=$(printf '%q ' "${training[@]}")
  on_workers all "cd lmjax && nohup .venv/bin/python -m lmjax.train --distributed $flags> ../lmjax.log 2>&1 < /dev/null &"
}

case "$command" in
  create | install | run | tail | stop | delete) needs name zone ;;
  help | --help | -h) usage; exit 0 ;;
  *) die "unknown command '$command': create, install, run, tail, stop, delete or help." ;;
esac
where=(--zone="$zone" ${project:+--project="$project"})
[ -n "$dry_run" ] || command -v gcloud > /dev/null || die "gcloud is not installed: see https://cloud.google.com/sdk/docs/install; --dry-run does without."
case "$command" in
  tail) on_workers "$worker" 'tail -n 100 -F lmjax.log' ;;
  stop) on_workers all "pkill -TERM -f '[l]mjax.train'" ;;
  delete) act gcloud compute tpus queued-resources delete "$name" --force --quiet "${where[@]}" ;;
  *) "$command" ;;
esac
