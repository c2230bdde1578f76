"""Input of a command: texts from its flags, or rows of a file or of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft import data


def check_one_source(text: Sequence[str], source: str | None, name: str) -> None:
    """Check that there are either texts or a source of texts.

    Args:
      text: The values of --text.
      source: The value of the other flag.
      name: The other flag and what it holds, such as "a file with --input".

    Raises:
      ValueError: if both are given, or none.
    """
    if bool(text) == (source is not None):
        raise ValueError(f"Give either texts with --text or {name}.")


def read_file_or_split(spec: str, split: str | None, **columns: Any) -> data.Table:
    """Return all rows of a file if no split is named, else the rows of one split; of other data than a file, the test split by default.

    Args:
      spec: The value of --data.
      split: Name of the split, or None.
      **columns: Names of the columns, as in `jpeft.data.read`.

    Raises:
      ValueError: if the data has no such split.
    """
    if split is None and Path(spec).is_file():
        return data.read(spec, **columns)
    return read_split(spec, split or "test", **columns)


def read_split(spec: str, split: str, **columns: Any) -> data.Table:
    """Return the rows of one split; a file is split as for training.

    Raises:
      ValueError: if the data has no such split.
    """
    return choose_split(data.splits(spec, **columns), split)


def choose_split(tables: Mapping[str, data.Table], split: str) -> data.Table:
    """Return the rows of one split.

    Raises:
      ValueError: if there is no such split with rows.
    """
    if not len(tables.get(split, ())):
        existing = ", ".join(name for name, table in tables.items() if len(table))
        raise ValueError(f"The data has no split {split!r} with rows in it; it has {existing}.")
    return tables[split]
