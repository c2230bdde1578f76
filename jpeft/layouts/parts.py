"""What the blocks of a model consist of: attention, a feed-forward layer, and kernels that no role explains."""

import re
from typing import NamedTuple

from jpeft.layouts.roles import PROJECTIONS, Role
from jpeft.layouts.search import find, shapes_of
from jpeft.layouts.stacks import Stack, stacks
from jpeft.tree.paths import Params, Path

_ATTENTION = re.compile(r"(?i)att(n|ention)|mha\b|mhsa|mhdpa")
_NO_KERNEL = ("bias", "scale", "embedding", "rel_embedding", "pos_embedding")


class Parts(NamedTuple):
    """The kernels of the first block of a stack, by their paths from the block on.

    Attributes:
      stack: The stack.
      attention: What leaves attention.
      feed_forward: What leaves a feed-forward layer.
      others: Kernels without a role.
    """

    stack: Stack
    attention: list[Path]
    feed_forward: list[Path]
    others: dict[Path, tuple[int, ...] | None]

    @property
    def unread(self) -> dict[Path, tuple[int, ...] | None]:
        """The kernels that should have a role: those of attention by name, or all, where a block shows one of its two parts alone."""
        one_part = bool(self.attention) != bool(self.feed_forward)
        return {path: shape for path, shape in self.others.items() if one_part or self._is_other_attention(path)}

    def _is_other_attention(self, path: Path) -> bool:
        """Whether a kernel stands in a module that is named as attention, and that nothing is known to leave."""
        names = path.split("/")[:-1]
        at = next((i for i, name in enumerate(names) if _ATTENTION.search(name)), None)
        return at is not None and not any(found.startswith("/".join([*names[: at + 1], ""])) for found in self.attention)


def parts(params: Params) -> list[Parts]:
    """The parts of the blocks of each stack of several modules.

    >>> block = {"mix/a/kernel": (8, 8), "mix/b/kernel": (8, 8), "mlp/up/kernel": (8, 32), "mlp/down/kernel": (32, 8)}
    >>> (found,) = parts({f"cell_{i}/{name}": shape for i in range(2) for name, shape in block.items()})
    >>> found.attention, found.feed_forward, list(found.unread)
    ([], ['mlp/down/kernel'], ['mix/a/kernel', 'mix/b/kernel'])
    """
    shapes = shapes_of(params)
    roles = {role: _having(shapes, role) for role in PROJECTIONS}
    explained = set().union(*roles.values())
    attention, feed_forward = roles[Role.ATTENTION_OUT] | roles[Role.CROSS_ATTENTION_OUT], roles[Role.FFN_OUT]
    out = []
    for stack in stacks(shapes):
        if stack.count < 2:
            continue
        numbers = [number for number in stack.leaves.values() if number is not None]
        block = [path for path, number in stack.leaves.items() if number is None or number == min(numbers)]
        inside = {path: stack.shape_inside(shapes[path]) for path in block}
        widths = {shape[-1] for path in block if path in attention | feed_forward and (shape := inside[path])}
        others = {path for path in block if path not in explained and _is_kernel(path, inside[path], widths)}
        of = lambda paths, block=block, stack=stack: [stack.inside(path) for path in block if path in paths]
        out.append(Parts(stack, of(attention), of(feed_forward), {stack.inside(path): inside[path] for path in sorted(others)}))
    return out


def _having(shapes: dict[Path, tuple[int, ...] | None], role: Role) -> set[Path]:
    """The leaves with a role; none where names could mean two."""
    try:
        return set(find(shapes, role, required=False))
    except ValueError:
        return set()


def _is_kernel(path: Path, shape: tuple[int, ...] | None, widths: set[int]) -> bool:
    """Whether a leaf is a kernel: by its name, or as one that takes or gives the width of the model."""
    name = path.rpartition("/")[2]
    if shape is None or len(shape) < 2 or name in _NO_KERNEL:
        return False
    return name in ("kernel", "w", "weight") or bool(widths & set(shape))
