"""`jpeft merge`: write a finished run as a plain model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro

from jpeft.checkpoint.files import check_output
from jpeft.cli.command import Command
from jpeft.models.checkpoints.shards import LARGEST_FILE, check_size
from jpeft.training.run import load_run
from jpeft.training.run_data import check_run_data


@dataclasses.dataclass(frozen=True)
class MergeArgs:
    """Merge the adapter of a finished run into the base and write the model as a plain Hugging Face folder."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Folder to write; must be new or empty.
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    # Folder or hub id of the base, where it has moved.
    model: str | None = None
    # Merge only if this is the data that the run was trained on; none needs no data.
    data: str | None = None
    # Largest file of weights to write, such as 5GB; a larger model is split into several files with an index.
    max_shard_size: str = LARGEST_FILE


def _run(args: MergeArgs) -> None:
    out = Path(args.out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"The output folder {out} is in use: choose another.")
    check_output(out, folder=True)
    size = check_size(args.max_shard_size)
    run = load_run(args.run, model=args.model, data=args.data)
    if args.data is not None:
        check_run_data(run)
    run.save_merged(out, max_shard_size=size)
    print(f"merged model in {out}")


COMMAND = Command("merge", MergeArgs, _run)
