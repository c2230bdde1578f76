"""Amounts of memory, and the largest number of examples that fits into one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_UNITS = {f"{letter}{middle}B": base**power for power, letter in enumerate("KMGT", 1) for middle, base in (("", 1000), ("i", 1024))} | {
    "B": 1
}
_MOST = 2**20  # multiples that are looked at
_TRIES = 10


def parse_memory(given: int | float | str) -> int:
    """Return an amount of memory in bytes.

    Raises:
      ValueError: for a number without a unit, or another unit.

    >>> parse_memory("1.5GiB"), parse_memory("16 GB"), parse_memory(2**20)
    (1610612736, 16000000000, 1048576)
    """
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", given) if isinstance(given, str) else None
    if not found or found[2].lower() not in units or not float(found[1]) > 0:
        raise ValueError(f"memory must be a positive number with a unit, such as 16GiB or 80GB, not {given!r}; units: {', '.join(_UNITS)}.")
    return int(float(found[1]) * units[found[2].lower()])


def largest_that_fits(bytes_of: Callable[[int], int], memory: int, start: int) -> int:
    """Return the largest number whose bytes are at most `memory`, up to a million; 0 if not even 1 fits.

    The bytes are nearly a straight line, so a few tries are enough; after ten of them, the largest number that is known to fit is returned.

    Args:
      bytes_of: The bytes of a number, which never fall. It is slow.
      memory: Bytes that there are.
      start: The first number to try.

    >>> largest_that_fits(lambda n: 1000 + 30 * n, 4000, start=8)
    100
    """
    tried: dict[int, int] = {}
    low, high, guess = 0, _MOST + 1, start
    while high - low > 1 and len(tried) < _TRIES:
        tried[guess] = bytes_of(guess)
        low, high = (guess, high) if tried[guess] <= memory else (low, guess)
        # A first second point; then the line through the two nearest points, but always between what fits and what does not.
        near = sorted(tried, key=lambda number: abs(tried[number] - memory))[:2]
        line = _on_line(near, tried, memory) if len(near) == 2 else guess * 2 if low else guess // 2
        guess = min(max(line, low + 1), high - 1)
    return low


def _on_line(near: list[int], tried: dict[int, int], memory: int) -> int:
    """Return the number at which a line through two points reaches the memory."""
    a, b = near
    slope = (tried[b] - tried[a]) / (b - a)
    return math.floor(a + (memory - tried[a]) / slope) if slope > 0 else _MOST
