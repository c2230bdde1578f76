"""Changes to the arguments before they are parsed: old names of flags, and `none`."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any, Union

# Old name of a flag -> today's name. An old name works with a warning, wherever a command has the new one.
RENAMED = {"head-rate": "head-lr-scale", "accumulate": "grad-accum"}


def rename_old_flags(arguments: Iterable[str], args: type) -> list[str]:
    """Return the arguments with today's names of flags, and print a warning on standard error for each old one.

    >>> import dataclasses
    >>> Args = dataclasses.make_dataclass("Args", [("grad_accum", int)])
    >>> rename_old_flags(["train", "--grad-accum", "2"], Args)
    ['train', '--grad-accum', '2']
    """
    known = {_flag(field.name) for field in dataclasses.fields(args)}
    renamed = {f"--{old}": f"--{new}" for old, new in RENAMED.items() if f"--{new}" in known}
    out = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        new = renamed.get(flag.replace("_", "-"))
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
    optional = {_flag(name) for name in optional_fields(args)}
    pairs = zip(["", *arguments], arguments)
    return ["None" if text == "none" and flag.replace("_", "-") in optional else text for flag, text in pairs]


def optional_fields(cls: type[Any]) -> frozenset[str]:
    """Return the names of the dataclass fields that may be None.

    >>> import dataclasses
    >>> sorted(optional_fields(dataclasses.make_dataclass("Args", [("clip", float | None), ("seed", int)])))
    ['clip']
    """
    hints = typing.get_type_hints(cls)
    unions = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) in (Union, types.UnionType)}
    return frozenset(name for name, members in unions.items() if type(None) in members)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
