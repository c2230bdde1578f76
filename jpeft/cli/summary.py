"""`jpeft summary`: parameter counts."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

import jpeft
from jpeft.cli.command import Command
from jpeft.training.build import attach, load_base
from jpeft.training.config import TaskName, TrainConfig
from jpeft.training.run import load_run
from jpeft.training.run_data import check_run_data


@dataclasses.dataclass(frozen=True)
class SummaryArgs:
    """Count the parameters of a run (`summary RUN`) or of a method (`summary --model M --method lora rank=8`)."""

    # Folder of a run, or options of --method as NAME=VALUE.
    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|NAME=VALUE")] = ()
    # Folder or hub id of a model; of a run's base, where it has moved.
    model: str | None = None
    # Branch, tag or commit of the model on the hub; none for its main branch. Not for a run, like the flags below.
    revision: str | None = None
    # Count only if this is the data that the run was trained on; none needs no data. Only for a run.
    data: str | None = None
    # Name of the method; none for lora.
    method: str | None = None
    # Task of the model; none for sequence-classification.
    task: TaskName | None = None
    # Number of labels of the new head; none for 2.
    labels: int | None = None


def _run(args: SummaryArgs) -> None:
    options = tuple(argument for argument in args.what if "=" in argument)
    runs = [argument for argument in args.what if "=" not in argument]
    of_method = [name for name in ("revision", "method", "task", "labels") if getattr(args, name) is not None]
    if len(runs) == 1 and not options:
        if of_method:
            raise ValueError(f"--{of_method[0]} is for a model without a run; {runs[0]} is a run, which has its own.")
        run = load_run(runs[0], model=args.model, data=args.data)
        if args.data is not None:
            check_run_data(run)
        peft = run.peft
    elif args.model is not None and args.data is None and not runs:
        about: dict[str, Any] = {"task": args.task or "sequence-classification", "method": args.method or "lora"}
        config = TrainConfig(**about, model=args.model, revision=args.revision, data="", output="", options=options, max_length=1)
        count = 2 if args.labels is None else args.labels
        peft = attach(config, load_base(config, tuple(f"LABEL_{i}" for i in range(count))))
    else:
        raise ValueError("Give the folder of one run, or --model with --method and its options as NAME=VALUE.")
    print(jpeft.summary(peft))


COMMAND = Command("summary", SummaryArgs, _run)
