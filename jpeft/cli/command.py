"""What a command of the command line is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

Args = TypeVar("Args")


def _say_interrupted(args: Any) -> str:
    del args
    return "interrupted"


@dataclasses.dataclass(frozen=True)
class Command(Generic[Args]):
    """One command: its name, its flags and its function.

    Attributes:
      name: The word after `jpeft`.
      args: Dataclass whose fields are the flags. Its docstring is the command's help, and the comment above a field is the flag's help.
      run: Runs the command. Its result is the exit status; None means 0.
      resume_flags: Flags to add to an interrupted command line to continue the work.
      interrupted: Message for Ctrl-C, given the flags.
      names: The flag for a name that messages of the library hold, where it is not the field of that name; None for a column that the
        command has no flag for.
      whole: Lists that are one value together: a repeated flag replaces the first one's, where other lists are joined.
      holds_notes: Whether what is to be said of a pretrained checkpoint waits until the command has succeeded, so that an error is all that
        is shown. The trainer says it as soon as it has checked its input.
    """

    name: str
    args: type[Args]
    run: Callable[[Args], int | None]
    resume_flags: tuple[str, ...] = ()
    interrupted: Callable[[Args], str] = _say_interrupted
    names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    whole: tuple[str, ...] = ()
    holds_notes: bool = True
