"""The two forms of a base's blocks: numbered, ``layer/0/...``, and stacked on the first axis of their leaves, ``layer/...``.

They are one model (`scan` chooses between them), and an adapter is trained on one of them. `jpeft.load` puts it onto either: a leaf of
stacked blocks is cut into a leaf for each block, or put together again, and no number changes. The indices of sparse differences count the
entries of a whole leaf, so they are counted anew.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import tree
from jpeft.core.method import Method
from jpeft.layouts.stacks import stacks
from jpeft.selective.indices import INDICES, VALUES, decode, encode
from jpeft.tree.paths import Path

Leaves = Mapping[Path, Any]
Lazy = Mapping[Path, Callable[[], Any]]  # by path, what makes the leaf: a whole base is never held twice


class OneFormError(ValueError):
    """An adapter that fits one form of its base has no other form."""


def other_form(params: tree.Params) -> tuple[tree.Params, Lazy, "Blocks"] | None:
    """The shapes of a base in its other form, its leaves one by one, and the stacks; None for a base without such stacks."""
    leaves = tree.flatten(params)
    blocks = Blocks.of(leaves)
    if not blocks.counts:
        return None
    shapes: dict[Path, Any] = {}
    made: dict[Path, Callable[[], Any]] = {}
    for path, leaf in leaves.items():
        found = blocks.find(path)
        if found is None:
            shapes[path], made[path] = leaf, lambda leaf=leaf: leaf
        elif blocks.stacked:
            stack, rest = found
            for i in range(blocks.counts[stack]):
                name = f"{stack}/{i}/{rest}"
                shapes[name] = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
                made[name] = lambda leaf=leaf, i=i: leaf[i]
        else:
            stack, (number, rest) = found[0], found[1].split("/", 1)
            if number == "0":
                parts = [leaves[f"{stack}/{i}/{rest}"] for i in range(blocks.counts[stack])]
                shapes[f"{stack}/{rest}"] = jax.ShapeDtypeStruct((len(parts), *leaf.shape), leaf.dtype)
                made[f"{stack}/{rest}"] = lambda parts=parts: jnp.stack(parts)
    return tree.unflatten(shapes), made, blocks


class Blocks:
    """The stacks of a base's blocks.

    Attributes:
      stacked: Whether blocks are stacked; otherwise they are numbered.
      counts: The number of blocks of each stack, by its path.
    """

    def __init__(self, *, stacked: bool, counts: Mapping[Path, int]):
        self.stacked, self.counts = stacked, dict(counts)

    @classmethod
    def of(cls, leaves: Leaves) -> "Blocks":
        """Find the stacks of a base. Numbered blocks count if they are alike, as only such blocks can be stacked."""
        found = stacks({path: tuple(leaf.shape) for path, leaf in leaves.items()})
        if stacked := {stack.path: stack.count for stack in found if stack.axis == 0}:
            return cls(stacked=True, counts=stacked)
        numbered = [stack for stack in found if stack.axis is None and all(path.startswith(f"{stack.path}/") for path in stack.leaves)]
        return cls(stacked=False, counts={stack.path: stack.count for stack in numbered if _alike(stack.path, stack.count, leaves)})

    def find(self, path: Path) -> tuple[Path, str] | None:
        """The stack that a leaf belongs to, and the rest of its path."""
        for stack in self.counts:
            if path.startswith(f"{stack}/"):
                return stack, path.removeprefix(f"{stack}/")
        return None


def _alike(stack: Path, count: int, leaves: Leaves) -> bool:
    """Whether numbered blocks have the same leaves, of the same shapes and dtypes."""
    blocks: list[dict[str, Any]] = [{} for _ in range(count)]
    for path, leaf in leaves.items():
        if match := re.fullmatch(rf"{re.escape(stack)}/(\d+)/(.*)", path):
            blocks[int(match[1])][match[2]] = (tuple(leaf.shape), leaf.dtype)
    return all(block == blocks[0] for block in blocks)


def convert(adapter: tree.Adapter, method: Method, base: tree.Params, target: tree.Params, blocks: Blocks) -> tree.Adapter:
    """An adapter on the other form of its base.

    Args:
      adapter: The adapter.
      method: Its method.
      base: Shapes of the base that it fits.
      target: Shapes of the base in the form that it is wanted for.
      blocks: The stacks of the wanted form.

    Raises:
      OneFormError: if its leaves at the blocks of a stack are not of one kind, so that they cannot be stacked.
    """
    shapes, wanted = tree.flatten(base), tree.flatten(target)
    new = functools.cache(lambda: _new(method, target))
    parts = {
        name: _convert(tree.flatten(part), shapes, wanted, blocks, lambda name=name: new().get(name, {}))
        for name, part in method.to_collections(adapter).items()
    }
    made = method.from_collections({name: tree.unflatten(leaves) for name, leaves in parts.items()})
    # A leaf of one number for each block has the shape that its method gives it in either form.
    try:
        expected = tree.flatten(method.expected(target, made))
    except (ValueError, TypeError) as error:
        raise OneFormError(str(error)) from error
    fits = lambda leaf, shape: shape is None or leaf.shape == shape.shape or leaf.size != shape.size
    reshaped = {path: leaf for path, leaf in tree.flatten(made).items() if not fits(leaf, expected.get(path))}
    return tree.replace(made, {path: leaf.reshape(expected[path].shape) for path, leaf in reshaped.items()})


def _new(method: Method, base: tree.Params) -> dict[str, Leaves]:
    """The shapes of a new adapter on a base, by collection and path; none where the method does not fit the base."""
    try:
        return {name: tree.flatten(part) for name, part in method.to_collections(method.expected(base, {})).items()}
    except (ValueError, TypeError):
        return {}


def _convert(leaves: Leaves, base: Leaves, target: Leaves, blocks: Blocks, new: Callable[[], Leaves]) -> dict[Path, Any]:
    """The leaves of one method on the other form of the base; `new` gives the shapes of a new adapter there."""
    pairs = {path.removesuffix(f"/{VALUES}") for path in leaves if path.endswith(f"/{VALUES}") and _is_sparse(leaves, path)}
    out: dict[Path, Any] = {}
    together: dict[Path, dict[int, Any]] = {}  # path on stacked blocks -> the leaf of each numbered block, or the pair
    for path, leaf in leaves.items():
        owner, found = path.rpartition("/")[0], blocks.find(path)
        is_pair = owner in pairs and path.endswith((f"/{VALUES}", f"/{INDICES}"))
        if is_pair and path.endswith(f"/{INDICES}"):
            continue  # with its values
        value = (decode(leaves[f"{owner}/{INDICES}"]), leaf) if is_pair else leaf
        if found is None:
            out |= _pair(owner, leaves[f"{owner}/{INDICES}"], leaf) if is_pair else {path: leaf}
        elif blocks.stacked:  # of the target
            number, _, rest = found[1].partition("/")
            together.setdefault(f"{found[0]}/{rest}", {})[int(number)] = value
        else:
            out |= _cut(found[0], found[1], value, blocks.counts[found[0]], target, is_pair=is_pair)
    for path, parts in together.items():
        out |= _stack(path, parts, blocks, base, target, new)
    return out


def _cut(stack: Path, rest: str, value: Any, count: int, target: Leaves, *, is_pair: bool) -> dict[Path, Any]:
    """A leaf of stacked blocks as a leaf for each numbered block. A leaf of fewer blocks is that of the last ones."""
    out: dict[Path, Any] = {}
    if not is_pair:
        return {f"{stack}/{i}/{rest}": value[i - count] for i in range(count - value.shape[0], count)}
    index, values = (np.asarray(part) for part in value)
    owner = rest.rpartition("/")[0]
    for i in range(count):
        size = _owner(f"{stack}/{i}/{owner}", target).size
        chosen = index // size == i
        if chosen.any():
            out |= _pair(f"{stack}/{i}/{owner}", encode(index[chosen] % size, size), jnp.asarray(values[chosen]))
    return out


def _stack(
    path: Path, parts: Mapping[int, Any], blocks: Blocks, base: Leaves, target: Leaves, new: Callable[[], Leaves]
) -> dict[Path, Any]:
    """The leaves of numbered blocks as one leaf of stacked blocks.

    Raises:
      OneFormError: if blocks without a leaf, or of another shape, are among them.
    """
    found = blocks.find(path)
    assert found is not None
    stack, rest = found
    count, numbers = blocks.counts[stack], sorted(parts)
    if isinstance(parts[numbers[0]], tuple):
        owner, whole = path.rpartition("/")[0], _owner(path, target)
        size = whole.size // count
        index = np.concatenate([np.asarray(parts[i][0], np.int64) + i * size for i in numbers])
        return _pair(owner, encode(index, whole.size), jnp.concatenate([parts[i][1] for i in numbers]))
    shapes = {parts[i].shape for i in numbers}
    # The leaves of the last blocks alone may replace a part of a stack, or be what the method makes of a stack, too.
    fits = lambda: f"{stack}/{numbers[0]}/{rest}" in base or (path in new() and new()[path].shape[0] == len(numbers))
    last = numbers == list(range(count - len(numbers), count)) and (len(numbers) == count or fits())
    if not last or len(shapes) > 1:
        what = f"is at the blocks {', '.join(map(str, numbers[:6]))} of {count}" if not last else f"has the shapes {sorted(shapes)}"
        raise OneFormError(f"'{stack}/*/{rest}' {what}, which stacked blocks cannot hold: load the base with scan=False (--scan False).")
    return {path: jnp.stack([parts[i] for i in numbers])}


def _pair(owner: Path, indices: Any, values: Any) -> dict[Path, Any]:
    return {f"{owner}/{INDICES}": indices, f"{owner}/{VALUES}": values}


def _is_sparse(leaves: Leaves, path: Path) -> bool:
    """Whether values have flat indices beside them, [digits, k], and not numbers of columns."""
    indices = leaves.get(f"{path.removesuffix(VALUES)}{INDICES}")
    return indices is not None and leaves[path].ndim == 1 and indices.ndim == 2


def _owner(path: Path, base: Leaves) -> Any:
    """The leaf of the base that an adapter's leaf stands beside."""
    while path and path not in base:
        path = path.rpartition("/")[0]
    return base[path]
