"""Which axis of a subtree's leaves is that of stacked modules, if any.

In an ordinary module leaves may share a size by chance, the width above all. So a shared axis alone says nothing: a sign is needed. Biases
and scales have an axis more than those of an ordinary layer, or two kernels fit each other as those of a feed-forward layer only without
the axis, or the container has a name that such containers usually have.
"""

import re
from collections.abc import Callable, Container, Mapping

Leaves = Mapping[str, tuple[int, ...] | None]  # by their paths in the container

# Names of containers whose modules share one subtree.
STACKED_NAME = r"(\w+_)?layers?|(\w+_)?blocks?|h|stack|(encoder|encoderdecoder|decoder)block|Scan[A-Z]\w*_\d+"

# What is stacked in these are no layers that follow each other.
NO_LAYERS = re.compile(r"(?i)expert|ensembl|^vmap")

_NORM = re.compile(r"(?i)(.*/)?([^/]*norm[^/]*|ln(_?\w+)?)")
_AXES = (0, 1, -1)


def axis_of(name: str, leaves: Leaves, outside: Callable[[], Container[int]] = frozenset) -> tuple[int, int] | None:
    """The axis on which modules are stacked in a container of this name, and how many there are; None if it holds no stack.

    Args:
      name: Of the container.
      leaves: The shapes of its leaves.
      outside: The sizes of leaves outside. The width of the modules is among them, where two axes could be that of the stack.

    >>> axis_of("decoder", {"mlp/wi/kernel": (8, 3, 16), "mlp/wo/kernel": (16, 3, 8), "norm/scale": (8, 3)})
    (1, 3)
    >>> axis_of("attention", {"query/kernel": (8, 2, 4), "query/bias": (2, 4), "out/kernel": (2, 4, 8), "out/bias": (8,)}) is None
    True
    """
    is_named = has_container_name(name, leaves)
    known = {path: shape for path, shape in leaves.items() if shape is not None}
    if not known:
        return (0, 0) if is_named and leaves else None
    modules = {path.rpartition("/")[0] for path in leaves}
    if NO_LAYERS.search(name) or (not is_named and len(modules) < 2):
        return None
    found = []
    for axis in _AXES:
        count = _shared_size(known, axis)
        if count is None or (count < 2 and not is_named):
            continue
        signs = [_sign(path, known, axis) for path in known]
        if -1 not in signs:
            found.append((sum(signs) + 2 * _has_pair(known, axis), axis, count))
    found = [(signs, axis, count) for signs, axis, count in found if signs > 0 or is_named]
    if not found:
        return None
    if len(found) > 1:
        sizes = outside()
        widths = lambda axis: {_without(shape, axis)[0] for path, shape in known.items() if path.endswith("scale") and len(shape) == 2}
        found = [(signs + any(width in sizes for width in widths(axis)), axis, count) for signs, axis, count in found]
    _, axis, count = max(found, key=lambda entry: entry[0])  # of equal ones, the first axis
    return axis, count


def has_container_name(name: str, leaves: Leaves) -> bool:
    """Whether a subtree has the name of such a container, and no numbered modules in it."""
    return re.fullmatch(STACKED_NAME, name) is not None and not any(re.match(r"\d+(/|$)", path) for path in leaves)


def _shared_size(leaves: Mapping[str, tuple[int, ...]], axis: int) -> int | None:
    """The size of an axis in all leaves; None if it differs, or a leaf has no such axis."""
    sizes = {shape[axis] if len(shape) > (0 if axis < 0 else axis) else None for shape in leaves.values()}
    return sizes.pop() if len(sizes) == 1 else None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    at = axis % len(shape)
    return shape[:at] + shape[at + 1 :]


def _sign(path: str, leaves: Mapping[str, tuple[int, ...]], axis: int) -> int:
    """What a leaf says of the axis: 1 that it stacks modules, -1 that it does not, 0 nothing."""
    module, _, name = path.rpartition("/")
    shape = leaves[path]
    if name == "bias" and (kernel := leaves.get(f"{module}/kernel" if module else "kernel")) is not None:
        ends = lambda kernel, bias: bool(bias) and len(kernel) > len(bias) and kernel[len(kernel) - len(bias) :] == bias
        stacked, plain = len(shape) > 1 and ends(_without(kernel, axis), _without(shape, axis)), ends(kernel, shape)
        return 0 if stacked == plain else 1 if stacked else -1
    if name in ("scale", "bias") or (name in ("weight", "kernel", "w") and _NORM.fullmatch(module)):
        return 1 if len(shape) == 2 else -1 if len(shape) < 2 else 0
    if name in ("kernel", "embedding"):
        return -1 if len(shape) < 3 else 0
    return 0


def _has_pair(leaves: Mapping[str, tuple[int, ...]], axis: int) -> bool:
    """Whether all kernels have three axes, and two of them fit as those of a feed-forward layer without the axis, and not with it."""
    kernels = [
        shape for path, shape in leaves.items() if path.rpartition("/")[2] == "kernel" and not _NORM.fullmatch(path.rpartition("/")[0])
    ]
    if not kernels or any(len(shape) != 3 for shape in kernels):
        return False
    one = [_without(shape, axis) for shape in kernels]
    heads = any(a[0] == b[2] and a[1:] == b[:2] for a in kernels for b in kernels)  # [width, heads, head_dim] and [heads, head_dim, width]
    return not heads and any(a == b[::-1] and a[0] != a[1] for a in one for b in one)
