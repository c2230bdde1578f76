"""Stacks: modules of one kind that follow each other, numbered or stacked on an axis of their leaves.

A stack is found by structure. *Numbered* modules are siblings whose names differ in a number alone, ``layer_0``, ``layer_1``, and that hold
the same leaves. *Stacked* modules share one subtree, as `nn.scan` makes it, and all its leaves share an axis: `jpeft.layouts.stacked` tells
which. Of repetitions inside each other the outermost counts, so neither experts nor ``wi_0`` and ``wi_1`` are a model's layers.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

from jpeft.layouts.stacked import NO_LAYERS, STACKED_NAME, axis_of, has_container_name
from jpeft.tree.paths import Params, Path, flatten

Shapes = Mapping[Path, tuple[int, ...] | None]  # None: not known

# A path in a container whose modules share one subtree (`nn.scan`), where a path is all that is known: no number follows the name.
STACKED = r"(?P<stack>(.*/)?(layers?|blocks?|h|stack|(encoder|encoderdecoder)block|Scan[A-Z]\w*_\d+))/(?!\d+(/|$)).*"

# `layer_0`, `0`, `layer-0`, `block0`. Without a separator only numbers from 0 on count: `attn1` and `attn2` are parts of a block.
_NUMBERED = re.compile(r"(?P<name>(?:.*[^\d_-])?)(?P<separator>[_-]?)(?P<index>\d+)")

# The projections of an attention module, by what families call them: a module of nothing else is a part of a block.
_PROJECTION = re.compile(r"(w|to_)?_?(q|k|v|o|qkv|kv|query|key|value|out)(_?(proj|lin|linear|norm|einsum|attn))?(_\d+)?|c_(attn|proj)")


@dataclasses.dataclass(frozen=True)
class Stack:
    """Modules of one kind, such as a model's blocks.

    Attributes:
      path: Of the container, ``transformer/h``; or what stands in front of each number, ``layer`` for ``layer_0``.
      count: How many modules there are.
      axis: The axis of each leaf on which the modules are stacked, -1 for the last; None if they are numbered.
      leaves: The number of each leaf's module; None where a leaf holds those of all.
    """

    path: str
    count: int
    axis: int | None
    leaves: dict[Path, int | None]

    def module(self, path: Path) -> Path:
        """The path of the module that a leaf belongs to; of the container, where the modules are stacked."""
        return self.path if self.axis is not None or not self.path else path[: -len(self.inside(path)) - 1]

    def inside(self, path: Path) -> Path:
        """The path of a leaf from its module on."""
        if not self.path and self.leaves[path] is None:
            return path
        rest = path[len(self.path) :]
        return rest.removeprefix("/") if self.axis is not None or not self.path else re.sub(r"^[/_-]?\d+/", "", rest)

    def shape_inside(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The shape of a leaf in one of the modules."""
        if shape is None or self.axis is None:
            return shape
        at = self.axis % len(shape)
        return shape[:at] + shape[at + 1 :]


def stacks(shapes: Shapes) -> list[Stack]:
    """All stacks of a tree: candidates for its blocks, as names and shapes alone show them. Those on an axis come first.

    A single module that is numbered, ``layer_0`` alone, is a stack of one, unless there is a stack in it.

    >>> [(stack.path, stack.count, stack.axis) for stack in stacks({"layers/up/kernel": (3, 8, 16), "layers/ln_1/scale": (3, 8)})]
    [('layers', 3, 0)]
    >>> block = {"up/kernel": (8, 16), "wi_0/kernel": (16, 8), "wi_1/kernel": (16, 8)}
    >>> numbered = {f"h_{i}/{name}": shape for i in range(2) for name, shape in block.items()}
    >>> [(stack.path, stack.count, stack.axis) for stack in stacks(numbered)]
    [('h', 2, None)]
    """
    found = list(_visit("", dict(shapes), shapes))
    return sorted(found, key=lambda stack: stack.axis is None)


