"""`jpeft report`: table and picture of finished runs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jpeft.checkpoint.files import check_output
from jpeft.cli.command import Command
from jpeft.cli.tables import print_table
from jpeft.comparison.report import Comparison, collect, run_folders


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Make the table and the picture of finished runs of `compare` or `train`; nothing is trained."""

    # Folder that holds the folders of the runs.
    runs: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    # Folder for results.json, table.md and compare.png; none takes the folder that holds the runs.
    output: str | None = None
    # Which parameters the picture shows on its horizontal axis.
    parameters: Literal["trained", "stored", "changed"] = "trained"


def _run(args: ReportArgs) -> None:
    output = Path(args.output or args.runs)
    check_output(output / "results.json", folder=True)
    comparison = collect(run_folders(args.runs), parameters=args.parameters)
    output.mkdir(parents=True, exist_ok=True)
    comparison.write(output)
    print_comparison(comparison, output)


def print_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> None:
    """Print the table of a comparison, its notes, and which files were written to the folder."""
    if comparison.entries:
        print_table(*comparison.table())
    for note in comparison.notes:
        print(note)
    if comparison.config is not None:
        print(f"results.json, table.md and compare.png in {folder}")


COMMAND = Command("report", ReportArgs, _run)
