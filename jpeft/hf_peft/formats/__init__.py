"""HF PEFT's types of adapter, one file each. A file with a class of a `Format` is found; there is no list to edit."""

import functools
import importlib
import inspect
import pkgutil

from jpeft.core.options import shown
from jpeft.hf_peft.formats.base import Format


@functools.cache
def formats() -> dict[str, Format]:
    """The formats by HF PEFT's name.

    >>> formats()["LORA"].methods[0]
    'lora'
    """
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if cls.__module__ == module.name and issubclass(cls, Format) and not inspect.isabstract(cls):
                found[cls.peft_type] = cls()
    return found


def format_of(peft_type: object, where: object) -> Format:
    """The format of a type.

    Args:
      peft_type: As in the configuration.
      where: The file, for the message.

    Raises:
      ValueError: for a type that is not read.
    """
    known = formats()
    if not isinstance(peft_type, str) or peft_type not in known:
        raise ValueError(f"{where}: peft_type {shown(peft_type)} is not one that jpeft reads: {', '.join(sorted(known))}.")
    return known[peft_type]


def format_for(method: str) -> Format | None:
    """The format that holds a method; None if there is none."""
    return next((each for each in formats().values() if method in each.methods), None)
