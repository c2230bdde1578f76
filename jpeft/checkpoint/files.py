"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
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
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace_folder(partial: Path, target: Path) -> None:
    """Puts a finished folder in the place of `target`, or where there is none: at any moment one of the two is there, whole."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    if target.exists():
        os.replace(target, old)  # a folder cannot be renamed onto one with content
    try:
        os.replace(partial, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def size_on_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
