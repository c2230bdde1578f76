"""Runs an operation and records all that can be seen of it: what it returned or raised, printed, wrote, and left behind."""

import contextlib
import dataclasses
import io
import os
import signal
import stat
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class TooLong(BaseException):
    """The operation did not end in time. No Exception, so that nothing takes it for an error of its own."""


@dataclasses.dataclass
class Seen:
    """What was seen of an operation.

    Attributes:
      value: What it returned; comparable by ==. None if it raised.
      error: What it raised, or what the command line printed after "error: ".
      kind: Type of the error; "exit 2" for the command line.
      output: What it printed, standard output and standard error together, and its warnings.
      trace: The traceback, if it raised.
      changed: Paths that appeared, vanished or changed.
      appeared: Those of them that appeared.
    """

    value: Any = None
    error: str | None = None
    kind: str = ""
    output: str = ""
    trace: str = ""
    changed: tuple[str, ...] = ()
    appeared: tuple[str, ...] = ()


def watch(operation: Callable[[], Any], world: Path, *, seconds: float = 60) -> Seen:
    """Run an operation on a world."""
    seen, before = Seen(), listing(world)
    with tempfile.TemporaryFile() as file:
        with _redirected(file.fileno()), warnings.catch_warnings(record=True) as caught, _at_most(seconds):
            warnings.simplefilter("always")
            try:
                seen.value = operation()
            except (Exception, TooLong, SystemExit) as error:
                seen.kind, seen.error = type(error).__name__, str(error)
                seen.trace = "".join(traceback.format_exception(error))
        file.seek(0)
        seen.output = file.read().decode(errors="replace")
    seen.output += "".join(f"warning: {about.message}\n" for about in caught if about.category is UserWarning)
    after = listing(world)
    seen.changed = tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
    seen.appeared = tuple(sorted(after.keys() - before.keys()))
    return seen


def command(*arguments: Any) -> Callable[[], str]:
    """An operation that runs the command line; its value is what was printed on standard output."""

    def run() -> str:
        from jpeft.cli import main

        out = io.StringIO()
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
        sys.stderr.write(err.getvalue())
        if status:
            raise CommandFailed(status, err.getvalue())
        return out.getvalue()

    return run


class CommandFailed(Exception):
    """The command line ended with an exit status other than 0; the text is all of its standard error."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def listing(world: Path) -> dict[str, Any]:
    """Every path below a folder with what tells whether it was written to; of a folder, that it is one."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(world):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            about = os.lstat(path)
            kind = stat.S_IFMT(about.st_mode)
            found[os.path.relpath(path, world)] = (kind, None if kind == stat.S_IFDIR else (about.st_ino, about.st_size, about.st_mtime_ns))
    return found


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Send what this process and its libraries print to a file, and let nothing be read from the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in (0, 1, 2)]
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        for number, to in ((0, null), (1, target), (2, target)):
            os.dup2(to, number)
        with contextlib.ExitStack() as stack:
            text = stack.enter_context(open(os.dup(target), "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(text))
            stack.enter_context(contextlib.redirect_stderr(text))
            yield
    finally:
        for number, descriptor in enumerate(saved):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(null)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise TooLong(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
