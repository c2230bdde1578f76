"""Freeze: train the top layers, keep the rest."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import layouts, tree
from jpeft.core.method import Method, with_head
from jpeft.core.options import CountOrZero, Names, PathPattern, Pattern
from jpeft.layouts import Stack
from jpeft.tree.head import not_head
from jpeft.tree.select import select


class Freeze(Method):
    r"""Freeze: train the ``top`` layers nearest the output, the modules that follow them, and the task head; all else stays as it is.

    With L layers, ``theta_l' = theta_l + delta_l`` for ``l >= L - top`` and ``theta_l' = theta_l`` below. Of all selective methods, only
    this one shortens the backward pass: nothing below the lowest trained layer is differentiated. (With layers stacked by `nn.scan` the
    backward pass runs through the whole stack; there only gradients and optimizer state are limited to the trained slice.)

    Args:
      top: How many layers, counted from the output. 0 trains the head (and `also`) alone.
      layers: Regex for the paths of the layers, with a group ``(\d+)`` for the index. By default, the stack of numbered or scanned layers
        that holds the most parameters.
      also: Leaves to train besides: "auto" for the pooler and final norm that follow the layers (with ``top=0``: none), a regex, names, or
        None.
      target: Ignore layers: train exactly these paths (a regex or a list of names) and the head.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that replaces leaves, works in any framework and merges by keeping them.

    Raises:
      ValueError: for a negative `top`; from `init`, if there are fewer layers than `top`, or none, or two stacks.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {f"layer_{i}": {"kernel": jnp.ones((4, 4))} for i in range(3)} | {"ln_f": {"scale": jnp.ones(4)}}
    >>> list(jpeft.flatten(jpeft.apply(params, method="freeze", top=1).adapter))
    ['layer_2/kernel', 'ln_f/scale']

    Reference: Lee, Tang and Lin, What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning, 2019,
    https://arxiv.org/abs/1911.03090.
    """

    top: CountOrZero = 2
    layers: PathPattern | None = None
    also: Names | None = "auto"
    target: Names | None = None
    head: Pattern | None = "auto"

    name = "freeze"
    family = "selective"
    summary = "train the top layers and what follows them, freeze the rest"
    learning_rate = 5e-4
    why_no_merge = None
    begins_within = 0.0

    def check(self) -> None:
        """Refuse a regex for the layers that has no group for their index."""
        if self.layers is not None and re.compile(self.layers).groups != 1:
            raise ValueError(f"freeze: layers={self.layers!r} needs exactly one group, (\\d+), for the layer's index.")

    @classmethod
    def picks_blocks(cls, options: Mapping[str, Any]) -> bool:
        """Whether single layers are trained: the backward pass ends at the lowest of numbered layers, and runs through all stacked ones."""
        return super().picks_blocks(options) or (options.get("target") is None and options.get("top", cls.top) != 0)

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Copies of the trained leaves, of a scanned stack its top slice, and the head."""
        del key, stats
        leaves = not_head(params, self.head)
        if self.target is not None:
            chosen = {path: tree.trained_copy(leaves[path]) for path in select(leaves, self.target, params=params)}
            return with_head(chosen, params, self.head)
        stack = find_layers(leaves, self.layers) if self.top else None
        trained = {} if stack is None else self._top_layers(stack, leaves)
        trained |= {path: tree.trained_copy(leaves[path]) for path in self._find_also(stack, leaves, params)}
        return with_head(trained, params, self.head)

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Replace whole leaves, and the top slice of scanned stacks."""
        del rng
        base = tree.flatten(params)
        return tree.replace(params, {path: _with_top(base[path], leaf) for path, leaf in tree.flatten(adapter).items()})

    def count_changed(self, params: tree.Params, adapter: tree.Adapter) -> int:
        """The size of the adapter, as a slice of a stack changes the slice only."""
        del params
        return tree.size(adapter)

    def _top_layers(self, stack: Stack, leaves: dict[str, Any]) -> dict[str, Any]:
        """Copies of the top layers: leaves of numbered ones, slices of stacked ones."""
        if self.top > stack.count:
            raise ValueError(f"freeze: top={self.top}, but the model has {stack.count} layers.")
        if stack.axis is not None:
            return {path: tree.trained_copy(_top_of(leaves[path], stack.axis, self.top)) for path in stack.leaves}
        numbers = sorted({number for number in stack.leaves.values() if number is not None})
        top = numbers[len(numbers) - self.top :] if self.layers is None else range(stack.count - self.top, stack.count)
        return {path: tree.trained_copy(leaves[path]) for path, number in stack.leaves.items() if number in top}

    def _find_also(self, stack: Stack | None, leaves: dict[str, Any], params: tree.Params) -> list[str]:
        """The leaves outside the stack of layers that the option `also` names; "auto" takes none that stands in another stack."""
        outside = {path: leaf for path, leaf in leaves.items() if stack is None or path not in stack.leaves}
        if self.also != "auto":
            return select(outside, self.also, option="also", params=params) if self.also is not None else []
        if stack is None:
            return []
        in_stacks = layouts.layer_axes(leaves)
        return [path for path in layouts.find(outside, "@pooler|@final_norm", required=False) if path not in in_stacks]


def _top_of(leaf: Any, axis: int, top: int) -> Any:
    """The last layers of a leaf that holds those of all."""
    start, at = leaf.shape[axis] - top, axis % len(leaf.shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*leaf.shape[:at], top, *leaf.shape[at + 1 :]), leaf.dtype)
    return leaf[(slice(None),) * at + (slice(start, None),)]


def _with_top(base: Any, leaf: Any) -> Any:
    """The leaf of an adapter, with the layers of the base below it if it holds the top ones alone."""
    if leaf.shape == base.shape:
        return leaf
    (axis,) = (i for i, (whole, part) in enumerate(zip(base.shape, leaf.shape, strict=True)) if whole != part)
    below = base[(slice(None),) * axis + (slice(0, base.shape[axis] - leaf.shape[axis]),)]
    return jnp.concatenate([below.astype(leaf.dtype), leaf], axis)


def find_layers(leaves: dict[str, Any], pattern: str | None) -> Stack:
    """The stack of layers.

    Args:
      leaves: The base's leaves by path.
      pattern: A regex with one group for the index; None to look for the stack with the most parameters.

    Raises:
      ValueError: if there is no stack, or there are several of equal size.
    """
    if pattern is not None:
        found = _match_layers(leaves, pattern)
        return Stack("", 1 + max(found.values()), None, dict(found))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    stacks = layouts.stacks(shapes)
    # Layers of one module each, and a single one, count where there is nothing more.
    stacks = [stack for stack in stacks if stack.count > 1] or layouts.rows(shapes) or stacks
    sizes = [sum(leaves[path].size for path in stack.leaves) for stack in stacks]
    largest = [stack for stack, size in zip(stacks, sizes, strict=True) if size == max(sizes)]
    if len(largest) != 1:
        what = f"several stacks of equal size, {[stack.path for stack in largest]}" if largest else "no numbered or stacked layers"
        raise ValueError(
            f"freeze: found {what}. Say which with layers=r'encoder/layer/(\\d+)/', or name the leaves with target=...; "
            f"parameters begin with {list(leaves)[:5]}."
        )
    return largest[0]


def _match_layers(leaves: dict[str, Any], pattern: str) -> dict[str, int]:
    """The leaves whose paths a regex matches from the start, with the index in its group."""
    regex = re.compile(pattern)
    matched = {path: m[1] for path in leaves if (m := regex.match(path))}
    for path, index in matched.items():
        if index is None or not index.isdecimal():
            raise ValueError(f"freeze: the group of layers={pattern!r} holds {index!r} of '{path}', which is no index: let it be (\\d+).")
    found = {path: int(index) for path, index in matched.items()}
    if not found:
        raise ValueError(f"freeze: layers={pattern!r} matches none of the {len(leaves)} parameters, such as {list(leaves)[:5]}.")
    return found


freeze = Freeze
