"""What training needs besides, in a file that HF PEFT does not read: the network that makes a prompt or a prefix.

HF PEFT's own file holds what the network makes. The file here holds the network, the method, and a checksum of that file, so that a
network is never taken for that of another prompt.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft import registry
from jpeft.core.method import Method
from jpeft.extras import explained
from jpeft.hf_peft.config import WEIGHTS

FILE = "jpeft_training.safetensors"


def write(folder: Path, method: Method, leaves: Mapping[str, Any]) -> None:
    """Write the leaves that only training needs beside the folder's adapter, which is there already."""
    with explained():
        from safetensors.numpy import save_file
    metadata = {"method": json.dumps(method.config()), "adapter": _checksum(folder / WEIGHTS)}
    save_file({path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}, folder / FILE, metadata=metadata)


def read(folder: Path) -> tuple[Method, dict[str, np.ndarray]] | None:
    """The method and the leaves; None if there are none, or they belong to another adapter, which is said.

    Raises:
      ValueError: if the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    with explained():
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            leaves = {path: opened.get_tensor(path) for path in opened.keys()}  # noqa: SIM118
        method = registry.make(json.loads(metadata["method"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it to load the adapter without what training needs.") from error
    if metadata.get("adapter") != _checksum(folder / WEIGHTS):
        warnings.warn(
            f"{file} belongs to another {WEIGHTS} and is left out: training goes on from what is in {WEIGHTS} alone.", stacklevel=3
        )
        return None
    if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
        raise ValueError(f"{file} holds numbers that are not finite. Delete it to load the adapter without what training needs.")
    return method, leaves


def _checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
