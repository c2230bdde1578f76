"""The `jpeft` command: train, compare, report, eval, predict, cloze, merge, summary, methods.

Each subcommand is a dataclass whose fields are its flags, and a function that takes it. What a user can mend is a
ValueError or a FileNotFoundError: `main` prints it as one `error:` line on standard error and returns 2. With
JPEFT_DEBUG=1 in the environment the traceback is shown instead.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jpeft
from jpeft import data, models
from jpeft.checkpoint.files import write_atomically
from jpeft.comparison.compare import compare
from jpeft.comparison.report import Comparison, collect, run_folders
from jpeft.tasks.cloze import Cloze
from jpeft.tasks.sequence_classification import SequenceClassification
from jpeft.tasks.task import Decoding
from jpeft.training.build import attach, load_base, read_columns
from jpeft.training.config import CompareConfig, Settings, TaskName, TrainConfig
from jpeft.training.evaluate import Evaluator
from jpeft.training.interrupt import InterruptedRun
from jpeft.training.run import Run, open_run, save_merged
from jpeft.training.run_folder import RunFolder
from jpeft.training.train import train

DESCRIPTION = """Parameter-efficient fine-tuning for JAX: train a small part of a pretrained model, or a small addition to it.

jpeft train --model FOLDER_OR_HUB_ID --data reviews.csv --output run --method lora rank=8

jpeft predict run --text "Not bad at all."

jpeft COMMAND --help explains a command.
"""


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Table and picture of runs that are there already, from `compare` or `train`; nothing is trained."""

    # Folder that holds the folders of the runs.
    runs: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    # Folder for results.json, table.md and compare.png; none for the one that holds the runs.
    output: str | None = None
    # Which parameters the picture shows on its horizontal axis.
    parameters: Literal["trained", "stored", "changed"] = "trained"


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Metrics of a finished run on a split of its own data, or on other data."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Other data than the run's: a file (all of it is evaluated), a folder, "builtin[:name]" or "hub:name[/config]".
    data: str | None = None
    # Which split.
    split: str = "test"
    # Examples per batch.
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class PredictArgs:
    """Labels and probabilities for texts, tags for their words, or how they go on: one JSON object a line."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Texts given right here.
    text: tuple[str, ...] = ()
    # Second texts, for a model of pairs: one for each text.
    pair: tuple[str, ...] = ()
    # A CSV, TSV, JSONL or Parquet file with the run's text column; labels in it are not looked at.
    input: str | None = None
    # JSONL file to write; none prints.
    output: str | None = None
    # Replace the output file.
    overwrite: bool = False
    # Examples per batch.
    batch_size: int = 64
    # Longest continuation, for a model that generates text (64 if none).
    max_new_tokens: int | None = None
    # Draw tokens at random, with this seed, instead of the most likely one each time.
    seed: int | None = None
    # Above 1 the draw is more even, below 1 it is sharper.
    temperature: float | None = None
    # Draw among this many most likely tokens.
    top_k: int | None = None
    # Draw among the most likely tokens that make up this probability.
    top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class ClozeArgs:
    """Classify without any training, by the words that a masked or causal language model puts into a gap.

    Metrics where the data has labels; predictions, one JSON object a line, where it has none or with --output.
    """

    # Folder or hub id of a language model.
    model: str
    # The text around the gap, such as "{text} It was {mask}."; for pairs also {pair}. For a causal model it ends with {mask}.
    template: str
    # The words of each label, each a single token: positive=great,good negative=terrible,bad
    words: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LABEL=WORD,WORD ...")]
    # Data: a file (all of it is classified), a folder, "builtin[:name]" or "hub:name[/config]".
    data: str | None = None
    # Texts given right here, instead of data.
    text: tuple[str, ...] = ()
    # Second texts, for a template of pairs: one for each text.
    pair: tuple[str, ...] = ()
    # Which split of the data, where it is no file.
    split: str = "test"
    # Column that holds the text.
    text_column: str = "text"
    # Column that holds the second text, for a template of pairs.
    pair_column: str = "pair"
    # Column that holds the label; none for data without labels.
    label_column: str | None = "label"
    # JSONL file to write; none prints.
    output: str | None = None
    # Replace the output file.
    overwrite: bool = False
    # Tokens per text in its template; longer texts are cut, the template is not.
    max_length: int = 128
    # Examples per batch.
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class MergeArgs:
    """Write a finished run as a plain Hugging Face folder, the adapter merged into the base."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Folder to write; must be new or empty.
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True)
class SummaryArgs:
    """Parameter counts of a run (`summary RUN`) or of a method (`summary --model M --method lora rank=8`)."""

    # Folder of a run, or options of --method as NAME=VALUE.
    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|NAME=VALUE")] = ()
    # Folder or hub id of a model, without a run.
    model: str | None = None
    # Name of the method.
    method: str = "lora"
    # What the model is to do.
    task: TaskName = "sequence-classification"
    # Number of labels of the new head.
    labels: int = 2


