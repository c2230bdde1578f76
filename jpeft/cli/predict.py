"""`jpeft predict`: predictions of a finished run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jpeft import data
from jpeft.cli.adapter_flags import AdapterFlags, check_data_given, open_model
from jpeft.cli.command import Command
from jpeft.cli.eval import read_run_split
from jpeft.cli.predictions import check_output, write_predictions
from jpeft.cli.texts import check_one_source, read_split
from jpeft.training.build import read_columns
from jpeft.training.decoding import OPTIONS
from jpeft.training.run import Run


@dataclasses.dataclass(frozen=True)
class PredictArgs(AdapterFlags):
    """Predict labels with probabilities for texts, tags for their words, or the text that follows: one JSON object a line."""

    # Folder of the run.
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    # Folder or hub id of the base: of an adapter, or of a run's base where it has moved.
    model: str | None = None
    # Texts, each an argument.
    text: tuple[str, ...] = ()
    # Second texts, for a model of pairs: one for each text.
    pair: tuple[str, ...] = ()
    # A CSV, TSV, JSONL, JSON or Parquet file with the run's text column; labels in the file are ignored.
    input: str | None = None
    # The same for any data: a file (all of its rows), a folder, "builtin[:name]" or "hub:name[/config]".
    data: str | None = None
    # Name of a split, of --data or of the run's own data. A file is split as in training.
    split: str | None = None
    # JSONL file to write; none prints.
    output: str | None = None
    # Replace the output file.
    overwrite: bool = False
    # Examples per batch.
    batch_size: int = 64
    # Most tokens to generate for a text; none for 64. Only for a model that generates text, like the flags below.
    max_new_tokens: int | None = None
    # Texts longer than the run's max_length: error, cut (the last tokens are kept) or drop (no answer); none for the run's own setting.
    overlong: Literal["error", "cut", "drop"] | None = None
    # Draw tokens at random with this seed; none takes the most likely token each time.
    seed: int | None = None
    # Temperature of the draw: above 1 the probabilities become more even, below 1 sharper.
    temperature: float | None = None
    # Draw among this many most likely tokens.
    top_k: int | None = None
    # Draw among the most likely tokens that make up this probability.
    top_p: float | None = None


def _run(args: PredictArgs) -> None:
    if args.input is not None and (args.data is not None or args.split is not None):
        raise ValueError("--input is a file, all of whose rows are predicted: give --data instead, with --split for a part of it.")
    source = next((given for given in (args.input, args.data, args.split) if given is not None), None)
    check_one_source(args.text, source, "a file with --input, data with --data, or a split of the run's data with --split")
    check_output(args.output, overwrite=args.overwrite)
    run = open_model(args)
    if source is not None and args.input is None:
        check_data_given(args, run)
    if args.overlong is not None:
        run = run.configured(overlong=args.overlong)
    table = run.table(args.text, args.pair, names=("--text", "--pair")) if source is None else _read(args, run)
    answers = run.answers(table, **{name: getattr(args, name) for name in OPTIONS})
    write_predictions(args.output, table, answers)


def _read(args: PredictArgs, run: Run) -> data.Table:
    if args.pair:
        raise ValueError("--pair holds the second texts of --text; those of a file are in its own column.")
    source = args.input or args.data
    if source is None:
        return read_run_split(run, args.split or "test")
    if args.split is None and (args.input is not None or Path(source).is_file()):
        # All of its rows, which need no labels.
        return data.read(source, text=run.config.text, pair=run.config.pair, label=None)
    return read_split(source, args.split or "test", **read_columns(run.config, run.task))


COMMAND = Command("predict", PredictArgs, _run, names={"text": None, "pair": None, "key": "--seed", "max_length": "max_length"})
