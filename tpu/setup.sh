#!/usr/bin/env bash
# Installs jpeft on every worker of the slice and mounts a bucket at ~/runs. TPU VM images have Python 3.10; uv installs a newer Python.
#
#   tpu/setup.sh --name tuner --zone us-west4-a --bucket my-runs
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
require_bucket

# The repository and the revision are expanded here, $HOME on the worker.
printf -v source '%q' "jpeft[hf,hub,tpu] @ git+$REPOSITORY@$REVISION"
printf -v repository '%q' "$REPOSITORY"
printf -v revision '%q' "$REVISION"
printf -v bucket '%q' "$BUCKET"
# shellcheck disable=SC2016
on_all_workers 'set -e
command -v "$HOME/.local/bin/uv" >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d "$HOME/jpeft-env" ] || "$HOME/.local/bin/uv" venv --python 3.12 "$HOME/jpeft-env"
VIRTUAL_ENV="$HOME/jpeft-env" "$HOME/.local/bin/uv" pip install --upgrade '"$source"'
rm -rf "$HOME/jpeft"
git clone --quiet '"$repository"' "$HOME/jpeft"
git -C "$HOME/jpeft" checkout --quiet '"$revision"'
"$HOME/jpeft-env/bin/python" -c "import jax, jpeft; print(jpeft.__version__, jax.__version__)"'

# shellcheck disable=SC2016
on_all_workers 'set -e
if ! command -v gcsfuse >/dev/null; then
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  sudo apt-get -qq update
  sudo apt-get -qq install -y gcsfuse
fi
mkdir -p "$HOME/runs"
mountpoint -q "$HOME/runs" || gcsfuse --implicit-dirs '"$bucket"' "$HOME/runs"'

# Checks that one program sees all chips: on every worker, the count must be that of the whole slice.
# shellcheck disable=SC2016
on_all_workers '"$HOME/jpeft-env/bin/python" -c "import jax; jax.distributed.initialize(); print(jax.process_index(), jax.device_count())"'
