"""A command to copy: `jpeft rows DATA` prints the number of rows of each split.

Copy the file to jpeft/cli/NAME.py and add the module to `COMMANDS` in jpeft/cli/main.py.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from jpeft import data
from jpeft.cli.command import Command
from jpeft.cli.tables import print_table


@dataclasses.dataclass(frozen=True)
class RowsArgs:
    """Print the number of rows of each split of some data."""

    # The data: a file, a folder, "builtin[:name]" or "hub:name[/config]".
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    # Text column.
    text: str = "text"
    # Label column; none for data without labels.
    label: str | None = "label"
    # Name of the only split to print; none prints all.
    split: str | None = None


def _run(args: RowsArgs) -> None:
    tables = data.splits(args.data, text=args.text, label=args.label)
    if args.split is not None and args.split not in tables:
        raise ValueError(f"The data has no split {args.split!r}; it has {', '.join(tables)}.")
    shown = tables if args.split is None else [args.split]
    print_table(("split", "rows"), [(name, str(len(tables[name]))) for name in shown])


COMMAND = Command("rows", RowsArgs, _run)
