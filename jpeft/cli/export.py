"""`jpeft export`: write the adapter of a run, or its merged model, for other programs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import jpeft
from jpeft.checkpoint.files import check_output
from jpeft.cli.command import Command
from jpeft.models.checkpoints.shards import LARGEST_FILE, check_size
from jpeft.training.adapter_folder import load_adapter, write_labels
from jpeft.training.config import TaskName
from jpeft.training.run import Run, load_run


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write the adapter of a finished run for other programs: HF PEFT and all that reads its folders, the library adapters, or jpeft."""

    # Folder of the run; or of an adapter, with --model.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Folder to write; must be new or empty.
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    # peft: a folder of HF PEFT; adapters: a folder of the library adapters, for bottlenecks; jpeft: what jpeft.load reads; merged: a plain
    # Hugging Face folder.
    format: Literal["peft", "adapters", "jpeft", "merged"] = "peft"
    # Folder or hub id of the base: of an adapter, or of a run's base where it has moved.
    model: str | None = None
    # Task of the model; none for sequence-classification. Only for an adapter.
    task: TaskName | None = None
    # Name of the base to write into adapter_config.json, such as a hub id; none for where it was found.
    base_name: str | None = None
    # Largest file of weights of a merged model, such as 5GB.
    max_shard_size: str = LARGEST_FILE


def _run(args: ExportArgs) -> None:
    out = Path(args.out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"The output folder {out} is in use: choose another.")
    check_output(out, folder=True)
    size = check_size(args.max_shard_size)
    run = _open(args)
    base = args.base_name or run.config.model
    if args.format == "merged":
        run.save_merged(out, max_shard_size=size)
    elif args.format == "jpeft":
        jpeft.save(out, run.peft, overwrite=True)
    elif args.format == "adapters":
        jpeft.save_adapterhub(out, run.peft, model=run.loaded.model, labels=run.labels, base=base, overwrite=True)
    else:
        jpeft.save_hf(out, run.peft, model=run.loaded.model, base=base, overwrite=True)
        write_labels(out, run.labels)
        if run.loaded.added:  # which the base's own tokenizer does not have
            run.loaded.tokenizer.save_pretrained(out)
    print(f"{'merged model' if args.format == 'merged' else 'adapter'} in {out}")


def _open(args: ExportArgs) -> Run:
    """The run, or the adapter with its base."""
    if (Path(args.run) / "config.json").is_file() or args.model is None:
        if args.task is not None:
            raise ValueError(f"--task is for an adapter without a run; {args.run} is a run, which has its own.")
        return load_run(args.run, model=args.model)
    settings: dict[str, Any] = {} if args.task is None else {"task": args.task}
    return load_adapter(args.run, model=args.model, **settings)


COMMAND = Command("export", ExportArgs, _run)
