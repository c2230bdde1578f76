"""Sites: the modules that get a bottleneck, found through parameters that show how wide their hidden state is.

A target matches *leaves*: the kernel of a projection, or the scale of a normalisation. The bottleneck works on the leaf's last axis. It is
added to the module that owns the leaf. If the regex has a named group, the bottleneck is added to the module whose path the group holds:
``(?P<block>.*)/mlp/c_proj/kernel`` adds a bottleneck of the projection's width to the block around the projection.
"""

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jpeft import layouts
from jpeft.core.options import Axes, Names
from jpeft.tree.adapters import ADDED
from jpeft.tree.head import not_head
from jpeft.tree.kernels import AxesRules, KernelAxes, axes_of, axes_rules
from jpeft.tree.paths import Params, Path, first_few, flatten
from jpeft.tree.select import select


class SiteKind(enum.Enum):
    """How the module at a site is called.

    Attributes:
      MODULE: The module takes a hidden state as its first argument and returns one.
      RESIDUAL: The module takes a hidden state x as its second argument and adds x to what it computes, as `output` in BERT does with the
        input of the feed-forward layer. The target says so by the role ``@ffn_residual``, or by a group of the name ``residual``.
    """

    MODULE = "module"
    RESIDUAL = "residual"


class BottleneckSite(NamedTuple):
    """A module that gets a bottleneck, or all the modules that one `nn.scan` stacks.

    Attributes:
      path: Path of the module.
      leaf: Path of the parameter that the target matched.
      width: Size of the hidden state's last axis.
      stack: Sizes of the stack axes: () or (layers,).
      kind: How the module is called.
      axis: The first axis of the stack in all leaves of the module, -1 for the last: `nn.scan` slices those of a bottleneck there, too.
    """

    path: str
    leaf: str
    width: int
    stack: tuple[int, ...]
    kind: SiteKind
    axis: int = 0

    def added(self, leaves: dict[str, Any]) -> dict[str, Any]:
        """The adapter's paths of leaves that are added to the module; `leaves` have the stack in front."""
        module = f"{self.path}/" if self.path else ""
        return {f"{module}{ADDED}/{name}": self.on_axis(leaf) for name, leaf in flatten(leaves).items()}

    def on_axis(self, leaf: Any) -> Any:
        """A leaf with the stack in front as it stands in the adapter."""
        return jnp.moveaxis(leaf, 0, self.axis) if self.stack and self.axis else leaf


def find_sites(params: Params, target: Names, *, axes: Axes | None = None, head: str | None = "auto") -> list[BottleneckSite]:
    """Find the modules that a target names.

    Args:
      params: The base.
      target: A regex, a list of names or roles, as in `jpeft.tree.select.select`, for kernels and for scales of normalisations; or roles of
        modules, such as ``"@ffn"`` and ``"@block"``.
      axes: Geometry of kernels with more than two axes, as in `jpeft.lora`.
      head: Where the task head is, which gets no bottleneck.

    Returns:
      One site for each module, in the order of the parameters.

    Raises:
      ValueError: if nothing matches, a kernel has several output axes, or two leaves of different widths name one module.
    """
    rules, layers = axes_rules(axes), layouts.layer_axes(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in not_head(params, head).items() if _shows_width(path, leaf.shape)}
    found: dict[str, BottleneckSite] = {}
    for leaf, path, kind in _named(params, shapes, target):
        if "/pooler/" in f"/{leaf}":  # BERT's pooler belongs to no block, though its `dense` may match
            continue
        width, stack, axis = _width_and_stack(leaf, shapes[leaf], rules, layers)
        first = found.setdefault(path, BottleneckSite(path, leaf, width, stack, kind, axis))
        if first.width != width:
            raise ValueError(
                f"target={target!r} matches several leaves of '{path}', '{first.leaf}' with {first.width} features and '{leaf}' with "
                f"{width}. Let it match one of them: the kernel of the module's last projection."
            )
    return list(found.values())


