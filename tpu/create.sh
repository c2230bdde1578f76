#!/usr/bin/env bash
# Creates a TPU VM slice, at once or through a queued resource.
#
#   tpu/create.sh --name tuner --type v5litepod-16 --zone us-west4-a
#   tpu/create.sh --name tuner --type v6e-64 --zone us-east5-b --queued --spot      # waits until a slice is free
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"

mapfile -t place < <(where)
version=$(runtime_version)
slice=("--accelerator-type=$TYPE")
[[ -z $SPOT ]] || slice+=(--spot)

if [[ -z $QUEUED ]]; then
  run gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" "${slice[@]}" "--version=$version"
  exit
fi

run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${place[@]}" "${slice[@]}" "--runtime-version=$version"
while true; do
  state=$(run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)')
  [[ -z $DRY_RUN ]] || exit 0
  echo "$(date '+%H:%M:%S') $NAME is $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | SUSPENDING) fail "the queued resource is $state; delete it with tpu/delete.sh --queued and ask again" ;;
  esac
  sleep 30
done
