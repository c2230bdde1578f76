"""`jpeft predict`: predictions of a finished run."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from jpeft import data
from jpeft.cli.command import Command
from jpeft.cli.eval import make_evaluator
from jpeft.cli.predictions import check_output, write_predictions
from jpeft.cli.texts import check_one_source, texts_table
from jpeft.tasks.task import Decoding
from jpeft.training.run import Run, open_run


@dataclasses.dataclass(frozen=True)
class PredictArgs:
    """Predict labels with probabilities for texts, tags for their words, or the text that follows: one JSON object a line."""

    # Folder of the run.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Texts, each an argument.
    text: tuple[str, ...] = ()
    # Second texts, for a model of pairs: one for each text.
    pair: tuple[str, ...] = ()
    # A CSV, TSV, JSONL, JSON or Parquet file with the run's text column; labels in the file are ignored.
    input: str | None = None
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
    check_one_source(args.text, args.input, "a file with --input")
    check_output(args.output, overwrite=args.overwrite)
    run = open_run(args.run)
    if args.overlong is not None:
        run = run.configured(overlong=args.overlong)
    decoding = _decoding(args, run)
    if args.input is not None:
        table = data.read(args.input, text=run.config.text, pair=run.config.pair, label=None)
    else:
        table = texts_table(args.text, args.pair, pairs=bool(run.config.pair), reader="model")
    arrays = run.task.encode_for(run.loaded, table, labels=None, max_length=run.config.max_length)
    _warn_of_positions(run, arrays["input_ids"].shape[1] + decoding.max_new_tokens)
    answers = make_evaluator(run, min(args.batch_size, len(table))).answers(run.peft, arrays, decoding)
    write_predictions(args.output, table, run.task.predictions(answers, run.labels, run.loaded.tokenizer))


def _decoding(args: PredictArgs, run: Run) -> Decoding:
    """Return how text is generated, from the flags and the model's special tokens.

    Raises:
      ValueError: if a flag of generation is given for another task, or a flag of random draws without --seed.
    """
    given = {name: getattr(args, name) for name in ("max_new_tokens", "seed", "temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not run.task.generates:
        raise ValueError(f"{', '.join(map(_flag, given))}: only for a model that generates text, and this one does {run.task.name}.")
    if given and "seed" not in given and set(given) != {"max_new_tokens"}:
        random = map(_flag, sorted(given.keys() - {"max_new_tokens"}))
        raise ValueError(f"{', '.join(random)}: only for tokens drawn at random, with --seed.")
    if run.task.generates:
        # Some models have several end tokens: the tokenizer names one, the configuration all of them.
        end = run.loaded.tokenizer.eos_token_id
        others = getattr(run.loaded.config, "eos_token_id", None)
        given |= {"stop": tuple({end, *np.atleast_1d(end if others is None else others).tolist()}), "pad": end}
    if "seed" in given:
        given["key"] = jax.random.key(given.pop("seed"))
    return Decoding(**given)


def _warn_of_positions(run: Run, length: int) -> None:
    """Say that a text may become longer than the model's positions; a model with a table of positions refuses it by itself."""
    has_table = getattr(run.loaded.config, "position_rows", None) is not None
    if run.task.generates and not has_table and length > run.loaded.config.max_length:
        warnings.warn(
            f"Prompt and --max-new-tokens make up to {length} tokens, and the model has {run.loaded.config.max_length} positions: what "
            "comes behind them may be of no use.",
            stacklevel=2,
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


COMMAND = Command("predict", PredictArgs, _run, names={"text": None, "pair": None, "key": "--seed"})
