"""`jpeft eval`: metrics of a finished run."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

import jpeft
from jpeft.cli.command import Command
from jpeft.cli.tables import print_metrics
from jpeft.cli.texts import read_file_or_split, read_split
from jpeft.training.build import read_columns
from jpeft.training.evaluate import Evaluator
from jpeft.training.run import Run, open_run


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Print the metrics of a finished run on a split of the run's data, or on other data."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Data to evaluate instead of the run's: a file (all of its rows), a folder, "builtin[:name]" or "hub:name[/config]".
    data: str | None = None
    # Name of the split.
    split: str = "test"
    # Examples per batch.
    batch_size: int = 64
    # Generation: rows longer than the run's max_length, as in `jpeft train`; none for the run's own setting.
    overlong: Literal["error", "cut", "drop"] | None = None


def _run(args: EvalArgs) -> None:
    run = open_run(args.run)
    if args.overlong is not None:
        run = run.configured(overlong=args.overlong)
    names = read_columns(run.config, run.task)
    if args.data is None:
        # A file is split here as it was in training.
        table = read_split(run.config.data, args.split, **names)
    else:
        table = read_file_or_split(args.data, args.split, **names)
    arrays = run.task.encode_for(run.loaded, table, labels=run.labels, max_length=run.config.max_length)
    print_metrics({args.data or args.split: make_evaluator(run, args.batch_size).metrics(run.peft, arrays)})


def make_evaluator(run: Run, batch_size: int) -> Evaluator:
    """Return what computes metrics and predictions of a run's model."""
    return Evaluator(jpeft.wrap(run.loaded.model.apply, run.peft.method), run.task, batch_size, run.labels)


COMMAND = Command("eval", EvalArgs, _run, names=dict.fromkeys(("text", "pair", "label", "target", "tags")))
