"""What `--overwrite` may delete: a run, and nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jpeft.checkpoint.files import read_file
from jpeft.checkpoint.temporary import LEFTOVER
from jpeft.training.run_lock import LOCK

# What may be in the folder of a run, and in the folders of it whose contents are always the same.
_RUN = rf"config\.json|metrics\.jsonl|curve\.png|checkpoints|adapter|merged|result\.json|{LOCK}|{LEFTOVER.pattern}"
_BELOW = {
    "checkpoints": rf"\d+|\d+\.orbax-checkpoint-tmp.*|{LEFTOVER.pattern}",
    "adapter": rf"jpeft\.json|adapter|{LEFTOVER.pattern}",
}


def check_overwrite(folder: Path, inputs: dict[str, str]) -> None:
    """Check that a folder may be deleted for a new run.

    Args:
      folder: The output folder.
      inputs: Model and data of the new run, by the name of their flag: paths, hub ids or names.

    Raises:
      ValueError: saying what would be lost.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to {os.path.realpath(folder)}, so --overwrite does not delete it: give the folder itself.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, so --overwrite does not delete it: choose another output.")
    for name, path in {**inputs, "working directory": os.getcwd()}.items():
        path = os.path.expanduser(path)
        if os.path.exists(path) and (relation := _relation(folder, path, both_ways=name in inputs)):
            raise ValueError(f"--overwrite does not delete {folder}, which {relation} the {name} {path}: choose another output.")
    model = " (was a model's folder given?)" if _is_of_model(folder) else ""
    foreign = next(_foreign(folder), None)
    if foreign or model:
        raise ValueError(
            f"--overwrite deletes only runs, and {folder} is not the folder of a training run alone: no run wrote "
            f"{foreign or folder / 'config.json'}.{model} Choose another output, or move that away."
        )


def _relation(folder: Path, path: str, *, both_ways: bool) -> str:
    """Return how a folder lies to a path, by name or in fact, if they overlap; an empty string if they do not."""
    for place in (os.path.abspath, os.path.realpath):
        one, two = Path(place(folder)), Path(place(path))
        if one == two:
            return "is"
        if one in two.parents:
            return "contains"
        if both_ways and two in one.parents:
            return "is inside of"
    return ""


def _is_of_model(folder: Path) -> bool:
    """Return whether config.json is whole and not that of a run."""
    try:
        content = json.loads(read_file(folder / "config.json").decode())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "run" not in content


def _foreign(folder: Path) -> Iterator[Path]:
    """Find what no run has written."""
    for path in sorted(folder.iterdir()):
        if not re.fullmatch(_RUN, path.name):
            yield path
        elif path.name in _BELOW and path.is_dir() and not path.is_symlink():
            yield from (below for below in sorted(path.iterdir()) if not re.fullmatch(_BELOW[path.name], below.name))
