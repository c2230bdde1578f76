"""Old spellings that keep working, with a warning."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a name has changed."""
    warnings.warn(f"{old} is now called {new}; the old name will be removed.", DeprecationWarning, stacklevel=stacklevel)


def renamed_fields(**names: str) -> Callable[[C], C]:
    """Decorate a dataclass some of whose fields have new names, ``old="new"``.

    The old names keep working as keyword arguments and as attributes, each with a `DeprecationWarning`.

    >>> import dataclasses, warnings
    >>> @renamed_fields(rate="lr_scale")
    ... @dataclasses.dataclass
    ... class Group:
    ...     lr_scale: float = 1.0
    >>> with warnings.catch_warnings(record=True):
    ...     warnings.simplefilter("always")
    ...     Group(rate=0.5).lr_scale
    0.5
    """

    def decorate(cls: C) -> C:
        init = cls.__init__

        @functools.wraps(init)
        def accept_old(self: Any, *args: Any, **options: Any) -> None:
            for old, new in names.items():
                if old in options:
                    warn_renamed(f"{cls.__name__}({old}=...)", f"{new}=")
                    options[new] = options.pop(old)
            init(self, *args, **options)

        cls.__init__ = accept_old
        for old, new in names.items():
            setattr(cls, old, property(functools.partial(_read, cls.__name__, old, new)))
        return cls

    return decorate


def renamed_members(module: str, **names: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that finds its functions and classes under their old names, ``old="new"``.

    Args:
      module: `__name__` of the module.
      **names: New name of each old name.

    Example: `__getattr__ = renamed_members(__name__, from_first="on_first_process")`.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return __getattr__


def _read(cls: str, old: str, new: str, self: Any) -> Any:
    warn_renamed(f"{cls}.{old}", f"{cls}.{new}")
    return getattr(self, new)
