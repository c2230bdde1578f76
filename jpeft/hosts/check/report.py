"""What a check found, as data and as text."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jpeft.core.method import Method

Verdict = Literal["ok", "BAD", "-"]
SHOWN = 8  # paths in a line


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
      what: What it is.
      verdict: "ok", "BAD", or "-" for what is said but not judged.
      text: What was found, in one line; of what is bad, also how to mend it.
    """

    what: str
    verdict: Verdict
    text: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jpeft.check` found. ``print`` it.

    Attributes:
      method: The method.
      findings: What was looked at, in order.
      adapted: Parameters of the base that take another value, or whose layers compute with leaves beside them.
      added: Modules that the method adds leaves to.
      left: Parameters with two axes or more that the method leaves as they are.
      dead: Leaves of the adapter without a gradient.
      unread: Parameters of the base that the model does not read for these inputs.
      begins: How far a new adapter moves the outputs, relative to them; None if it was not looked at.
      effect: The same for an adapter with noise on all its leaves.
      merge: How far merged and wrapped outputs are apart with that noise, relative to them; None for a method that does not merge.
      passes: What the adapter's gradient costs, in forward passes of the model as it is.
      full_cost: Kernels whose whole gradient is formed for it, as full fine-tuning forms it.
    """

    method: Method
    findings: tuple[Finding, ...]
    adapted: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    begins: float | None = None
    effect: float | None = None
    merge: float | None = None
    passes: float | None = None
    full_cost: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is bad, a line for each."""
        return tuple(f"{finding.what}: {finding.text}" for finding in self.findings if finding.verdict == "BAD")

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return not self.problems

    def raise_if_bad(self) -> "Report":
        """Return the report if nothing is bad.

        Raises:
          ValueError: with the problems.
        """
        if not self.ok:
            raise ValueError(f"{self.method!r} does not work as it should on this model. {' '.join(self.problems)}")
        return self

    def __str__(self) -> str:
        """A line for each finding."""
        width = max(len(finding.what) for finding in self.findings)
        lines = [f"{finding.verdict:<4} {finding.what:<{width}}  {finding.text}" for finding in self.findings]
        return "\n".join([repr(self.method), *lines])


def named(paths: Sequence[str]) -> str:
    """Paths in a line, equal ones of numbered layers together.

    >>> named(["layer_0/up/kernel", "layer_1/up/kernel", "head/kernel"])
    'layer_*/up/kernel (2), head/kernel'
    """
    counts: dict[str, int] = {}
    for path in paths:
        pattern = re.sub(r"(?<![A-Za-z])\d+(?=/|$)|(?<=_)\d+(?=/)", "*", path)
        counts[pattern] = counts.get(pattern, 0) + 1
    shown = [f"{pattern} ({count})" if count > 1 else next(p for p in paths if _is(p, pattern)) for pattern, count in counts.items()]
    more = f", and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _is(path: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), path) is not None
