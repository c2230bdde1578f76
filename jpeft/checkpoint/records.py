"""Records in JSON that know whether somebody has changed them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_CHECKSUM = "checksum"


def checksum(record: Mapping[str, Any]) -> str:
    """Return a digest of the values of a record, whatever their order and spacing; its own checksum does not count.

    >>> checksum({"a": 1, "b": (2.5,)}) == checksum({"b": [2.5], "a": 1, "checksum": "0"})
    True
    """
    content = {name: value for name, value in record.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any], digest: Callable[[Mapping[str, Any]], str] = checksum) -> dict[str, Any]:
    """Return the record with its checksum."""
    return {**record, _CHECKSUM: digest(record)}


def check_record(record: Mapping[str, Any], file: Path, digest: Callable[[Mapping[str, Any]], str] = checksum) -> None:
    """Check that a record is as it was written. Those of earlier versions have no checksum, and pass.

    Raises:
      ValueError: naming its file.
    """
    if _CHECKSUM in record and record[_CHECKSUM] != digest(record):
        raise ValueError(
            f"{file} was changed after jpeft wrote it: its checksum is not that of its contents. Put the original back; what a run was "
            "trained with cannot be changed afterwards."
        )