@functools.lru_cache(maxsize=32)
def _layer_axes(items: tuple[tuple[Path, tuple[int, ...] | None], ...]) -> dict[Path, int | None]:
    shapes = dict(items)
    out: dict[Path, int | None] = {}
    for stack in stacks(shapes):
        out |= dict.fromkeys(stack.leaves if stack.count > 1 else (), stack.axis)
        if stack.axis is None:  # a numbered module may hold stacked ones
            for module in {stack.module(path) for path in stack.leaves}:
                leaves = {path.removeprefix(f"{module}/"): shapes[path] for path in stack.leaves if path.startswith(f"{module}/")}
                out |= {path: found.axis for found in _visit(module, leaves, shapes) if found.axis is not None for path in found.leaves}
    return out


def layer_axes(params: Params) -> Mapping[Path, int | None]:
    """The axis of the layers for each leaf of a stack: None where its modules are numbered. Other leaves are not in it.

    >>> from jax import ShapeDtypeStruct
    >>> shapes = {"decoder/wi/kernel": (8, 3, 16), "decoder/norm/scale": (8, 3), "head/kernel": (8, 2)}
    >>> layer_axes({path: ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    {'decoder/norm/scale': 1, 'decoder/wi/kernel': 1}
    """
    return _layer_axes(tuple((path, tuple(leaf.shape)) for path, leaf in flatten(params).items() if hasattr(leaf, "shape")))


def rows(shapes: Shapes) -> list[Stack]:
    """Numbered layers of one kernel each that follow each other: the outputs of each are as many as the inputs of the next.

    So the layers of a perceptron are a row, and the two projections into a gated feed-forward layer are none.

    >>> [stack.path for stack in rows({"l_0/kernel": (8, 8), "l_1/kernel": (8, 8), "wi_0/kernel": (8, 16), "wi_1/kernel": (8, 16)})]
    ['l']
    """
    numbered: dict[tuple[str, str], dict[Path, int | None]] = {}
    for path in shapes:
        module = path.rpartition("/")[0]
        if match := re.fullmatch(r"(?P<stack>.*[^/\d])(?P<separator>[_/])(?P<index>\d+)", module):
            numbered.setdefault((match["stack"], match["separator"]), {})[path] = int(match["index"])
    found = []
    for (name, _), leaves in numbered.items():
        kernels = {number: shapes[path] for path, number in leaves.items() if len(shapes[path] or ()) > 1}
        count = len(set(leaves.values()))
        follow = [(kernels.get(i) or (0,))[-1] == (kernels.get(i + 1) or (1,))[0] for i in range(count - 1)]
        if count > 1 and set(leaves.values()) == set(range(count)) and all(follow):
            found.append(Stack(name, count, None, leaves))
    return found


def _visit(node: str, leaves: dict[str, tuple[int, ...] | None], tree: Shapes) -> Iterator[Stack]:
    """The stacks below a node of the tree, given its leaves by their paths from the node on, and those of the whole tree."""
    whole = lambda rest: f"{node}/{rest}" if node else rest
    children = _by_first(leaves)
    name = node.rpartition("/")[2]
    outside = lambda: {size for path, shape in tree.items() if not path.startswith(f"{node}/") for size in shape or ()}
    axis = axis_of(name, leaves, outside) if node else None
    # Where several containers of known names have as many layers, each is a stack.
    if axis is not None and (has_container_name(name, leaves) or (len(children) > 1 and not _holds_containers(children))):
        yield Stack(node, axis[1], axis[0], {whole(rest): None for rest in leaves})
        return
    single = []
    for name, group in _numbered(children).items():
        members = {index: children[child] for index, child in group.items()}
        others = {child: children[child] for child in children if child not in group.values()}
        if len(members) > 1 and _are_layers(name or node.rpartition("/")[2], members, others):
            path, order = whole(name).rstrip("/"), {child: index for index, child in group.items()}
            numbers = {whole(f"{child}/{rest}"): index for child, index in order.items() for rest in children[child]}
            yield Stack(path, len(members), None, {path: numbers[path] for path in map(whole, leaves) if path in numbers})
            for child in group.values():
                children.pop(child)
        elif len(members) == 1 and 0 in members and _is_layer(name or node.rpartition("/")[2], members[0]):
            single.append((whole(name).rstrip("/"), group[0]))
    for path, child in single:
        inner = list(_visit(whole(child), children[child], tree))
        if any(stack.count > 1 for stack in inner):
            yield from inner
        else:
            yield Stack(path, 1, None, {whole(f"{child}/{rest}"): 0 for rest in children[child]})
        children.pop(child)
    for child, inner in children.items():
        if "" not in inner and not NO_LAYERS.search(child):
            yield from _visit(whole(child), inner, tree)


