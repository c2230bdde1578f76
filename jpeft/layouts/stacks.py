"""Stacks: modules of one kind that follow each other, numbered or stacked on an axis of their leaves."""

import dataclasses
import re
from collections.abc import Mapping

from jpeft.tree.paths import Path

Shapes = Mapping[Path, tuple[int, ...] | None]  # None: not known

# A container whose modules share one subtree (`nn.scan`): no number follows its name.
STACKED = r"(?P<stack>(.*/)?(layers?|blocks?|h|stack|(encoder|encoderdecoder)block|Scan[A-Z]\w*_\d+))/(?!\d+(/|$)).*"
_STACKED = re.compile(STACKED)
_NUMBERED = re.compile(r"(?P<stack>.*?[^/\d])(?P<separator>[_/])(?P<index>\d+)/.*")


@dataclasses.dataclass(frozen=True)
class Stack:
    """Modules of one kind, such as a model's blocks.

    Attributes:
      path: Of the container, ``transformer/h``; or what stands in front of each number, ``layer`` for ``layer_0``.
      count: How many modules there are.
      axis: The axis of each leaf on which the modules are stacked; None if they are numbered.
      leaves: The number of each leaf's module; None where a leaf holds those of all.
    """

    path: str
    count: int
    axis: int | None
    leaves: dict[Path, int | None]


def stacks(shapes: Shapes) -> list[Stack]:
    """All stacks of a tree: candidates for its blocks, as names and shapes alone show them.

    Of numbers in a path the first counts, so experts in a block are no stack. Modules are stacked only if their leaves share an axis.

    >>> [(stack.path, stack.count, stack.axis) for stack in stacks({"layers/up/kernel": (3, 8, 16), "layers/ln_1/scale": (3, 8)})]
    [('layers', 3, 0)]
    >>> [(stack.path, stack.count, stack.axis) for stack in stacks({"h_0/up/kernel": (8, 16), "h_1/up/kernel": (8, 16)})]
    [('h', 2, None)]
    """
    groups: dict[str, list[Path]] = {}
    for path in shapes:
        if match := _STACKED.fullmatch(path):
            groups.setdefault(match["stack"], []).append(path)
    found = []
    for name, paths in groups.items():
        axis, count = _shared_axis([shapes[path] for path in paths])
        if axis is not None:
            found.append(Stack(name, count, axis, dict.fromkeys(paths)))
    taken = {path for stack in found for path in stack.leaves}
    numbered: dict[tuple[str, str], dict[Path, int | None]] = {}
    for path in shapes:
        if path not in taken and (match := _NUMBERED.fullmatch(path)):
            numbered.setdefault((match["stack"], match["separator"]), {})[path] = int(match["index"])
    for (name, _), leaves in numbered.items():
        numbers = set(leaves.values())
        if numbers == set(range(len(numbers))):
            found.append(Stack(name, len(numbers), None, leaves))
    return found


def _shared_axis(shapes: list[tuple[int, ...] | None]) -> tuple[int | None, int]:
    """The first of the two leading axes that has one size in all leaves, and that size. MaxText stacks on axis 1."""
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return 0, 0
    for axis in (0, 1):
        sizes = {shape[axis] if len(shape) > axis else None for shape in known}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            return axis, size
    return None, 0
