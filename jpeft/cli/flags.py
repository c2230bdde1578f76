"""Changes to the arguments before they are parsed: old names of flags, and `none`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from jpeft.core.limits import LARGEST, is_finite
from jpeft.training.setting import optional_fields, renamed, settings_of


def rename_old_flags(arguments: Iterable[str], args: type) -> list[str]:
    """Return the arguments with today's names of flags, and print a warning on standard error for each old name.

    A field of `args` lists its old names: `setting(..., old_names=("accumulate",))`.

    >>> from jpeft.training.config import TrainConfig
    >>> rename_old_flags(["train", "--grad-accum", "2"], TrainConfig)
    ['train', '--grad-accum', '2']
    """
    new_names = {_flag(old): _flag(new) for old, new in renamed(args).items()}
    out = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        new = new_names.get(flag.replace("_", "-"))
        if new is not None:
            print(f"warning: {flag} is now called {new}", file=sys.stderr)
        out.append(argument if new is None else f"{new}{equals}{value}")
    return out


def parse_none(arguments: Iterable[str], args: type) -> list[str]:
    """Return the arguments with `none` as `None`, which is how the parser spells it, after flags that may be None.

    The text `none` after any other flag, such as a list of texts, stays as it is.

    >>> import dataclasses
    >>> Args = dataclasses.make_dataclass("Args", [("clip", float | None), ("text", tuple[str, ...])])
    >>> parse_none(["train", "--clip", "none", "--text", "none"], Args)
    ['train', '--clip', 'None', '--text', 'none']
    """
    arguments = list(arguments)
    optional = set(map(_flag, optional_fields(args)))
    pairs = zip(["", *arguments], arguments)
    return ["None" if text == "none" and flag.replace("_", "-") in optional else text for flag, text in pairs]


def check_numbers(args: Any) -> None:
    """Check the numbers among the flags of a command whose fields are no settings with ranges of their own.

    Raises:
      ValueError: for a count below 1, a seed that would be another seed's, or a number that is not finite.
    """
    if settings_of(type(args)):
        return
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        low, high = (0, 2**32 - 1) if field.name == "seed" else (1, LARGEST)
        if isinstance(value, int) and not isinstance(value, bool) and not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise ValueError(f"{_flag(field.name)} must be {bound}, got {value}.")
        if isinstance(value, float) and not is_finite(value):
            raise ValueError(f"{_flag(field.name)} must be a finite number, got {value}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
