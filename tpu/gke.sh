#!/usr/bin/env bash
# Runs tpu/finetune_lora.py on Google Kubernetes Engine through XPK (https://github.com/AI-Hypercomputer/xpk), which makes the cluster if
# there is none with this name. The flags after `--` are those of tpu/finetune_lora.py.
#
#   tpu/gke.sh --name tuner --type v5litepod-16 --zone us-west4-a --project my-project --bucket my-runs -- --model Qwen/Qwen3-8B ...
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
require_bucket
[[ -n $PROJECT ]] || fail "--project is required: XPK does not read gcloud's configuration"

place=("--zone=$ZONE" "--project=$PROJECT")
capacity=--on-demand
[[ -z $SPOT ]] || capacity=--spot

# Each step checks what exists already: after a failure, the same command continues with the step that failed.
clusters=
[[ -n $DRY_RUN ]] || clusters=$(gcloud container clusters list "--project=$PROJECT" --format='value(name)')
if ! grep -qx "$NAME-cluster" <<<"$clusters"; then
  run xpk cluster create "--cluster=$NAME-cluster" "--tpu-type=$TYPE" --num-slices=1 "$capacity" --enable-gcsfuse-csi-driver "${place[@]}"
fi
storages=
[[ -n $DRY_RUN ]] || storages=$(xpk storage list "--cluster=$NAME-cluster" "${place[@]}")
if ! grep -qE "(^|[^a-z0-9-])$NAME-runs([^a-z0-9-]|\$)" <<<"$storages"; then
  run xpk storage attach "$NAME-runs" --type=gcsfuse "--cluster=$NAME-cluster" "${place[@]}" \
    "--bucket=$BUCKET" --mount-point=/runs --readonly=false --size=1000 --auto-mount=true
fi

printf -v arguments '%q ' --output "/runs/$NAME" --resume "${REST[@]}"
printf -v source '%q' "jpeft[hf,hub,tpu] @ git+$REPOSITORY@$REVISION"
printf -v repository '%q' "$REPOSITORY"
printf -v revision '%q' "$REVISION"
# XPK starts this on every host and restarts it after a preemption; --resume then continues from the last checkpoint.
run xpk workload create "--workload=$NAME" "--cluster=$NAME-cluster" "--tpu-type=$TYPE" --num-slices=1 --max-restarts=100 "${place[@]}" \
  --docker-image=python:3.12 \
  --command="pip install -q $source && git clone -q $repository jpeft && git -C jpeft checkout -q $revision && python jpeft/tpu/finetune_lora.py $arguments"
