"""Writes the tensors of a model into one safetensors file, or into several with an index, as `transformers` does."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.checkpoint.files import write_json
from jpeft.extras import explained
from jpeft.models.checkpoints.layout import Entry

INDEX = "model.safetensors.index.json"
# The largest file that `transformers` writes by itself.
LARGEST_FILE = "50GB"

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Source(NamedTuple):
    """Where a tensor of the checkpoint comes from."""

    entry: Entry
    name: str  # by which the entry knows the tensor; it may be stored under another


def check_size(max_shard_size: int | str) -> int:
    """Return a size in bytes.

    Raises:
      ValueError: for what is no size.

    >>> check_size("5GB"), check_size(4096)
    (5000000000, 4096)
    """
    size: Any = max_shard_size
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", size, re.IGNORECASE)):
        size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"max_shard_size must be a number of bytes above 0, or such as '5GB' (KB, MB, GB or TB), not {max_shard_size!r}.")
    return size


def write_tensors(
    folder: Path, layout: Sequence[Entry], leaves: Mapping[str, Any], seconds: Mapping[str, str], max_shard_size: int
) -> None:
    """Write the tensors of a model, a file at a time, so that only those of one file are copied at once.

    Args:
      folder: An existing folder.
      layout: Every parameter with the names of its tensors.
      leaves: The parameters by path.
      seconds: Names of tensors by second names under which they are stored too.
      max_shard_size: The largest file, in bytes. A tensor that is larger has a file of its own.
    """
    with explained():
        from huggingface_hub import split_state_dict_into_shards_factory
        from safetensors.numpy import save_file

    sources = {name: Source(entry, name) for entry in layout for name in entry.names}
    sources |= {second: sources[name] for second, name in seconds.items()}
    size = lambda source: math.prod(source.entry.tensor_shape) * np.dtype(leaves[source.entry.path].dtype).itemsize
    plan = split_state_dict_into_shards_factory(
        sources, get_storage_size=size, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: sources[name].entry.tensor(leaves[sources[name].entry.path], sources[name].name) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": dict(plan.metadata), "weight_map": dict(plan.tensor_to_filename)})
