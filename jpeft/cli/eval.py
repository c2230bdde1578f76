"""`jpeft eval`: metrics of a finished run."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jpeft import data
from jpeft.cli.adapter_flags import AdapterFlags, check_data_given, open_model
from jpeft.cli.command import Command
from jpeft.cli.tables import print_metrics
from jpeft.cli.texts import choose_split, read_file_or_split
from jpeft.training.build import read_columns
from jpeft.training.run import Run
from jpeft.training.run_data import changed_splits, read_tables


@dataclasses.dataclass(frozen=True)
class EvalArgs(AdapterFlags):
    """Print the metrics of a finished run, or of an adapter, on a split of the run's data, or on other data."""

    # Folder of the run.
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    # Folder or hub id of the base: of an adapter, or of a run's base where it has moved.
    model: str | None = None
    # Other data, or the run's where it has moved: a file, a folder, "builtin[:name]" or "hub:name[/config]".
    data: str | None = None
    # Name of the split. A file is split as in training; none takes all rows of a file in --data, and the test split of anything else.
    split: str | None = None
    # Examples per batch.
    batch_size: int = 64
    # Generation: rows longer than the run's max_length, as in `jpeft train`; none for the run's own setting.
    overlong: Literal["error", "cut", "drop"] | None = None


def _run(args: EvalArgs) -> None:
    run = open_model(args)
    check_data_given(args, run)
    if args.overlong is not None:
        run = run.configured(overlong=args.overlong)
    if args.data is None:
        table = read_run_split(run, args.split or "test")
    elif args.adapter is not None:
        table = read_file_or_split(args.data, args.split, **read_columns(run.config, run.task))
    else:
        table = _read_other(run, args.data, args.split)
    print_metrics({args.split or args.data or "test": run.metrics(table)})


def read_run_split(run: Run, split: str) -> data.Table:
    """Return a split of the run's data, with a warning if it is not what it was in training.

    Raises:
      ValueError: if the data is not there, or has no such split.
    """
    table = choose_split(read_tables(run), split)
    if changed_splits(run, {split: table}):
        warnings.warn(
            f"{run.config.data} has changed since the run was trained: its {split} split is another one, and may hold rows of training.",
            stacklevel=2,
        )
    return table


def _read_other(run: Run, source: str, split: str | None) -> data.Table:
    """Return the rows of --data. All rows of the run's own file, those of training among them, are evaluated only with a warning."""
    table = read_file_or_split(source, split, **read_columns(run.config, run.task))
    if split is None and Path(source).is_file() and _holds_training(run, source):
        warnings.warn(
            f"{source} holds the run's own data, and all of its rows are evaluated, those of training among them. "
            "--split test takes the rows that training has not seen.",
            stacklevel=2,
        )
    return table


def _holds_training(run: Run, source: str) -> bool:
    try:
        tables = data.splits(source, **read_columns(run.config, run.task))
    except ValueError:  # such as too few rows to be split
        return False
    return not changed_splits(run, {"train": tables["train"]})


COMMAND = Command("eval", EvalArgs, _run, names={**dict.fromkeys(("text", "pair", "label", "target", "tags")), "max_length": "max_length"})
