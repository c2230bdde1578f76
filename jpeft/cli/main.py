"""Entry point of the command line: parses the flags, runs the command, and turns errors into messages and exit statuses.

A mistake that the user can correct is a ValueError or an OSError: `main` prints it as one `error:` line on standard error and
returns 2. With JPEFT_DEBUG=1 in the environment, the traceback is shown instead.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

import jpeft
from jpeft.cli import cloze, compare, estimate, eval, export, merge, methods, predict, report, summary, train
from jpeft.cli.arguments import join_repeated, restore_dashes
from jpeft.cli.command import Command
from jpeft.cli.flags import check_numbers, parse_none, rename_old_flags
from jpeft.cli.messages import as_typed, one_line
from jpeft.extras import how_to_install
from jpeft.models.checkpoints.notes import CheckpointNote
from jpeft.training.interrupt import InterruptedRun

# A new command is one file with a `COMMAND`, and its name here. The help lists the commands in this order.
COMMANDS: tuple[Command, ...] = tuple(
    module.COMMAND for module in (train, compare, report, eval, predict, cloze, merge, export, summary, estimate, methods)
)

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
    arguments = typed = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"jpeft {jpeft.__version__}")
        return 0
    command = next((command for command in COMMANDS if command.name in arguments[:1]), None)
    try:
        arguments, typed_notes = _rewrite_flags(arguments, command)
        args = _parse(arguments, command)
    except SystemExit as exit_:  # tyro has printed the help
        return int(exit_.code or 0)
    except ValueError as error:
        return _say_error(error, command)
    assert command is not None, "The parser accepts only commands."
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, command, notes)
            warnings.simplefilter("default", CheckpointNote)
            check_numbers(args)
            status = command.run(args) or 0
        for note in [*(notes if command.holds_notes else ()), *typed_notes]:
            print(f"note: {note}", file=sys.stderr)
        return status
    except InterruptedRun as stop:
        again = [argument for argument in typed if argument not in ("--overwrite", "--resume")]
        print(f"{stop}; continue with: jpeft {shlex.join([*again, *command.resume_flags])}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(command.interrupted(args), file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        return _say_error(error, command)
    except ImportError as error:
        if how_to_install(error) is None and "pip install" not in str(error):
            raise
        return _say_error(error, command)


def _say_error(error: Exception, command: Command | None) -> int:
    """Print an error as one line, with flags as the user types them, and return the exit status; or raise it for JPEFT_DEBUG=1."""
    if os.environ.get("JPEFT_DEBUG", "") not in ("", "0"):
        raise error
    missing = how_to_install(error) if isinstance(error, ImportError) else None
    text = missing or " ".join(str(error).split())
    print(f"error: {as_typed(text, command.args, command.names) if command else text}", file=sys.stderr)
    return 2


def _rewrite_flags(arguments: list[str], command: Command | None) -> tuple[list[str], list[str]]:
    """Return the arguments in today's spelling of the flags, each flag once, with `none` as the parser reads it; and notes for the user.

    Raises:
      ValueError: for a command or a flag that does not exist.
    """
    if command is None:
        if arguments and not arguments[0].startswith("-"):
            names = [command.name for command in COMMANDS]
            close = difflib.get_close_matches(arguments[0], names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"There is no command {arguments[0]!r}.{hint} Commands: {', '.join(names)}. jpeft --help explains them.")
        return arguments, []
    joined, notes = join_repeated(rename_old_flags(arguments, command.args), command.name, command.args, command.whole)
    return parse_none(joined, command.args), notes


def _parse(arguments: list[str], command: Command | None) -> Any:
    """Return the arguments as an instance of the command's dataclass.

    Raises:
      ValueError: for arguments that are missing or cannot be read.
      SystemExit: after the help was printed.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return restore_dashes(_parse_by_tyro(arguments))
    except SystemExit as exit_:
        if exit_.code:
            raise ValueError(one_line(printed.getvalue(), f"jpeft {command.name}" if command else "jpeft")) from None
        raise


def _parse_by_tyro(arguments: list[str]) -> Any:
    # tyro reads the commands from a union of their dataclasses: Annotated[TrainConfig, subcommand("train")] | ...
    commands = Union[tuple(Annotated[command.args, tyro.conf.subcommand(command.name)] for command in COMMANDS)]  # noqa: UP007
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(commands, args=arguments, prog="jpeft", description=DESCRIPTION, config=config)  # pyright: ignore


def _show_warning(
    command: Command, notes: list[str], message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None
) -> None:
    """Print a warning. What is to be said of a checkpoint is kept in `notes`, and printed once, later if the command holds its notes."""
    del filename, lineno, file, line
    # Warnings of jpeft are for the user. Other categories come from the libraries below and are for their developers.
    text = as_typed(str(message), command.args, command.names)
    if category is UserWarning:
        print(f"warning: {text}", file=sys.stderr)
    elif category is CheckpointNote and text not in notes:
        notes.append(text)
        if not command.holds_notes:
            print(f"note: {text}", file=sys.stderr)
