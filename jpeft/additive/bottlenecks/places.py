"""Where adapters sit: the modules of common families, found through the parameters that tell how wide they are.

A target names *leaves*: the kernel of a projection, or the scale of a normalisation, whose last axis is the one an adapter works on. The
module that gets the adapter is the one that owns the leaf, or, if the regex has a named group, the one whose path the group holds. So
``(?P<block>.*)/mlp/c_proj/kernel`` puts an adapter of the projection's width onto the block around it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jpeft.method import not_head
from jpeft.tree.kernels import AxesRules, axes_of, axes_rules
from jpeft.tree.paths import Params
from jpeft.tree.select import select

_ATTENTION = (
    r"attention/output/dense|out_lin|attn/c_proj|o_proj|(?<!encoder_attn/)out_proj|SelfAttention/o|attn/out|attention/out|"
    r"MultiHeadDotProductAttention_\d+/out"
)
_CROSS = r"encoder_attn/out_proj|EncDecAttention/o"
_FEED_FORWARD = r"(?<!attention/)output/dense|lin2|mlp/c_proj|down_proj|fc2|wo|down"

# The projections whose outputs a block adds to its residual stream, by their names in common families.
FEED_FORWARD = rf"(.*/)?({_FEED_FORWARD})/kernel"
SELF_AND_FEED_FORWARD = rf"(.*/)?({_ATTENTION}|{_FEED_FORWARD})/kernel"
PROJECTIONS = rf"(.*/)?({_ATTENTION}|{_CROSS}|{_FEED_FORWARD})/kernel"

# The normalisation of the feed-forward layer's sum, in post-norm blocks.
POST_NORM = r"(.*/)?((?<!attention/)output/LayerNorm|output_layer_norm)/scale"

NORMS = r"(.*/)?([^/]*([Ll]ayer_?[Nn]orm|rmsnorm|RMSNorm)[^/]*|ln_\w+|ln\d*|norm\w*)/(scale|bias|weight)"


class Place(NamedTuple):
    """A module that gets an adapter, or all the modules that one `nn.scan` stacks."""

    path: str
    leaf: str  # path of the parameter that told the width
    group: str  # name of the group in the target that gave the path; "" for the owner of the leaf
    width: int
    stack: tuple[int, ...]  # () or (layers,)


def places(
    params: Params,
    target: str | Sequence[str],
    *,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> list[Place]:
    """The modules that a target names.

    Args:
      params: The base.
      target: A regex or a list of names, as in `jpeft.tree.select.select`, for kernels and for scales of normalisations.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Where the task head is, which gets no adapter.

    Raises:
      ValueError: if nothing matches, a kernel has several output axes, or two leaves of different widths name one module.
    """
    rules = axes_rules(axes)
    shapes = {path: leaf.shape for path, leaf in not_head(params, head).items() if _tells_width(path, leaf.shape)}
    found: dict[str, Place] = {}
    for leaf in select(shapes, target, params=params):
        if "/pooler/" in f"/{leaf}":
            continue
        path, group = _module(leaf, target)
        place = Place(path, leaf, group, *_last_axis(leaf, shapes[leaf], rules))
        first = found.setdefault(path, place)
        if first.width != place.width:
            raise ValueError(
                f"target={target!r} matches several leaves of '{path}', '{first.leaf}' with {first.width} features and '{leaf}' with "
                f"{place.width}. "
                "Let it match one: the kernel of the last projection in there."
            )
    return list(found.values())


def _tells_width(path: str, shape: tuple[int, ...]) -> bool:
    name = path.rpartition("/")[2]
    return name == "scale" or (len(shape) > 1 and name != "bias")


def _module(leaf: str, target: str | Sequence[str]) -> tuple[str, str]:
    owner = leaf.rpartition("/")[0]
    if isinstance(target, str):
        match = re.fullmatch(target, leaf) or re.fullmatch(target, owner)
        for group, path in match.groupdict().items() if match else ():
            if path is not None:
                return path, group
    return owner, ""


def _last_axis(leaf: str, shape: tuple[int, ...], rules: AxesRules) -> tuple[int, tuple[int, ...]]:
    """Width of the features, and the stack of layers."""
    if leaf.endswith("scale"):
        return shape[-1], tuple(shape[:-1])
    geometry = axes_of(leaf, shape, rules)
    if len(geometry.outputs) != 1:
        raise ValueError(f"'{leaf}' {shape} has {len(geometry.outputs)} output axes; a bottleneck needs one feature axis.")
    return shape[geometry.outputs[0]], tuple(shape[i] for i in geometry.stack)
