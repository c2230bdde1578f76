"""`jpeft merge`: write a finished run as a plain model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro

from jpeft.checkpoint.files import check_output
from jpeft.cli.command import Command
from jpeft.training.run import open_run, save_merged


@dataclasses.dataclass(frozen=True)
class MergeArgs:
    """Merge the adapter of a finished run into the base and write the model as a plain Hugging Face folder."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Folder to write; must be new or empty.
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def _run(args: MergeArgs) -> None:
    out = Path(args.out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"The output folder {out} is in use: choose another.")
    check_output(out, folder=True)
    run = open_run(args.run)
    save_merged(out, run.loaded, run.peft)
    print(f"merged model in {out}")


COMMAND = Command("merge", MergeArgs, _run)
