"""Reads the docstring of a method: the text before the sections, the description of each option, and the reference."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping

_SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Raises|Yields|Example|Examples|Note|Notes):\s*")
_ARGUMENT = re.compile(r"(\w+)(?: \([^)]*\))?: ?(.*)")


@dataclasses.dataclass(frozen=True)
class Docstring:
    """The parts of a docstring.

    Attributes:
      text: Everything before the first section.
      arguments: Name of an argument -> its description.
      reference: The paragraph that begins with "Reference", or nothing.
    """

    text: str
    arguments: Mapping[str, str]
    reference: str


def parse_docstring(doc: str) -> Docstring:
    """Return the parts of a docstring in Google style, which `inspect.getdoc` has dedented.

    >>> doc = parse_docstring("A sum.\\n\\nArgs:\\n  a: First\\n    number.\\n  b: Second.\\n\\nReference: A book.")
    >>> doc.text, dict(doc.arguments), doc.reference
    ('A sum.', {'a': 'First\\nnumber.', 'b': 'Second.'}, 'Reference: A book.')
    """
    lines = doc.splitlines()
    first = next((i for i, line in enumerate(lines) if _SECTION.fullmatch(line) or line.startswith(">>>")), len(lines))
    text = "\n".join(lines[:first]).strip()
    reference = re.search(r"^References?:.*(?:\n.+)*", doc, flags=re.MULTILINE)
    return Docstring(text, _arguments(lines), reference[0] if reference else "")


def _arguments(lines: list[str]) -> dict[str, str]:
    starts = [i + 1 for i, line in enumerate(lines) if line.strip() in ("Args:", "Arguments:", "Attributes:")]
    out: dict[str, str] = {}
    for start in starts:
        # The section ends at the first line that is not indented.
        end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
        name = None
        for line in inspect.cleandoc("\n".join(["", *lines[start:end]])).splitlines():
            match = _ARGUMENT.match(line)
            if match:
                name, line = match.groups()
                out[name] = line
            elif name is not None:
                out[name] += f"\n{line.strip()}"
    return {name: description.strip() for name, description in out.items()}
