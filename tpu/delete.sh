#!/usr/bin/env bash
# Deletes the slice, and with --queued also the queued resource that holds it. The disks of the slice are deleted; runs are in the bucket.
#
#   tpu/delete.sh --name tuner --zone us-west4-a
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAME= # no default here: a forgotten --name must not delete the slice with the default name
parse_flags "$@"
[[ -n $NAME ]] || fail "--name is required"

mapfile -t place < <(where)
if [[ -n $QUEUED ]]; then
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" --quiet
fi
