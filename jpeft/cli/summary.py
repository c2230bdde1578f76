"""`jpeft summary`: parameter counts."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

import jpeft
from jpeft.cli.command import Command
from jpeft.training.build import attach, load_base
from jpeft.training.config import TaskName, TrainConfig
from jpeft.training.run import open_run


@dataclasses.dataclass(frozen=True)
class SummaryArgs:
    """Count the parameters of a run (`summary RUN`) or of a method (`summary --model M --method lora rank=8`)."""

    # Folder of a run, or options of --method as NAME=VALUE.
    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|NAME=VALUE")] = ()
    # Folder or hub id of a model, if no run is given.
    model: str | None = None
    # Branch, tag or commit of the model on the hub; none for its main branch.
    revision: str | None = None
    # Name of the method.
    method: str = "lora"
    # Task of the model.
    task: TaskName = "sequence-classification"
    # Number of labels of the new head.
    labels: int = 2


def _run(args: SummaryArgs) -> None:
    options = tuple(argument for argument in args.what if "=" in argument)
    runs = [argument for argument in args.what if "=" not in argument]
    if args.model is None and len(runs) == 1 and not options:
        peft = open_run(runs[0]).peft
    elif args.model is not None and not runs:
        about = {"model": args.model, "revision": args.revision, "task": args.task, "method": args.method}
        config = TrainConfig(**about, data="", output="", options=options, max_length=1)
        loaded = load_base(config, tuple(f"LABEL_{i}" for i in range(args.labels)))
        peft = attach(config, loaded)
    else:
        raise ValueError("Give the folder of one run, or --model with --method and its options as NAME=VALUE.")
    print(jpeft.summary(peft))


COMMAND = Command("summary", SummaryArgs, _run)
