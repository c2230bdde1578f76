"""A process for each case, one after another, until the time is over."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from steps.cases import Case, Size

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


def in_this_process(case: Case, size: Size) -> Iterator[Line]:
    """Yield the lines of a case; one that says why, if it fails."""
    try:
        yield from _module(case).run(case, size)
    except Exception as error:
        yield case.line(failed=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def child(case: Case, size: Size) -> None:
    """Run a case in the process that `in_processes` started: import, wait for the word to go, print lines."""
    try:
        module = _module(case)
    except Exception as error:
        sys.stdin.readline()
        print(json.dumps(case.line(failed=f"{type(error).__name__}: {error}"[:300])), flush=True)
        return
    sys.stdin.readline()
    del module
    for line in in_this_process(case, size):
        print(json.dumps(line), flush=True)


def in_processes(
    cases: Iterable[Case], size: Size, script: str, *, seconds: float = float("inf"), ahead: bool = False, say: Callable[[Line], None]
) -> None:
    """Run each case in a process of its own.

    Args:
      cases: The cases, in order.
      size: Of their shapes.
      script: The script to start, which calls `child` when it is given ``--case NAME``.
      seconds: The time for all of them: what would not be done by then is left out, with a line that says so.
      ahead: Let the next process import its packages while this one measures. It takes a core, and nothing of the device.
      say: Called with each line as it comes.
    """
    waiting, end = list(cases), time.monotonic() + seconds
    started: dict[str, _Process] = {}
    while waiting:
        case = waiting.pop(0)
        left = end - time.monotonic()
        if left < case.seconds:
            say(case.line(skipped=f"it takes about {case.seconds} s, and {max(left, 0):.0f} s are left"))
            if case.name in started:
                started.pop(case.name).stop()
            continue
        process = started.pop(case.name, None) or _Process(case, size, script)
        if ahead and waiting:
            started[waiting[0].name] = _Process(waiting[0], size, script)
        for line in process.lines(left):
            say(line)
    for process in started.values():
        process.stop()


class _Process:
    """A process that waits for the word to go."""

    def __init__(self, case: Case, size: Size, script: str):
        self.case = case
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed when the process has ended
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, script, "--case", case.name, "--size", size]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def lines(self, seconds: float) -> Iterator[Line]:
        """Let it go, and yield its lines; one that says why, if it ends badly or takes too long."""
        timer = threading.Timer(min(seconds, 1e6), self.process.kill)
        timer.start()
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        try:
            with self.process.stdout as printed:
                for text in printed:
                    if text.startswith("{"):
                        yield json.loads(text)
        finally:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            status = self.process.wait()
            late = not timer.is_alive()
            timer.cancel()
        if status:
            self.errors.seek(0)
            last = ([text.strip() for text in self.errors.read().splitlines() if text.strip()] or [f"exit status {status}"])[-1]
            yield self.case.line(failed="the time is over" if late else last[:300])
        self.errors.close()

    def stop(self) -> None:
        """End it before it has begun."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def _module(case: Case) -> Any:
    """Return the module that runs a case, after what the imports of jpeft from its folder need."""
    if case.in_jax:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        try:
            importlib.import_module("jaxtyping")
        except ImportError:
            sys.modules["jaxtyping"] = _Unchecked("jaxtyping")
    return importlib.import_module("steps.in_jax" if case.in_jax else "steps.in_torch")


class _Unchecked(types.ModuleType):
    """Stands in for `jaxtyping`, whose annotations nothing checks here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Shaped


class _Shaped:
    """``Float[Array, "rows"]`` without the check."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Any
