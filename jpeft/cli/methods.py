"""`jpeft methods`: the table of methods, and the page of one method."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Annotated

import tyro

import jpeft
from jpeft.cli.command import Command
from jpeft.cli.docstrings import parse_docstring
from jpeft.cli.tables import print_table
from jpeft.core.options import describe


@dataclasses.dataclass(frozen=True)
class MethodsArgs:
    """List the methods with their families and default learning rates, or explain one method (`methods lora`)."""

    # Name of a method to explain; none lists all methods.
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None


def _run(args: MethodsArgs) -> None:
    known = jpeft.methods()
    if args.name is None:
        rows = [(info.name, info.family, f"{info.learning_rate:g}", info.summary) for info in known.values()]
        print_table(("method", "family", "learning rate", "what it does"), rows)
    elif args.name in known:
        print(method_page(known[args.name]))
    else:
        close = difflib.get_close_matches(args.name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no method {args.name!r}.{hint} Methods: {', '.join(known)}.")


def method_page(info: jpeft.MethodInfo) -> str:
    """Return the documentation of a method as text: summary, equation, and options with types, defaults and meaning."""
    doc = parse_docstring(inspect.getdoc(info.factory) or "")
    lines = [
        f"{info.name}: {info.summary}",
        f"Family: {info.family}. Default learning rate: {info.learning_rate:g}.",
        "",
        doc.text,
        "",
        f"Options, as in `jpeft train --method {info.name} NAME=VALUE` or `jpeft.{info.name}(NAME=VALUE)`:",
    ]
    options = inspect.signature(info.factory).parameters
    # In the docstring's order, which puts the method's special options before those of all methods.
    for name in dict.fromkeys([*(name for name in doc.arguments if name in options), *options]):
        lines += ["", f"  {_declaration(options[name])}"]
        lines += [f"      {line}" for line in doc.arguments.get(name, "").splitlines()]
    if doc.reference:
        lines += ["", doc.reference]
    # The docstrings mark code with two backticks for documentation pages; one is enough on a terminal.
    return "\n".join(lines).replace("``", "`")


def _declaration(option: inspect.Parameter) -> str:
    """Return an option with its default and what it may be, such as `rank = 8 (a whole number of at least 1)`."""
    default = "" if option.default is option.empty else f" = {option.default!r}"
    return f"{option.name}{default}" + ("" if option.annotation is option.empty else f"  ({describe(option.annotation)})")


COMMAND = Command("methods", MethodsArgs, _run)
