"""Progress display of a training run: a bar on a terminal, occasional lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Protocol, runtime_checkable

from jpeft.extras import explained

with explained():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@runtime_checkable
class Reporter(Protocol):
    """Receives the progress of a run from the trainer."""

    def start(self, total: int, step: int) -> None:
        """Begin: the run has `total` steps, of which `step` are done."""

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Show the number of finished steps, mean loss, newest validation metric (as text) and examples per second."""

    def message(self, text: str) -> None:
        """Show a line that stays."""

    def stop(self) -> None:
        """End: the run is finished or interrupted."""


class BarReporter:
    """A progress bar with loss, validation metric, samples per second and time left."""

    def __init__(self, console: Console | None = None):
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, total: int, step: int) -> None:
        """Draw the bar."""
        self._task = self._bar.add_task("train", total=total, completed=step, loss="-", metric="", rate="")
        self._bar.start()

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", metric=metric, rate=f"{rate:.0f} samples/s")

    def message(self, text: str) -> None:
        """Print above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


class LineReporter:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, seconds: float = 5.0):
        self._seconds = seconds
        self._last = -seconds

    def start(self, total: int, step: int) -> None:
        """Remember the beginning, to estimate the time left."""
        self._total, self._first, self._begun = total, step, time.monotonic()

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Print, if the last line is old enough or the run is done."""
        now = time.monotonic()
        if now - self._last < self._seconds and step < self._total:
            return
        self._last = now
        left = (now - self._begun) / max(step - self._first, 1) * (self._total - step)
        parts = [
            f"step {step}/{self._total}",
            f"loss {loss:.4f}",
            metric,
            f"{rate:.0f} samples/s",
            f"{left:.0f} s left",
        ]
        self.message("  ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """Print."""
        print(text, flush=True)

    def stop(self) -> None:
        """Do nothing."""


class SilentReporter:
    """Shows nothing."""

    def start(self, total: int, step: int) -> None:
        """Do nothing."""

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


def reporter(kind: str) -> Reporter:
    """Return the reporter for `bar`, `lines`, `none`, or `auto`: a bar if standard output is a terminal, else lines."""
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "lines"
    return {"bar": BarReporter, "lines": LineReporter, "none": SilentReporter}[kind]()
