"""What a training run shows: a bar on a terminal, occasional lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@runtime_checkable
class Reporter(Protocol):
    """Told about every step by the trainer."""

    def start(self, total: int, step: int) -> None:
        """The run has `total` steps and begins after `step` of them."""

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """`step` steps are done; the mean loss, the newest validation metric (text) and examples per second."""

    def message(self, text: str) -> None:
        """One line that stays."""

    def stop(self) -> None:
        """The run is over or interrupted."""


class BarReporter:
    """A progress bar with loss, validation metric, samples per second and time left."""

    def __init__(self, console: Console | None = None):
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, total: int, step: int) -> None:
        """Draws the bar."""
        self._task = self._bar.add_task("train", total=total, completed=step, loss="-", metric="", rate="")
        self._bar.start()

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", metric=metric, rate=f"{rate:.0f} samples/s")

    def message(self, text: str) -> None:
        """Prints above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()


class LineReporter:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, seconds: float = 5.0):
        self._seconds = seconds
        self._last = -seconds

    def start(self, total: int, step: int) -> None:
        """Remembers where the run starts, for the time left."""
        self._total, self._first, self._begun = total, step, time.monotonic()

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Prints, if the last line is old enough or the run is done."""
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
        """Prints."""
        print(text, flush=True)

    def stop(self) -> None:
        """Nothing to tidy."""


class SilentReporter:
    """Shows nothing."""

    def start(self, total: int, step: int) -> None:
        """Nothing."""

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


def reporter(kind: str) -> Reporter:
    """The reporter for `bar`, `lines`, `none`, or `auto`: a bar if standard output is a terminal, else lines."""
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "lines"
    return {"bar": BarReporter, "lines": LineReporter, "none": SilentReporter}[kind]()
