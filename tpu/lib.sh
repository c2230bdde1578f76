# shellcheck shell=bash disable=SC2034  # the variables are read by the scripts that source this file
# Shared by the scripts of this folder: flags, and the function `run`, which prints a command and, without --dry-run, runs it.

NAME=jpeft
ZONE=us-west4-a
TYPE=v5litepod-16
PROJECT=
VERSION=
SPOT=
QUEUED=
DRY_RUN=
REPOSITORY=https://github.com/jpeft/jpeft
REVISION=main
BUCKET=
REST=()

usage() {
  cat <<TEXT
usage: $0 [flags] [-- arguments of the program]

  --name NAME        of the TPU VM, queued resource or workload   [${NAME:-required}]
  --zone ZONE        where it runs                                [$ZONE]
  --type TYPE        accelerator type, such as v5litepod-16, v6e-8, v5p-64, v4-32   [$TYPE]
  --project PROJECT  Google Cloud project                         [that of gcloud config]
  --version VERSION  runtime version of the TPU VM                [the one that fits the type]
  --spot             a spot (preemptible) slice
  --queued           ask for a queued resource and wait for it, instead of creating the VM at once
  --repository URL   where the workers get jpeft from             [$REPOSITORY]
  --revision REV     branch, tag or commit                        [$REVISION]
  --bucket BUCKET    Cloud Storage bucket that holds the runs, mounted on every worker; required by setup.sh and gke.sh
  --dry-run          print every command, run none
TEXT
}

fail() {
  echo "$0: $*" >&2
  exit 2
}

# Reads the flags into the variables above; the flags after `--` go to REST.
parse_flags() {
  while (($#)); do
    case $1 in
      --name | --zone | --type | --project | --version | --repository | --revision | --bucket)
        (($# > 1)) || fail "$1 needs a value"
        local variable=${1#--}
        printf -v "${variable^^}" '%s' "$2"
        shift 2
        ;;
      --spot | --queued)
        local variable=${1#--}
        printf -v "${variable^^}" '%s' yes
        shift
        ;;
      --dry-run)
        DRY_RUN=yes
        shift
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        REST=("$@")
        break
        ;;
      *)
        usage >&2
        fail "unknown flag $1"
        ;;
    esac
  done
}

# Prints a command so that it can be pasted into a shell, and runs it.
run() {
  local quoted
  printf -v quoted '%q ' "$@"
  echo "+ ${quoted% }" >&2
  [[ -n $DRY_RUN ]] || "$@"
}

# Checkpoints must survive the slice, and every worker must see them.
require_bucket() {
  BUCKET=${BUCKET#gs://}
  [[ -n $BUCKET ]] || fail "--bucket is required: checkpoints must outlive the slice, and every worker must see them"
}

# The flags of every gcloud command on the slice.
where() {
  local flags=("--zone=$ZONE")
  [[ -z $PROJECT ]] || flags+=("--project=$PROJECT")
  printf '%s\n' "${flags[@]}"
}

# The runtime version that Google documents for a type.
runtime_version() {
  if [[ -n $VERSION ]]; then
    echo "$VERSION"
    return
  fi
  case $TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) fail "no runtime version is known for --type $TYPE; name one with --version" ;;
  esac
}

# Runs one command on all workers of the slice at once; fails if the command fails on a worker.
on_all_workers() {
  mapfile -t place < <(where)
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}
