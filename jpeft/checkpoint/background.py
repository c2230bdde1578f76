"""The errors of Orbax: said once, and short. What it prints from its threads beside the error that it raises is kept off the screen.

When one of Orbax's reads or writes fails, it raises that error and closes its event loop, while the others go on and then find no loop; and
its threads log the same error, each with a traceback.
"""

from __future__ import annotations

import logging
import sys
from typing import Any


class QuietOrbax:
    """Drops Orbax's own reports of errors until it is closed; after an error, those of its unfinished reads and writes also later.

    >>> with QuietOrbax():
    ...     logging.getLogger("absl").error("shown: it does not come from Orbax")
    """

    def __init__(self) -> None:
        self._logger = logging.getLogger("absl")
        self._logger.addFilter(_is_of_others)
        self._before = sys.unraisablehook
        self._installed = not hasattr(self._before, "passes_on_to")
        if self._installed:
            sys.unraisablehook = _without_closed_loops(self._before)

    def __enter__(self) -> QuietOrbax:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(failed=error[0] is not None)

    def close(self, *, failed: bool = False) -> None:
        """Let Orbax speak again.

        Args:
          failed: Whether it raised an error, so that some of its reads or writes may still be going on.
        """
        self._logger.removeFilter(_is_of_others)
        if self._installed and not failed and getattr(sys.unraisablehook, "passes_on_to", None) is self._before:
            sys.unraisablehook = self._before


def in_short(error: BaseException) -> str:
    """Return an error's type and message; of a long one the beginning, which says what failed, and the end, which says why.

    >>> in_short(ValueError("a" * 500 + ": disk full"))[-20:]
    'aaaaaaaaa: disk full'
    """
    message = " ".join(str(error).split()).rstrip(".")
    if len(message) > 330:
        message = f"{message[:130]} ... {message[-200:]}"
    return f"{type(error).__name__}: {message}"


def _is_of_others(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _without_closed_loops(before: Any) -> Any:
    """Return a hook for errors that nothing can raise, which drops those of a closed event loop and passes on all others."""

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    hook.passes_on_to = before  # pyright: ignore[reportFunctionMemberAccess]
    return hook
