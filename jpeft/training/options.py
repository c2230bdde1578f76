"""Options of a method as text, `rank=8`, and as values."""

import ast
from collections.abc import Iterable, Mapping
from typing import Any

import jpeft


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `("rank=8", "target=.*query/kernel")` into keyword arguments of a method's factory.

    Values are Python literals, `true`, `false` and `none` in any case among them; anything else is a string.

    Raises:
      ValueError: for a pair without `=` or a name that is given twice.

    >>> parse_options(["rank=8", "target=.*query/kernel", "bias=False"])
    {'rank': 8, 'target': '.*query/kernel', 'bias': False}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"The method option {pair!r} is not of the form NAME=VALUE, such as rank=8.")
        if name in options:
            raise ValueError(f"The method option {name!r} is given twice: {list(pairs)}.")
        options[name] = _value(text)
    return options


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # deeply nested brackets raise the last two
        return text


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Make the method once, so that a mistyped option is found before data and model are read.

    Raises:
      ValueError: for a method or an option that does not exist, or a value that an option cannot have.
    """
    # The option `tokens` may be text, which only the model's tokenizer can turn into ids.
    jpeft.make(method, **dict(options) | ({"tokens": (0,)} if isinstance(options.get("tokens"), str) else {}))