def check_both_parts(params: Params, sites: Sequence[BottleneckSite], head: str | None, method: str) -> None:
    """Refuse blocks of which the roles find one part alone, attention or the feed-forward layer, where there is more to find.

    Args:
      params: The base.
      sites: What the roles found.
      head: Where the task head is.
      method: Name of the method, for the message.

    Raises:
      ValueError: with what was found, and the kernels without a role; also if two parts of one block have different widths.
    """
    widths = {site.leaf: site.width for site in sites}
    for part in layouts.parts(not_head(params, head)):
        found = {path: widths[leaf] for leaf in part.stack.leaves if leaf in widths and (path := part.stack.inside(leaf))}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"'{path}' with {width} outputs" for path, width in found.items())
            raise ValueError(
                f"{method}: what leaves attention and the feed-forward layer of a block is as wide as the model. In '{part.stack.path}' "
                f"names and shapes disagree: {shown}. Name the last kernels of both with target=[...], or give the geometry with axes=."
            )
        if not part.unread:
            continue
        shown = ", ".join(f"'{path}' {shape}" for path, shape in list(part.unread.items())[:8])
        names = [path.rpartition("/")[0] or path for path in [*part.attention, *part.feed_forward, *part.unread]]
        raise ValueError(
            f"{method}: a block of '{part.stack.path}' gets a bottleneck after attention and one after its feed-forward layer. Found: "
            f"{first_few([*part.attention, *part.feed_forward]) or 'none'}. Kernels without a role: {shown}. Name the last kernels of "
            f"both, as a regex or a list, such as target={names[:2]!r}."
        )


def _named(params: Params, shapes: dict[str, tuple[int, ...]], target: Names) -> list[tuple[str, str, SiteKind]]:
    """What a target names: the leaf that tells the width, the module that gets the bottleneck, and how the module is called."""
    if isinstance(target, str) and layouts.is_role(target):
        kinds = {layouts.Role.FFN_RESIDUAL: SiteKind.RESIDUAL}
        return [(found.leaf, found.path, kinds.get(found.role, SiteKind.MODULE)) for found in layouts.modules(params, target)]
    return [(leaf, *_module(leaf, target)) for leaf in select(shapes, target, params=params)]


def _shows_width(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a leaf's last axis can be the hidden state's: the leaf is a kernel or the scale of a normalisation."""
    name = path.rpartition("/")[2]
    return name == "scale" or (len(shape) > 1 and name != "bias")


def _module(leaf: str, target: Names) -> tuple[str, SiteKind]:
    """The module that gets the bottleneck: the one in the regex's named group, else the owner of the leaf."""
    owner = leaf.rpartition("/")[0]
    if isinstance(target, str):
        # `select` lets a regex match the leaf or its owner.
        match = re.fullmatch(target, leaf) or re.fullmatch(target, owner)
        for group, path in match.groupdict().items() if match else ():
            if path is not None:
                return path, SiteKind.RESIDUAL if group == SiteKind.RESIDUAL.value else SiteKind.MODULE
    return owner, SiteKind.MODULE


def _width_and_stack(
    leaf: str, shape: tuple[int, ...], rules: AxesRules, layers: Mapping[Path, int | None]
) -> tuple[int, tuple[int, ...], int]:
    """Number of features, the sizes of the stack axes, and the first of these axes."""
    if leaf.endswith("scale"):
        axis = layers.get(leaf)
        if axis is None:
            return shape[-1], shape[:-1], 0
        at = axis % len(shape)
        return shape[1 - at], (shape[at],), axis
    axes = axes_of(leaf, shape, rules, layers=layers)
    if len(axes.outputs) != 1:
        raise ValueError(f"'{leaf}' {shape} has {len(axes.outputs)} output axes; a bottleneck needs one feature axis.")
    return shape[axes.outputs[0]], tuple(shape[i] for i in axes.stack), _stack_axis(leaf, shape, axes)


def _stack_axis(leaf: str, shape: tuple[int, ...], axes: KernelAxes) -> int:
    """The axis on which a bottleneck's leaves, the smallest of which are vectors, have the stack of a kernel.

    Raises:
      ValueError: if no axis of a vector is that of the kernel.
    """
    stack = tuple(sorted(axes.stack))
    if stack == tuple(range(len(stack))):
        return 0
    if stack in ((1,), (len(shape) - 1,)):
        return -1 if stack[0] > 1 else 1
    raise ValueError(
        f"'{leaf}' {shape} is stacked on the axes {axes.stack}, and a bottleneck has biases, which have no such axes. Scan the layers on "
        "axis 0, 1 or -1, or use a method without biases, such as lora."
    )
