"""Freeze: train the top layers, keep the rest."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import layouts, tree
from jpeft.core.method import Method, with_head
from jpeft.core.options import CountOrZero, Names, PathPattern, Pattern
from jpeft.tree.head import not_head
from jpeft.tree.kernels import STACKED
from jpeft.tree.select import select

_INDEXED = re.compile(r"(?P<stack>.*?[^/\d])[_/](?P<index>\d+)/(?P<rest>.*)")


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
        stack = find_layers(leaves, self.layers) if self.top else {}
        top = self._top_layers(stack, leaves)
        trained = {path: self._top_slice(leaves[path]) if index is None else tree.trained_copy(leaves[path]) for path, index in top.items()}
        outside = {path: leaf for path, leaf in leaves.items() if path not in stack}
        trained |= {path: tree.trained_copy(leaves[path]) for path in self._find_also(outside, params)}
        return with_head(trained, params, self.head)

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Replace whole leaves, and the top slice of scanned stacks."""
        del rng
        base = tree.flatten(params)
        # An adapter leaf with fewer layers than the base's [layers, ...] holds the top ones.
        below = lambda path, leaf: base[path][: -leaf.shape[0]].astype(leaf.dtype)
        whole = lambda path, leaf: leaf if leaf.shape == base[path].shape else jnp.concatenate([below(path, leaf), leaf])
        return tree.replace(params, {path: whole(path, leaf) for path, leaf in tree.flatten(adapter).items()})

    def count_changed(self, params: tree.Params, adapter: tree.Adapter) -> int:
        """The size of the adapter, as a slice of a stack changes the slice only."""
        del params
        return tree.size(adapter)

    def _top_layers(self, stack: dict[str, int | None], leaves: dict[str, Any]) -> dict[str, int | None]:
        """The part of the stack that belongs to the top layers."""
        depths = {leaves[path].shape[:1] for path, index in stack.items() if index is None}
        if len(depths) > 1 or () in depths:
            raise ValueError(
                f"freeze: the leaves below {next(iter(stack)).rpartition('/')[0]!r} do not share a leading axis, so they are no stack of "
                "layers. Say where the layers are with layers=r'...(\\d+)...', or name the leaves with target=...."
            )
        total = depths.pop()[0] if depths else 1 + max((i for i in stack.values() if i is not None), default=-1)
        if self.top > total:
            raise ValueError(f"freeze: top={self.top}, but the model has {total} layers.")
        return {path: index for path, index in stack.items() if index is None or index >= total - self.top}

    def _top_slice(self, leaf: Any) -> Any:
        return tree.trained_copy(leaf[leaf.shape[0] - self.top :])

    def _find_also(self, outside: dict[str, Any], params: tree.Params) -> list[str]:
        """The leaves outside the stack of layers that the option `also` names."""
        if self.also == "auto":
            return layouts.find(outside, "@pooler|@final_norm", required=False) if self.top else []
        return select(outside, self.also, option="also", params=params) if self.also is not None else []


def find_layers(leaves: dict[str, Any], pattern: str | None) -> dict[str, int | None]:
    """The leaves of the stack of layers, each with the index of its layer; None for a leaf that holds all layers.

    Args:
      leaves: The base's leaves by path.
      pattern: A regex with one group for the index; None to look for the stack with the most parameters.

    Raises:
      ValueError: if there is no stack, or there are several of equal size.
    """
    if pattern is not None:
        return _match_layers(leaves, pattern)
    # Candidates by (name, whether indexed). A path may be in two: `layers/ln_1` is in a scanned stack `layers`, or in layers called `ln`.
    stacks: dict[tuple[str, bool], dict[str, int | None]] = {}
    for path in leaves:
        if m := _INDEXED.fullmatch(path):
            stacks.setdefault((m["stack"], True), {})[path] = int(m["index"])
        if m := re.fullmatch(STACKED, path):
            stacks.setdefault((m["stack"], False), {})[path] = None
    # Indices of layers are 0, 1, 2, ... without a gap.
    stacks = {key: paths for key, paths in stacks.items() if not key[1] or set(paths.values()) == set(range(len(set(paths.values()))))}
    # Of equal sizes, an indexed stack is preferred.
    sizes = {key: (sum(leaves[path].size for path in paths), key[1]) for key, paths in stacks.items()}
    largest = [key for key, size in sizes.items() if size == max(sizes.values())]
    if len(largest) != 1:
        what = f"several stacks of equal size, {[name for name, _ in largest]}" if largest else "no numbered or stacked layers"
        raise ValueError(
            f"freeze: found {what}. Say which with layers=r'encoder/layer/(\\d+)/', or name the leaves with target=...; "
            f"parameters begin with {list(leaves)[:5]}."
        )
    return stacks[largest[0]]


def _match_layers(leaves: dict[str, Any], pattern: str) -> dict[str, int | None]:
    """The leaves whose paths a regex matches from the start, with the index in its group."""
    regex = re.compile(pattern)
    matched = {path: m[1] for path in leaves if (m := regex.match(path))}
    for path, index in matched.items():
        if index is None or not index.isdecimal():
            raise ValueError(f"freeze: the group of layers={pattern!r} holds {index!r} of '{path}', which is no index: let it be (\\d+).")
    found: dict[str, int | None] = {path: int(index) for path, index in matched.items()}
    if not found:
        raise ValueError(f"freeze: layers={pattern!r} matches none of the {len(leaves)} parameters, such as {list(leaves)[:5]}.")
    return found


freeze = Freeze
