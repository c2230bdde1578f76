"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes beside `path`, syncs, and renames: a reader, or a kill at any moment, sees the old file or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON atomically, indented, with a final newline."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def size_on_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
