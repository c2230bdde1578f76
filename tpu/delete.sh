#!/usr/bin/env bash
# Deletes the slice, and with --queued the queued resource that holds it. What is on its disks is lost; runs lie in the bucket.
#
#   tpu/delete.sh --name tuner --zone us-west4-a
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAME= # without a default here: a name left out must not delete what bears it
parse_flags "$@"
[[ -n $NAME ]] || fail "--name is required"

mapfile -t place < <(where)
if [[ -n $QUEUED ]]; then
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" --quiet
fi
