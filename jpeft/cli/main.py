"""Entry point of the command line: parses the flags, runs the command, and turns errors into messages and exit statuses.

A mistake that the user can correct is a ValueError or an OSError: `main` prints it as one `error:` line on standard error and
returns 2. With JPEFT_DEBUG=1 in the environment, the traceback is shown instead.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

import jpeft
from jpeft.cli import cloze, compare, eval, merge, methods, predict, report, summary, train
from jpeft.cli.command import Command
from jpeft.cli.flags import parse_none, rename_old_flags
from jpeft.models.checkpoints.notes import CheckpointNote
from jpeft.training.interrupt import InterruptedRun

# A new command is one file with a `COMMAND`, and its name here. The help lists the commands in this order.
COMMANDS: tuple[Command, ...] = tuple(module.COMMAND for module in (train, compare, report, eval, predict, cloze, merge, summary, methods))

DESCRIPTION = """Parameter-efficient fine-tuning for JAX: train a small part of a pretrained model, or a small addition to it.

jpeft train --model FOLDER_OR_HUB_ID --data reviews.csv --output run --method lora rank=8

jpeft predict run --text "Not bad at all."

jpeft COMMAND --help explains a command. jpeft --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: The arguments after `jpeft`; None takes those of the process.

    Returns:
      The exit status: 0, 1 if some runs of a comparison failed, 2 for an error of the user, 128 + signal if interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"jpeft {jpeft.__version__}")
        return 0
    arguments = _rewrite_flags(arguments)
    try:
        args = _parse(arguments)
    except SystemExit as exit_:  # tyro has printed the help or the error
        return int(exit_.code or 0)
    command = next(command for command in COMMANDS if command.args is type(args))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("default", CheckpointNote)
            return command.run(args) or 0
    except InterruptedRun as stop:
        again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
        print(f"{stop}; continue with: jpeft {shlex.join([*again, *command.resume_flags])}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(command.interrupted(args), file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("JPEFT_DEBUG", "") not in ("", "0"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _rewrite_flags(arguments: list[str]) -> list[str]:
    """Return the arguments in today's spelling of the flags, with `none` as the parser reads it."""
    by_name = {command.name: command.args for command in COMMANDS}
    if not arguments or arguments[0] not in by_name:
        return arguments
    args = by_name[arguments[0]]
    return parse_none(rename_old_flags(arguments, args), args)


def _parse(arguments: list[str]) -> Any:
    # tyro reads the commands from a union of their dataclasses: Annotated[TrainConfig, subcommand("train")] | ...
    commands = Union[tuple(Annotated[command.args, tyro.conf.subcommand(command.name)] for command in COMMANDS)]  # noqa: UP007
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(commands, args=arguments, prog="jpeft", description=DESCRIPTION, config=config)  # pyright: ignore


def _show_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    del filename, lineno, file, line
    # Warnings of jpeft are for the user. Other categories come from the libraries below and are for their developers.
    if category in (UserWarning, CheckpointNote):
        print(f"{'note' if category is CheckpointNote else 'warning'}: {message}", file=sys.stderr)
