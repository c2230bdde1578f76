"""The arguments of a command line as the user typed them: which flags there are, and how often each is given.

The parser takes the last of several flags of one name, and a value that begins with a dash for a flag. Here repeated lists are joined,
other repetitions are noted, unknown flags are refused, and values after a flag stay values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from jpeft.cli import other_flags
from jpeft.core import other_names
from jpeft.registry import methods

_DASH = "\0"  # stands in front of a value that begins with a dash until the parser is done; no shell can type it
_FLAG = re.compile(r"--[A-Za-z].*", re.DOTALL)
_NUMBER = re.compile(r"-[\d.].*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
      name: Without the dashes.
      kind: How many values follow it.
    """

    name: str
    kind: typing.Literal["none", "switch", "one", "many"]  # a switch may be followed by True, False or none


def flags_of(args: type) -> dict[str, Flag]:
    """The flags of a command's dataclass by name; its positional arguments are not among them."""
    out = {}
    for name, hint in typing.get_type_hints(args, include_extras=True).items():
        markers = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
        if any(marker is tyro.conf.Positional or "Positional" in str(marker) for marker in markers):
            continue
        plain = typing.get_args(hint)[0] if markers else hint
        kind = "none" if plain is bool else "switch" if plain == (bool | None) else "many" if typing.get_origin(plain) is tuple else "one"
        flag = name.replace("_", "-")
        out[flag] = Flag(flag, kind)
    return out


def join_repeated(arguments: Sequence[str], command: str, args: type, whole: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The arguments with the values of a repeated list after its first flag, in the form that the parser reads; and notes for the user.

    Of other repeated flags the last counts, so that a command can be written again with one flag more; a note says so.

    Args:
      arguments: With the command's name first.
      command: The name.
      args: The command's dataclass.
      whole: `Command.whole`.

    Raises:
      ValueError: for a flag that the command does not have, or a switch with a value.

    >>> Args = dataclasses.make_dataclass("Args", [("text", tuple[str, ...], ()), ("seed", int, 0)])
    >>> join_repeated(["predict", "--text", "a", "--seed", "1", "--text", "b"], "predict", Args)
    (['predict', '--text', 'a', 'b', '--seed', '1'], [])
    """
    known, out, notes = flags_of(args), list(arguments[:1]), []
    given: dict[str, list[str]] = {}  # flag -> its values; the list stands in `parts` where the flag was first
    parts: list[str | Flag] = []
    rest = list(arguments[1:])
    while rest:
        token = rest.pop(0)
        if token == "--":
            parts += [token, *rest]
            break
        if token in ("-h", "--help") or not re.match(r"--?[A-Za-z]", token):
            parts.append(token)
            continue
        name, equals, value = token.lstrip("-").partition("=")
        flag = known.get(name.replace("_", "-"))
        if flag is None or not token.startswith("--"):
            raise ValueError(_unknown(token.partition("=")[0], command, args, known))
        values = [value] if equals else []
        if flag.kind == "none" and equals:
            raise ValueError(f"--{flag.name} takes no value: leave {'=' + value!r} out." if value else f"--{flag.name} takes no value.")
        while rest and not _is_flag(rest[0]) and (flag.kind == "many" or (flag.kind == "one" and not values)):
            values.append(rest.pop(0))
        if flag.kind == "switch" and not values:
            values.append(rest.pop(0) if rest and rest[0].lower() in ("true", "false", "none") else "True")
        if flag.name not in given:
            given[flag.name] = values
            parts.append(flag)
        elif flag.kind == "many" and flag.name not in whole:
            given[flag.name] += values
        elif given[flag.name] != values:
            notes.append(f"--{flag.name} was given twice, as {' '.join(given[flag.name])} and as {' '.join(values)}: the last counted.")
            given[flag.name] = values
    # Positional arguments go in front, together, where no list takes them for its own.
    end = parts.index("--") if "--" in parts else len(parts)
    out += [part for part in parts[:end] if isinstance(part, str)]
    for part in parts[:end]:
        out += [] if isinstance(part, str) else [f"--{part.name}", *map(_guarded, given[part.name])]
    return out + [part for part in parts[end:] if isinstance(part, str)], notes


def restore_dashes(args: Any) -> Any:
    """The parsed arguments with values as they were typed."""
    plain = lambda value: value.removeprefix(_DASH) if isinstance(value, str) else value
    texts = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    restored = {name: tuple(map(plain, value)) if isinstance(value, tuple) else plain(value) for name, value in texts.items()}
    changed = {name: value for name, value in restored.items() if value != texts[name]}
    return dataclasses.replace(args, **changed) if changed else args


def _is_flag(token: str) -> bool:
    return token in ("--", "-h") or _FLAG.fullmatch(token) is not None


def _guarded(value: str) -> str:
    return f"{_DASH}{value}" if value.startswith("-") and not _NUMBER.fullmatch(value) else value


def _unknown(flag: str, command: str, args: type, known: dict[str, Flag]) -> str:
    """What to say of a flag that a command does not have."""
    name = flag.lstrip("-").replace("_", "-")
    positional = [field.name.upper() for field in dataclasses.fields(args) if field.name.replace("_", "-") not in known]
    ours = other_flags.meant(name, [*known, *positional])
    close = difflib.get_close_matches(name, known, n=1)
    instead = f"Give it without a flag, as {ours}." if ours and ours.isupper() else f"Did you mean {ours}?"
    hint = f" {instead}" if ours else _method_option(name, command) or (f" Did you mean --{close[0]}?" if close else "")
    return f"jpeft {command} has no flag {flag}.{hint} jpeft {command} --help lists its flags."


def _method_option(name: str, command: str) -> str:
    """A hint for an option of a method that was written as a flag; nothing for another flag, or a command without a method."""
    name = name.replace("-", "_")
    options = {option for info in methods().values() for option in info.factory.__signature__.parameters}  # pyright: ignore
    ours = name if name in options else next(iter(other_names.SAME.get(name, ())), None)
    if ours is None or command not in ("train", "summary", "compare"):
        return ""
    where = "in quotes with the method's name, --methods 'lora" if command == "compare" else "after the method's name, --method lora"
    return f" Options of a method stand {where} {ours}=VALUE{chr(39) if command == 'compare' else ''}."
