"""The rows of a comparison: each is a method with its options and a learning rate, written as one line of text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jpeft
from jpeft.core.options import Positive, fits, shown
from jpeft.training.config import parse_options
from jpeft.training.options import check_method
from jpeft.training.statistics import FULL_LEARNING_RATE


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      method: Name of the method.
      options: As `TrainConfig.options`.
      learning_rate: Peak learning rate.
    """

    method: str
    options: tuple[str, ...]
    learning_rate: float

    @property
    def label(self) -> str:
        """The row's name: its text on the command line, with the learning rate only if it is not the default.

        >>> Row("lora", ("target=['query','value']",), 0.003).label
        'lora target=query,value'
        >>> Row("freeze", ("top=0",), 0.004).label
        'head only'
        """
        rate = "" if self.learning_rate == usual_rate(self.method, self.options) else f"learning_rate={self.learning_rate:g}"
        baseline = _baseline(self.method, self.options)
        parts = [baseline.name] if baseline else [self.method, *map(_plain, self.options)]
        return " ".join([*parts, rate]).strip()

    @property
    def family(self) -> str:
        """The method's family, or "baseline"."""
        return "baseline" if self.is_baseline else jpeft.methods()[self.method].family

    @property
    def is_baseline(self) -> bool:
        """Whether the row is a baseline."""
        return _baseline(self.method, self.options) is not None

    @property
    def rank(self) -> tuple[int, int, str]:
        """Sort key of rows: the head alone, the methods in the order of `jpeft.methods`, full fine-tuning."""
        if self.is_baseline:
            return (-1 if _baseline(self.method, self.options) == BASELINES["head-only"] else 1, 0, self.label)
        return 0, list(jpeft.methods()).index(self.method), self.label

    def folder(self, seed: int) -> str:
        """Return the name of the run's folder, a readable one that differs for each method, options, learning rate and seed.

        It has letters, digits and `=.,+-_` alone, so that no program takes it for a pattern.

        >>> Row("lora", ("rank=4",), 0.002).folder(1)
        'lora-rank=4-0.002-1'
        >>> Row("lora", ("target=['query','value']",), 0.002).folder(1)
        'lora-target=query,value-1c3609-0.002-1'
        """
        return self._folder(seed, lambda text: re.sub(r"[^A-Za-z0-9=.,+_-]+", "_", re.sub(r"[][(){}'\"]", "", text)))

    def former_folder(self, seed: int) -> str:
        """Return the name that earlier versions gave the same folder."""
        return self._folder(seed, lambda text: re.sub(r"[^\w=.,+\[\]'-]", "_", text))

    def _folder(self, seed: int, plain: Callable[[str], str]) -> str:
        text = "-".join(self.options) or "default"
        safe = plain(text)[:100]
        if safe != text:
            safe += f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        return f"{self.method}-{safe}-{self.learning_rate:g}-{seed}"


class Baseline(NamedTuple):
    """A row that is written by its name."""

    name: str
    method: str
    options: tuple[str, ...]
    learning_rate: float


ALL = "all"
# The default learning rate of `freeze` suits top layers: a head alone can take larger steps, a whole model needs smaller ones.
BASELINES = {
    "head-only": Baseline("head only", "freeze", ("top=0",), 4e-3),
    "full": Baseline("full fine-tuning", "freeze", ("target=.*",), FULL_LEARNING_RATE),
}


def _baseline(method: str, options: Sequence[str]) -> Baseline | None:
    return next((row for row in BASELINES.values() if (row.method, row.options) == (method, tuple(options))), None)


def usual_rate(method: str, options: Sequence[str]) -> float:
    """Return the default learning rate of a row."""
    if baseline := _baseline(method, options):
        return baseline.learning_rate
    known: Any = jpeft.methods()[method].factory
    return known.rates_for(parse_options(options)).learning_rate


def parse_row(text: str, learning_rate: float | None = None) -> Row:
    """Return a row from its text: a method or a baseline, its options as NAME=VALUE, and perhaps `learning_rate=...`.

    Args:
      text: Such as "lora rank=4 target=['query', 'value']". A value may contain spaces.
      learning_rate: Learning rate of rows that name none; by default `usual_rate`.

    Raises:
      ValueError: for a method, or an option of it, that does not exist.

    >>> parse_row("lora rank=4 learning_rate=1e-3")
    Row(method='lora', options=('rank=4',), learning_rate=0.001)
    >>> parse_row("head-only").options
    ('top=0',)
    >>> parse_row("hard_prompt tokens='Name the topic:'").label
    "hard_prompt tokens='Name the topic:'"
    """
    method, *options = re.split(r"\s+(?=[A-Za-z_]\w*=)", text.strip())
    if baseline := BASELINES.get(method):
        method, options = baseline.method, [*baseline.options, *options]
    values = parse_options(options)
    rate = values.pop("learning_rate", None)
    if rate is not None and not fits(rate, Positive):
        raise ValueError(f"Row {text!r}: learning_rate={shown(rate)} is not a positive number.")
    check_method(method, values)  # a mistyped option is found now and not after hours of other rows
    kept = tuple(option for option in options if not option.startswith("learning_rate="))
    return Row(method, kept, float(rate or learning_rate or usual_rate(method, kept)))


def parse_rows(texts: Sequence[str], learning_rate: float | None = None) -> list[Row]:
    """Return the rows in the given order. "all" adds the baselines and every method with its defaults, and sorts the rows.

    Raises:
      ValueError: for a bad row, or one that is given twice.
    """
    rows = [parse_row(text, learning_rate) for text in texts if text != ALL]
    for i, row in enumerate(rows):
        if row in rows[:i]:
            raise ValueError(f"The row {row.label!r} is given twice.")
    if ALL not in texts:
        return rows
    every = [parse_row(text, learning_rate) for text in ("head-only", *jpeft.methods(), "full")]
    return sorted({*rows, *every}, key=lambda row: row.rank)


def _plain(option: str) -> str:
    """Return `target=['query','value']` as `target=query,value`."""
    ((name, value),) = parse_options([option]).items()
    return f"{name}={','.join(map(str, value))}" if isinstance(value, (list, tuple)) else option
