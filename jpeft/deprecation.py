"""Old names that still work: constructor keywords, attributes and module members, each with a `DeprecationWarning`."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def renamed_fields(**renames: str) -> Callable[[type[T]], type[T]]:
    """Decorate a class whose fields or methods got new names: the old ones are accepted as keywords and readable as attributes.

    Put the decorator above `dataclasses.dataclass`, on every class that has a constructor of its own. Where both spellings are given, the
    old one counts, because `dataclasses.replace(config, old=1)` passes the present value under the new name as well.

    Args:
      **renames: New name of each old name.

    Returns:
      A class decorator.

    >>> import dataclasses, warnings
    >>> @renamed_fields(rate="lr_scale")
    ... @dataclasses.dataclass
    ... class Options:
    ...   lr_scale: float
    >>> with warnings.catch_warnings():
    ...   warnings.simplefilter("ignore")
    ...   (Options(rate=2.0), Options(lr_scale=3.0).rate)
    (Options(lr_scale=2.0), 3.0)
    """

    def decorate(cls: type[T]) -> type[T]:
        if renames:
            cls.__init__ = _accepting(cls.__init__, cls.__name__, renames)
        for old, new in renames.items():
            setattr(cls, old, property(functools.partial(_read, old=old, new=new)))
        return cls

    return decorate


def renamed_members(module: str, **renames: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that finds functions and classes under their old names.

    Args:
      module: `__name__` of the module.
      **renames: New name of each old name.

    Example: `__getattr__ = renamed_members(__name__, from_first="on_first_process")`.
    """

    def __getattr__(name: str) -> Any:
        if name not in renames:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now called {renames[name]}.", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], renames[name])

    return __getattr__


def _accepting(init: Callable[..., None], owner: str, renames: dict[str, str]) -> Callable[..., None]:
    """Return `init` with its keywords translated from the old names."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **keywords: Any) -> None:
        for old, new in renames.items():
            if old in keywords:
                warnings.warn(f"{owner}({old}=...) is now spelled {owner}({new}=...).", DeprecationWarning, stacklevel=2)
                keywords[new] = keywords.pop(old)
        init(self, *args, **keywords)

    return wrapped


def _read(self: Any, *, old: str, new: str) -> Any:
    """Return the attribute that `old` named."""
    owner = type(self).__name__
    warnings.warn(f"{owner}.{old} is now called {owner}.{new}.", DeprecationWarning, stacklevel=2)
    return getattr(self, new)
