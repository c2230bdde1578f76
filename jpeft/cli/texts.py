"""Input of a command: texts from its flags, or rows of a file or of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft import data
from jpeft.data.origin import Origin


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


def texts_table(text: Sequence[str], pair: Sequence[str], *, pairs: bool, reader: str) -> data.Table:
    """Return the values of --text and --pair as a table without labels.

    Args:
      text: The values of --text.
      pair: The values of --pair.
      pairs: Whether each text needs a second text.
      reader: What reads the texts, for the error message: "model" or "template".

    Raises:
      ValueError: if there is not one second text for each text, if there are second texts where none are read, or for an empty text.
    """
    if len(pair) != (len(text) if pairs else 0):
        expected = "one --pair for each --text" if pairs else "single texts, without --pair"
        raise ValueError(f"This {reader} takes {expected}: got {len(text)} texts and {len(pair)} pairs.")
    if empty := [number for number, each in enumerate(text, start=1) if not each.strip()]:
        raise ValueError(f"No text in --text number {empty[0]} of {len(text)}: remove it or fill it in.")
    return data.Table(list(text), list(pair) or None, origin=Origin("--text", range(1, len(text) + 1)))


def read_file_or_split(spec: str, split: str, **columns: Any) -> data.Table:
    """Return all rows of a file, or the rows of one split of other data (a folder, built-in or hub data).

    Args:
      spec: The value of --data.
      split: Name of the split.
      **columns: Names of the columns, as in `jpeft.data.read`.

    Raises:
      ValueError: if the data has no such split.
    """
    return data.read(spec, **columns) if Path(spec).is_file() else read_split(spec, split, **columns)


def read_split(spec: str, split: str, **columns: Any) -> data.Table:
    """Return the rows of one split; a file is split as for training.

    Raises:
      ValueError: if the data has no such split.
    """
    tables = data.splits(spec, **columns)
    if not len(tables.get(split, ())):
        existing = ", ".join(name for name, table in tables.items() if len(table))
        raise ValueError(f"The data has no split {split!r} with rows in it; it has {existing}.")
    return tables[split]
