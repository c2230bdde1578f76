"""Room on Python's call stack for tracing a deep model."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Entries of the stack that a call of `with_room` asks for. As much again is left for the calls inside.
_ROOM = 2**15


def with_room(fn: Callable[[], T]) -> T:
    """Return ``fn()``, run where the calls inside find their place on the stack at once.

    CPython keeps frames in chunks of 16 KiB. It asks the system for a chunk when a call crosses the end of the last one, and gives it back
    when the call returns. A model is traced by hundreds of thousands of calls at about the same depth, a hundred deep; where that depth
    lies at the end of a chunk, tracing takes up to twice the time. A call that asks for more than a chunk gets one of its own, with room
    for all calls inside.
    """
    return fn()


with_room.__code__ = with_room.__code__.replace(co_stacksize=_ROOM)
