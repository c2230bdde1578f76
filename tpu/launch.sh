#!/usr/bin/env bash
# Starts tpu/finetune_lora.py on every worker, each under tmux, so that it survives the end of the connection.
# The flags after `--` are passed to it.
#
#   tpu/launch.sh --name tuner --zone us-west4-a -- --model Qwen/Qwen3-8B --data hub:databricks/databricks-dolly-15k \
#     --text instruction --target response --mesh fsdp=-1
#
# The run is the folder NAME of the bucket that setup.sh mounted. If you launch it again, for example after a preemption, it continues
# from its last checkpoint.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"

printf -v name '%q' "$NAME"
printf -v arguments '%q ' --resume "${REST[@]}"
# shellcheck disable=SC2016
command='cd "$HOME/jpeft" && "$HOME/jpeft-env/bin/python" tpu/finetune_lora.py --output "$HOME/runs/"'"$name $arguments"'2>&1 | tee -a "$HOME/jpeft.log"'
printf -v quoted '%q' "$command"
# Without the bucket the run would be on the disks of the workers, and be deleted with them.
# shellcheck disable=SC2016
mounted='mountpoint -q "$HOME/runs" || { echo "the bucket is not mounted: tpu/setup.sh" >&2; exit 1; };'
on_all_workers "$mounted tmux kill-session -t jpeft 2>/dev/null; tmux new-session -d -s jpeft $quoted"

mapfile -t place < <(where)
echo "follow it:  gcloud compute tpus tpu-vm ssh $NAME ${place[*]} --worker=0 --command='tail -f jpeft.log'" >&2
