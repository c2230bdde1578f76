"""Changes of what the modules of a copy return; see `jpeft.hosts.base.Host.map_outputs`. Nothing here imports NNX."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

Changes = tuple[Callable[[Any], Any], ...]

INNER = "jpeft_inner"  # the attribute of a changed method that is the method itself

_changes: contextvars.ContextVar[Changes] = contextvars.ContextVar("changes", default=())


def current_changes() -> Changes:
    """The changes that calls of models must make."""
    return _changes.get()


@contextlib.contextmanager
def changing(change: Callable[[Any], Any]) -> Iterator[None]:
    """Apply a change to the outputs of all modules that run inside."""
    token = _changes.set((*_changes.get(), change))
    try:
        yield
    finally:
        _changes.reset(token)


def changed(method: Callable[..., Any], changes: Changes) -> Callable[..., Any]:
    """A method whose outputs are changed."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = method.__get__(self, type(self))(*args, **kwargs)
        return functools.reduce(lambda out, change: change(out), changes, out)

    setattr(run, INNER, method)
    return functools.update_wrapper(run, method, updated=())