@dataclasses.dataclass(frozen=True)
class MethodsArgs:
    """The methods, with their families and default learning rates."""


Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare")]
    | Annotated[ReportArgs, tyro.conf.subcommand("report")]
    | Annotated[EvalArgs, tyro.conf.subcommand("eval")]
    | Annotated[PredictArgs, tyro.conf.subcommand("predict")]
    | Annotated[ClozeArgs, tyro.conf.subcommand("cloze")]
    | Annotated[MergeArgs, tyro.conf.subcommand("merge")]
    | Annotated[SummaryArgs, tyro.conf.subcommand("summary")]
    | Annotated[MethodsArgs, tyro.conf.subcommand("methods")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, 1 if some runs of a comparison failed, 2 for a user's error, 128 + signal if interrupted.
    """
    arguments = _with_none(sys.argv[1:] if argv is None else list(argv))
    debug = os.environ.get("JPEFT_DEBUG", "") not in ("", "0")
    try:
        args: Any = tyro.cli(
            Command,  # pyright: ignore[reportArgumentType]
            args=arguments,
            prog="jpeft",
            description=DESCRIPTION,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as exit_:  # tyro has shown the help or what was wrong
        return int(exit_.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return COMMANDS[type(args)](args) or 0
    except InterruptedRun as stop:
        again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
        # A comparison goes on by itself.
        again += ["--resume"] if isinstance(args, TrainConfig) else []
        print(f"{stop}; continue with: jpeft {shlex.join(again)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        if isinstance(args, CompareConfig):
            print("interrupted between two runs; the same command goes on from here", file=sys.stderr)
        else:
            # A second Ctrl-C acts at once; what the first had saved, or an earlier checkpoint, is there.
            saved = isinstance(args, TrainConfig) and any(RunFolder(args.output).checkpoints.glob("*/checksums.json"))
            print("interrupted" + ("; continue from the newest checkpoint with --resume" if saved else ""), file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if debug:
            raise
        return _fail(error)


def _with_none(arguments: list[str]) -> list[str]:
    """`--clip none` as `--clip None`, which is how the parser knows it; in flags of settings and columns alone, not in texts."""
    settings = {"train": Settings, "compare": Settings, "cloze": ClozeArgs}.get(arguments[0]) if arguments else None
    if settings is None:
        return arguments
    optional = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(settings) if "None" in str(field.type)}
    pairs = zip(["", *arguments], arguments)
    return ["None" if text == "none" and flag.replace("_", "-") in optional else text for flag, text in pairs]


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _show_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    del filename, lineno, file, line
    # Only ours are news to a user; the libraries below warn their developers.
    if category is UserWarning:
        print(f"warning: {message}", file=sys.stderr)


# --- subcommands ----------------------------------------------------------------------------------------------------


def _train(config: TrainConfig) -> None:
    result = train(config)
    rows = {name: metrics for name in ("validation", "test") if (metrics := getattr(result, name))}
    _print_metrics(rows)
    print(f"{result.trained:,} trained parameters, {result.steps} steps in {result.seconds:.1f} s; saved in {result.path}")


def _compare(config: CompareConfig) -> int:
    comparison = compare(config)
    _print_comparison(comparison, config.output)
    return 1 if comparison.failures else 0


def _report(args: ReportArgs) -> None:
    comparison = collect(run_folders(args.runs), parameters=args.parameters)
    output = Path(args.output or args.runs)
    output.mkdir(parents=True, exist_ok=True)
    comparison.write(output)
    _print_comparison(comparison, output)


def _print_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> None:
    if comparison.entries:
        _print_table(*comparison.table())
    for note in comparison.notes:
        print(note)
    if comparison.config is not None:
        print(f"results.json, table.md and compare.png in {folder}")


def _eval(args: EvalArgs) -> None:
    run = open_run(args.run)
    table = _eval_table(run, args)
    arrays = run.task.encode(table, run.loaded.tokenizer, labels=run.labels, max_length=run.config.max_length)
    _print_metrics({args.data or args.split: _evaluator(run, args.batch_size).metrics(run.peft, arrays)})


def _eval_table(run: Run, args: EvalArgs) -> data.Table:
    names = read_columns(run.config, run.task)
    if args.data is not None and Path(args.data).is_file():
        return data.read(args.data, **names)
    return _split(args.data or run.config.data, args.split, **names)


def _split(spec: str, split: str, **names: Any) -> data.Table:
    tables = data.splits(spec, **names)
    if not len(tables.get(split, ())):
        there = ", ".join(name for name, table in tables.items() if len(table))
        raise ValueError(f"the data has no split {split!r} with rows in it; it has {there}")
    return tables[split]


def _predict(args: PredictArgs) -> None:
    if bool(args.text) == (args.input is not None):
        raise ValueError("give either texts with --text or a file with --input")
    _check_output(args)
    run = open_run(args.run)
    decoding = _decoding(args, run)
    if args.input is not None:
        table = data.read(args.input, text=run.config.text, pair=run.config.pair, label=None)
    else:
        if len(args.pair) != (len(args.text) if run.config.pair else 0):
            expected = "one --pair for each --text" if run.config.pair else "single texts, without --pair"
            raise ValueError(f"this model takes {expected}: got {len(args.text)} texts and {len(args.pair)} pairs")
        table = data.Table(list(args.text), list(args.pair) or None, None)
    arrays = run.task.encode(table, run.loaded.tokenizer, labels=None, max_length=run.config.max_length)
    answers = _evaluator(run, min(args.batch_size, len(table))).answers(run.peft, arrays, decoding)
    _write_predictions(args, table, run.task.predictions(answers, run.labels, run.loaded.tokenizer))


def _check_output(args: PredictArgs | ClozeArgs) -> None:
    if args.output is not None and Path(args.output).exists() and not args.overwrite:
        raise ValueError(f"the output file {args.output} is there already: choose another, or replace it with --overwrite")


def _write_predictions(args: PredictArgs | ClozeArgs, table: data.Table, predictions: Sequence[Mapping[str, Any]]) -> None:
    lines = []
    for row, prediction in enumerate(predictions):
        pair = {} if table.pair is None else {"pair": table.pair[row]}
        lines.append(json.dumps({"text": table.text[row], **pair, **prediction}, ensure_ascii=False) + "\n")
    if args.output is None:
        print("".join(lines), end="")
    else:
        write_atomically(args.output, "".join(lines))
        print(f"{len(lines)} predictions in {args.output}")


def _cloze(args: ClozeArgs) -> None:
    if bool(args.text) == (args.data is not None):
        raise ValueError("give either texts with --text or data with --data")
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    _check_output(args)
    cloze = Cloze(args.template, _verbaliser(args.words))
    table = _cloze_table(args, pairs="{pair}" in args.template)
    if unknown := sorted(set(table.label or ()) - set(cloze.labels)):
        raise ValueError(f"--words has none for the label {unknown[0]!r} of the data; it has words for {', '.join(cloze.labels)}")
    loaded = models.load(args.model, task="language-model")
    if args.max_length > loaded.config.max_length:
        raise ValueError(f"max_length={args.max_length} is more than the model's {loaded.config.max_length} positions")
    if loaded.new:
        raise ValueError(
            f"{args.model} is no language model: it lacks {', '.join(sorted(loaded.new)[:3])}, which says what a gap holds. Give a "
            "checkpoint with its language modelling head"
        )
    arrays = cloze.encode(loaded.tokenizer, table.text, table.pair, max_length=args.max_length)
    batch_size = min(args.batch_size, len(table))
    scores = cloze.classify(loaded.model.apply, {"params": loaded.params}, loaded.tokenizer, arrays, batch_size=batch_size)
    if args.data is not None and table.label is not None:
        expected = np.array([cloze.labels.index(label) for label in table.label], np.int32)
        name = args.data if Path(args.data).is_file() else args.split
        _print_metrics({name: SequenceClassification().metrics(scores, {"label": expected}, cloze.labels)})
    if table.label is None or args.output is not None:
        _write_predictions(args, table, SequenceClassification().predictions(scores, cloze.labels, loaded.tokenizer))


def _verbaliser(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`positive=great,good` as the label and its words."""
    out: dict[str, tuple[str, ...]] = {}
    for given in words:
        label, equals, listed = given.partition("=")
        if not equals or not label:
            raise ValueError(f"{given!r} in --words is not of the form LABEL=WORD,WORD, such as positive=great,good")
        if label in out:
            raise ValueError(f"the label {label!r} is given twice in --words: list all of its words behind one {label}=")
        out[label] = tuple(word.strip() for word in listed.split(",") if word.strip())
    if len(out) < 2:
        raise ValueError(f"to choose between labels, --words needs at least two of them, got {', '.join(out) or 'none'}")
    return out


def _cloze_table(args: ClozeArgs, *, pairs: bool) -> data.Table:
    if args.data is None:
        if len(args.pair) != (len(args.text) if pairs else 0):
            expected = "one --pair for each --text" if pairs else "single texts, without --pair"
            raise ValueError(f"this template takes {expected}: got {len(args.text)} texts and {len(args.pair)} pairs")
        return data.Table(list(args.text), list(args.pair) or None, None)
    if args.pair:
        raise ValueError("--pair holds the second texts of --text; those of data are in its --pair-column")
    names = {"text": args.text_column, "pair": args.pair_column if pairs else None, "label": args.label_column}
    return data.read(args.data, **names) if Path(args.data).is_file() else _split(args.data, args.split, **names)


def _decoding(args: PredictArgs, run: Run) -> Decoding:
    """How text is generated; nothing of that may be asked of a model that generates none."""
    given = {name: getattr(args, name) for name in ("max_new_tokens", "seed", "temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not run.task.generates:
        raise ValueError(f"{', '.join(given)}: only for a model that generates text, and this one does {run.task.name}")
    if given and "seed" not in given and set(given) != {"max_new_tokens"}:
        raise ValueError(f"{', '.join(sorted(given.keys() - {'max_new_tokens'}))}: only for tokens drawn at random, with --seed")
    if run.task.generates:
        end = run.loaded.tokenizer.eos_token_id
        others = getattr(run.loaded.config, "eos_token_id", None)
        given |= {"stop": tuple({end, *np.atleast_1d(end if others is None else others).tolist()}), "pad": end}
    if "seed" in given:
        given["key"] = jax.random.key(given.pop("seed"))
    return Decoding(**given)


def _merge(args: MergeArgs) -> None:
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"the output folder {out} is in use: choose another")
    run = open_run(args.run)
    save_merged(out, run.loaded, run.peft)
    print(f"merged model in {out}")


def _summary(args: SummaryArgs) -> None:
    options = tuple(argument for argument in args.what if "=" in argument)
    runs = [argument for argument in args.what if "=" not in argument]
    if args.model is None and len(runs) == 1 and not options:
        peft = open_run(runs[0]).peft
    elif args.model is not None and not runs:
        config = TrainConfig(model=args.model, data="", output="", task=args.task, method=args.method, options=options, max_length=1)
        loaded = load_base(config, tuple(f"LABEL_{i}" for i in range(args.labels)))
        peft = attach(config, loaded)
    else:
        raise ValueError("give the folder of one run, or --model with --method and its options as NAME=VALUE")
    print(jpeft.summary(peft))


def _methods(args: MethodsArgs) -> None:
    del args
    rows = [(info.name, info.family, f"{info.learning_rate:g}", info.summary) for info in jpeft.methods().values()]
    _print_table(("method", "family", "learning rate", "what it does"), rows)


def _evaluator(run: Run, batch_size: int) -> Evaluator:
    return Evaluator(jpeft.wrap(run.loaded.model.apply, run.peft.method), run.task, batch_size, run.labels)


def _print_metrics(rows: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    body = [(split, *(f"{metrics[name]:.4f}" for name in names)) for split, metrics in rows.items()]
    if body:
        _print_table(("split", *names), body)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; columns of plain text, uncut, elsewhere."""
    if sys.stdout.isatty():
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


COMMANDS = {
    TrainConfig: _train,
    CompareConfig: _compare,
    ReportArgs: _report,
    EvalArgs: _eval,
    PredictArgs: _predict,
    ClozeArgs: _cloze,
    MergeArgs: _merge,
    SummaryArgs: _summary,
    MethodsArgs: _methods,
}
