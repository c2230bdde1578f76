"""What an option may be besides its type: the range of a number, a regex that compiles, a geometry that names each axis once."""

import abc
import dataclasses
import math
import re
from typing import Any, ClassVar, Literal

from jpeft.layouts.roles import is_role, parse

Number = int | float

LARGEST = 2**31 - 1  # of whole numbers: shapes and indices are counted in 32 bits
WIDEST = 2**20  # of ranks, widths and other counts: no model has wider layers, and larger leaves only exhaust the memory
LONGEST = 100_000  # of prompts and prefixes, in rows
FINITE = 3.4028234663852886e38  # the largest float32; options are computed with in float32
TINY = 1.1754943508222875e-38  # the smallest one above zero


class Limit(abc.ABC):
    """A limit in an `Annotated` type.

    Attributes:
      words: What the value is, in place of the name of its type; None if the limit only adds to that name.
    """

    words: ClassVar[str | None] = None

    def __contains__(self, value: Any) -> bool:
        """Whether a value of the right type keeps the limit."""
        return self.problem(value) is None

    @abc.abstractmethod
    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow its name; an empty text if the limit's own words say it, None if nothing is wrong."""


class NotEmpty(Limit):
    """A list that may not be empty."""

    def problem(self, value: Any) -> str | None:
        """Nothing, if the list has items."""
        return None if value else ""

    def __str__(self) -> str:
        """The limit in words."""
        return "(not empty)"


@dataclasses.dataclass(frozen=True)
class Range(Limit):
    """The numbers that an option may take: from `low` to `high`, without an end that is `open`."""

    low: Number = -math.inf
    high: Number = math.inf
    open: Literal["neither", "low", "high", "both"] = "neither"

    def problem(self, value: Number) -> str | None:
        """Nothing, if a finite number lies in the range."""
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        if is_finite(value) and above and below:
            return None
        return f"is too large: it must be at most {self.high:,}" if not below and self.high >= LONGEST else ""

    def __str__(self) -> str:
        """The range in words, to follow the name of a type. Ends that only keep memory safe are left out."""
        low = f"above {self.low:g}" if self.open in ("low", "both") else f"of at least {self.low:g}"
        high = f"below {self.high:g}" if self.open in ("high", "both") else f"at most {self.high:g}"
        ends = ((low, math.isfinite(self.low)), (high, self.high < LONGEST))
        return " and ".join(words for words, is_end in ends if is_end)


@dataclasses.dataclass(frozen=True)
class Regex(Limit):
    """A regular expression that compiles.

    Attributes:
      roles: Whether it may also be a role, ``"@ffn_out"``.
    """

    roles: bool = True

    words = "a regex"

    def problem(self, value: str) -> str | None:
        """Nothing, if it compiles, or names roles that exist."""
        if not value.strip():
            return "is empty: it must be a regex or a name"
        if is_role(value):
            return _role_problem(value) if self.roles else "is a role, which only a whole model shows: a rule is for single paths"
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            return f"is not a regular expression: {error}"
        return None


class Name(Limit):
    """The name of a module or a leaf, the end of a path, or a role."""

    words = "a name"

    def problem(self, value: str) -> str | None:
        """Nothing, if there is a name, or roles that exist."""
        if not value.strip():
            return "holds an empty name"
        return _role_problem(value) if is_role(value) else None


class Geometry(Limit):
    """The axes of a kernel: stack, inputs and outputs, each axis in one of them."""

    words = "a jpeft.KernelAxes"

    def problem(self, value: tuple[tuple[int, ...], ...]) -> str | None:
        """Nothing, if there are three groups of different axes."""
        axes = [axis for group in value for axis in group]
        if len(value) == 3 and sorted(axes) == list(range(len(axes))):
            return None
        return "must be rules (regex, KernelAxes(stack, inputs, outputs)), where each axis of the kernel stands in one of the three"


def is_finite(value: Number) -> bool:
    """Whether a number is one in float32 too.

    >>> is_finite(1e30), is_finite(1e300), is_finite(10**400), is_finite(float("nan"))
    (True, False, False, False)
    """
    return value == 0 or TINY <= abs(value) <= FINITE


def _role_problem(target: str) -> str | None:
    try:
        parse(target)
    except ValueError as error:
        return f"is no target: {str(error).removesuffix('.')}"
    return None
