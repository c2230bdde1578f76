"""Messages of the library in the words of the command line: settings become flags, and the parser's box becomes one line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from jpeft.registry import methods

_BOX = re.compile(r"[╭╮╰╯│─]+")


def as_typed(message: str, args: type, names: Mapping[str, str | None]) -> str:
    """A message that names settings in the words of Python, with the flags that set them.

    A setting is told by its backticks, ``label``; by an underscore, as in "batch_size must be"; or by standing at the beginning.

    Args:
      message: The message.
      args: The command's dataclass, whose fields are flags.
      names: `Command.names`.

    >>> Args = dataclasses.make_dataclass("Args", ["batch_size", "steps", "label"])
    >>> as_typed("steps must be at least 1; batch_size=3; name it with `label`.", Args, {"label": "--label-column"})
    '--steps must be at least 1; --batch-size=3; name it with --label-column.'
    """
    flags: dict[str, str | None] = {field.name: f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(args)}
    flags |= names
    options = {option for info in methods().values() for option in info.factory.__signature__.parameters}  # pyright: ignore
    is_row = message.startswith(("Row '", 'Row "'))  # it names settings as the row does
    for name, flag in flags.items():
        if flag is None:
            message = re.sub(rf"[^.;]*`{name}`\.", " The run reads the columns that it was trained on: give a file that has them.", message)
            continue
        message = re.sub(rf"`{name}(=True)?`", flag, message)
        if "_" in name and name not in options and not is_row:
            message = re.sub(rf"(?<![\w/.\\'\"`-]){name}(?![\w/'\"`(]|=\S* in Python)", flag, message)
        else:  # an option's own message begins with the name of its method
            message = re.sub(rf"^{name}(?= must )" if name in options else rf"^{name}(?==| must )", flag, message)
        # What differs from the configuration of a run is a setting, even if options of methods have the name, too.
        message = re.sub(rf"(?<=[:,] ){name}(?= \([^()]* before)", flag, message)
        if name in names:
            message = message.replace(f"{name}=None", f"{flag} none")
    return message


def one_line(text: str, command: str) -> str:
    """What the parser prints of bad arguments, without its box and as one line.

    Args:
      text: What it printed.
      command: "jpeft", or with the command's name.

    >>> one_line("╭─ Missing argument ─╮\\n│ Missing value. │\\n│ ──── │\\n│ For full helptext, run jpeft │\\n╰──╯", "jpeft train")
    'Missing value. jpeft train --help explains the flags.'
    """
    lines = [_BOX.sub("", line).rstrip() for line in text.splitlines()[1:]]
    body = "\n".join(lines).partition("For full helptext")[0].replace("\0", "").replace("\\x00", "")
    if "Missing from" in body:
        needed = re.findall(r"^ {5}(--[\w-]+|[A-Z]\w*)", body, flags=re.MULTILINE)
        return f"{command} needs {', '.join(needed)}. {command} --help explains the flags."
    body = " ".join(body.split())
    if wrong := re.match(r"Error parsing (--[\w-]+):.*?(?:\['|: ')(.*?)'.*Argument helptext: --[\w-]+ (\S+)", body):
        kinds = {"INT": "a whole number", "FLOAT": "a number", "{None}": "none"}
        wanted = " or ".join(sorted(kinds.get(kind, kind) for kind in wrong[3].split("|")))
        return f"{wrong[1]} must be {wanted}, got {wrong[2]!r}."
    return f"{body[:1].upper()}{body[1:].removesuffix('.')}. {command} --help explains the flags."
