"""Where the rows of a table come from, so that a message can name the file, the row and the line."""

import dataclasses
from collections.abc import Sequence

SHOWN = 10  # numbers in one message


@dataclasses.dataclass(frozen=True)
class Origin:
    """The place of each row of a table.

    Attributes:
      source: The file or data set.
      rows: Number of each row there, from 1, without the header.
      lines: Line of the file in which each row begins, from 1; None for a format without lines.
      split: Name of the split that the rows are in; empty for all rows of a source.

    >>> Origin("a.csv", rows=(1, 2, 3), lines=(2, 3, 6)).at([0, 2])
    'rows 1, 3 (lines 2, 6)'
    """

    source: str
    rows: Sequence[int]
    lines: Sequence[int] | None = None
    split: str = ""

    def take(self, rows: Sequence[int]) -> "Origin":
        """Return the origin of some rows, given by their positions in the table."""
        lines = None if self.lines is None else [self.lines[i] for i in rows]
        return dataclasses.replace(self, rows=[self.rows[i] for i in rows], lines=lines)

    def at(self, rows: Sequence[int]) -> str:
        """Return the numbers of some rows, given by their positions in the table."""
        lines = "" if self.lines is None else f" ({_numbers('line', [self.lines[i] for i in rows])})"
        return _numbers("row", [self.rows[i] for i in rows]) + lines


def _numbers(word: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"{word}{'s' if len(numbers) > 1 else ''} {shown}{more}"