def _by_first(leaves: dict[str, tuple[int, ...] | None]) -> dict[str, dict[str, tuple[int, ...] | None]]:
    """Leaves by the first component of their paths; a leaf at the node itself stands below "" in a child of its name."""
    out: dict[str, dict[str, tuple[int, ...] | None]] = {}
    for path, shape in leaves.items():
        first, _, rest = path.partition("/")
        out.setdefault(first, {})[rest] = shape
    return out


def _numbered(children: Mapping[str, object]) -> dict[str, dict[int, str]]:
    """The children whose names differ in a number alone, by their common name and in the order of their numbers."""
    out: dict[tuple[str, str], dict[int, str]] = {}
    for child in children:
        if (match := _NUMBERED.fullmatch(child)) and not NO_LAYERS.search(match["name"]):
            out.setdefault((match["name"], match["separator"]), {})[int(match["index"])] = child
    first = lambda separator, name: (0, 1) if separator or not name else (0,)
    return {
        name: dict(sorted(group.items()))
        for (name, separator), group in out.items()
        if min(group) in first(separator, name) and max(group) - min(group) == len(group) - 1
    }


def _is_layer(name: str, member: Mapping[str, object]) -> bool:
    """Whether a numbered module may be a layer of the model: one that holds several modules, or is called a layer."""
    return _count_modules(member) > 1 or re.fullmatch(STACKED_NAME, name.rstrip("_-")) is not None


def _are_layers(name: str, members: Mapping[int, Mapping[str, object]], others: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether numbered modules hold the same leaves, each may be a layer, and they are no parts of one block.

    Blocks may differ a little: the first of T5 has the table of positions, and every second one may have experts.
    """
    names = [frozenset(member) for member in members.values()]
    shared = frozenset.intersection(*names)
    if not all(_is_layer(name, member) for member in members.values()) or any(2 * len(shared) <= len(own) for own in names):
        return False
    # Self- and cross-attention of one block, `MultiHeadDotProductAttention_0` and `_1`, stand beside its feed-forward layer.
    is_attention = all(_PROJECTION.fullmatch(rest.split("/")[-2]) for rest in shared if "/" in rest)
    has_norm = any("norm" in rest.lower() and not re.match(r"_?(q|k|query|key)_", rest) for rest in shared)
    return not is_attention or has_norm or not any(_is_feed_forward(name, other) for name, other in others.items())


def _is_feed_forward(name: str, leaves: Mapping[str, object]) -> bool:
    """Whether a child beside attention modules may be a block's feed-forward layer, or a part of it."""
    return (
        any(rest.endswith("kernel") for rest in leaves)
        and re.search(r"(?i)mlp|ffn|feed_?forward|ff|dense|linear|wi|wo|up|down", name) is not None
    )


def _count_modules(leaves: Mapping[str, object]) -> int:
    return len({rest.rpartition("/")[0] for rest in leaves})


def _holds_containers(children: Mapping[str, Mapping[str, tuple[int, ...] | None]]) -> bool:
    """Whether stacks stand in containers of known names further in: they are stacks of their own."""
    for name, leaves in children.items():
        if "" in leaves:
            continue
        if (has_container_name(name, leaves) and axis_of(name, leaves) is not None) or _holds_containers(_by_first(dict(leaves))):
            return True
    return False
