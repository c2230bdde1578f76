"""Texts of a caller, without a file, as a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jpeft.data.origin import Origin
from jpeft.data.tables import Table


def texts_table(
    texts: Any,
    pairs: Any = None,
    *,
    needs_pairs: bool = False,
    takes_words: bool = False,
    reader: str = "model",
    names: tuple[str, str] = ("texts", "pairs"),
) -> Table:
    """Return texts as a table without labels.

    Args:
      texts: The texts; or, with `takes_words`, lists of words.
      pairs: The second texts.
      needs_pairs: Whether each text needs a second text.
      takes_words: Whether a text may be a list of its words.
      reader: What reads the texts, for the error message: "model" or "template".
      names: What the caller calls `texts` and `pairs`.

    Raises:
      ValueError: for what is not a text, or an empty one; if there is not one second text for each text, or if there are second texts
        where none are read.

    >>> texts_table(["Ada sings", ["Bob", "reads"]], takes_words=True).words
    [['Ada', 'sings'], ['Bob', 'reads']]
    """
    rows, seconds = _listed(texts, names[0]), _listed(pairs or (), names[1])
    if len(seconds) != (len(rows) if needs_pairs else 0):
        expected = f"one of {names[1]} for each of {names[0]}" if needs_pairs else f"single texts, without {names[1]}"
        raise ValueError(f"This {reader} takes {expected}: got {len(rows)} texts and {len(seconds)} second texts.")
    for name, column, words in ((names[0], rows, takes_words), (names[1], seconds, False)):
        for i, row in enumerate(column):
            listed = words and isinstance(row, Sequence) and not isinstance(row, str | bytes) and all(isinstance(word, str) for word in row)
            if not isinstance(row, str) and not listed:
                raise ValueError(f"{name}[{i}] must be a text{' or a list of its words' if words else ''}, not {row!r:.60}.")
    if empty := [number for number, row in enumerate(rows, 1) if not "".join(row).strip()]:
        raise ValueError(f"No text in {names[0]} number {empty[0]} of {len(rows)}: remove it or fill it in.")
    split = [row.split() if isinstance(row, str) else list(row) for row in rows] if takes_words else None
    if split is not None and all(isinstance(row, str) for row in rows):
        split = None  # the task splits texts by itself
    joined = [row if isinstance(row, str) else " ".join(row) for row in rows]
    return Table(joined, seconds or None, words=split, origin=Origin(names[0], range(1, len(rows) + 1)))


def _listed(values: Any, name: str) -> list[Any]:
    """Return values as a list."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of texts, not {values!r:.60}.")
    return list(values)
