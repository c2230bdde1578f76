"""Changes to the arguments before they are parsed: old names of flags, and `none`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from jpeft.training.setting import optional_fields, renamed


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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
