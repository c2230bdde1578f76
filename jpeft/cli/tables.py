"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with lines and wrapped cells on a terminal, and columns of plain text, uncut, elsewhere."""
    if sys.stdout.isatty():
        # As `Text`, which shows square brackets, where rich would read a plain string as markup.
        table = Table()
        for name in head:
            table.add_column(Text(name))
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row for each split and a column for each metric; nothing if there is no split."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [(split, *(f"{values[name]:.4f}" for name in names)) for split, values in metrics.items()]
    if rows:
        print_table(("split", *names), rows)
