"""The task head: made fresh for each task, so every method trains it."""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from jpeft import layouts
from jpeft.layouts import Role
from jpeft.layouts.roles import PROJECTIONS
from jpeft.tree.kernels import axes_of, without_axis
from jpeft.tree.paths import Params, Path, flatten, trained_copy, unflatten
from jpeft.tree.select import select

# A regex of the heads that most families have, for options that extend it.
HEAD = rf"({layouts.PLAIN.head})(/.*)?"

# Names that heads have in models of no known family. They count where the structure agrees.
_NAMES = re.compile(
    r"(?i)(\w+_)?heads?(_\w+)?|(out|output|class|final)_?(proj|projection|layer|dense|linear|fc)?|(\w+_)?logits?(_?\w+)?|predictions?|"
    r"conv_?out"
)

# What ends a model, or a part of one, and is no task head.
_KNOWN = (Role.LM_HEAD, Role.POOLER, *PROJECTIONS)


def head_leaves(params: Params, head: str | None) -> dict[Path, Any]:
    """The leaves of the task head: ``"auto"`` looks for what the model's layout calls it, a regex must match, None is no head.

    Under another name a head is found by structure: `heads_by_structure`.

    Raises:
      ValueError: if a head was named that the model does not have.
    """
    if head is None:
        return {}
    flat = flatten(params)
    if head == "auto":
        named = layouts.find(flat, Role.HEAD, required=False)
        return {path: flat[path] for path in named or heads_by_structure(flat)}
    chosen = select(flat, head, option="head", params=params)
    return {path: flat[path] for path in chosen}


def with_head(adapter: Mapping[str, Any], params: Params, head: str | None) -> dict[str, Any]:
    """The leaves of an adapter, by path or nested, with the task head added: a head is made fresh for its task, so it is always trained.

    Args:
      adapter: The method's own leaves. A leaf of the head that is among them stays.
      params: The base.
      head: ``"auto"`` for a head under one of the usual names, a regex, or None.
    """
    own = flatten(adapter)
    leaves = {path: trained_copy(leaf) for path, leaf in head_leaves(params, head).items() if path not in own}
    return unflatten(own | leaves)


def not_head(params: Params, head: str | None) -> dict[str, Any]:
    """The base's leaves by path without those of the task head: what a method chooses its targets from."""
    skip = head_leaves(params, head)
    return {path: leaf for path, leaf in flatten(params).items() if path not in skip}


def heads_by_structure(params: Params) -> list[Path]:
    """The leaves of heads under names that no layout knows: what `unknown_heads` finds, if name or place leave no doubt.

    That is so for a usual name, such as ``head`` or ``output_projection``, and for the only candidate outside a model's stacks of layers.

    >>> from jax import ShapeDtypeStruct
    >>> block = {"up/kernel": (8, 16), "down/kernel": (16, 8), "norm/scale": (8,)}
    >>> shapes = {f"cell_{i}/{name}": shape for i in range(2) for name, shape in block.items()} | {"top/kernel": (8, 3), "top/bias": (3,)}
    >>> heads_by_structure({path: ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    ['top/bias', 'top/kernel']
    """
    flat = flatten(params)
    return list(_by_structure(tuple((path, tuple(leaf.shape)) for path, leaf in flat.items())))


@functools.lru_cache(maxsize=32)
def _by_structure(items: tuple[tuple[Path, tuple[int, ...]], ...]) -> tuple[Path, ...]:
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in items}
    stacked = layouts.layer_axes(shapes)
    outside = [head for head in unknown_heads(shapes) if f"{head}/kernel" not in stacked]
    named = [head for head in outside if _NAMES.fullmatch(head.rpartition("/")[2])]
    heads = named or (outside if stacked and len(outside) == 1 else [])
    return tuple(path for path in shapes if any(path.startswith(f"{head}/") for head in heads))


def unknown_heads(params: Params) -> list[Path]:
    """The kernels that look like a task head under a name that ``head="auto"`` does not know; none if it knows one.

    Such a kernel ends a model: its inputs are a width that another layer gives, and nothing else in the model is as wide as its outputs. So
    a bare encoder has none, nor has a language model, whose outputs are as many as its embeddings. A kernel that stands in each of several
    blocks, such as the router of experts, is none either.

    >>> from jax import ShapeDtypeStruct
    >>> shapes = {"Dense_0/kernel": (20, 16), "Dense_1/kernel": (16, 3), "Dense_1/bias": (3,)}
    >>> unknown_heads({path: ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    ['Dense_1']
    """
    whole = {path: tuple(leaf.shape) for path, leaf in flatten(params).items() if leaf.shape and not path.endswith("bias")}
    if layouts.find(whole, Role.HEAD, required=False):
        return []
    # Without queries, `value` is a head that predicts one.
    roles = [role for role in _KNOWN if role not in (Role.KEY, Role.VALUE) or _found(whole, Role.QUERY)]
    known = {path for role in roles for path in _found(whole, role)}
    # Logits are those of words only if there is a table of as many words; that the outputs are read nowhere else is asked below.
    known -= {path for path in _found(whole, Role.LM_HEAD) if "logit" in path.split("/")[-2]}
    # Of stacked layers one counts: how many there are is no width.
    layers = layouts.layer_axes(params)
    shapes = {path: shape for path in whole if (shape := without_axis(whole[path], layers.get(path)))}
    blocks = Counter(map(_block, shapes))
    given = Counter(shape[-1] for path, shape in shapes.items() if _is_kernel(path))
    read = Counter(width for path, shape in shapes.items() for width in _read(path, shape))

    def ends_the_model(path: Path, inputs: int, outputs: int) -> bool:
        others = given - Counter([outputs])
        # The outputs of a convolution may be flattened into the inputs.
        fed = any(width > 1 and inputs % width == 0 for width in others)
        # Queries, keys and values in one are a multiple of the inputs.
        return fed and outputs % inputs != 0 and not read[outputs] and blocks[_block(path)] == 1 and path not in known

    kernels = {path: shape for path, shape in shapes.items() if _is_kernel(path) and len(shape) == 2}
    return [path.rpartition("/")[0] for path, shape in kernels.items() if ends_the_model(path, *shape)]


def _found(shapes: dict[Path, tuple[int, ...]], role: Role) -> list[Path]:
    """The leaves with a role; none where names could mean two."""
    try:
        return layouts.find(shapes, role, required=False)
    except ValueError:
        return []


def _block(path: Path) -> str:
    """The path with stars for the numbers of the modules around a layer: the same for a layer of each block."""
    *around, module, leaf = ("", "", *path.split("/"))
    return "/".join([*(re.sub(r"\d+", "*", name) for name in around), module, leaf])


def _is_kernel(path: Path) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _read(path: Path, shape: tuple[int, ...]) -> set[int]:
    """The widths that a leaf takes: the inputs of a kernel, the width of a normalisation, both sizes of a table of embeddings."""
    if not _is_kernel(path) or len(shape) < 2:
        return set(shape[-2:]) if path.endswith("embedding") else set(shape[-1:])
    try:
        inputs = axes_of(path, shape, layers={path: None}).inputs
    except ValueError:
        inputs = tuple(range(len(shape) - 1))
    # The inputs together, and the channels of a convolution.
    return {math.prod(shape[i] for i in inputs), shape[inputs[-1]]}


def output_kernels(params: Params) -> dict[str, list[Path]]:
    """The kernels of each output layer, heads of language models included, by the name of the layer at the top of the tree.

    >>> from jax import ShapeDtypeStruct
    >>> shapes = {"Dense_0/kernel": (20, 16), "Dense_1/kernel": (16, 3), "Dense_1/bias": (3,)}
    >>> output_kernels({path: ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    {'Dense_1': ['Dense_1/kernel']}
    """
    flat = flatten(params)
    known = layouts.find(flat, f"{Role.HEAD}|{Role.LM_HEAD}", required=False)
    paths = [path for path in known if _is_kernel(path) and len(flat[path].shape) > 1] + [f"{head}/kernel" for head in unknown_heads(flat)]
    out: dict[str, list[Path]] = {}
    for path in dict.fromkeys(paths):
        out.setdefault(path.split("/")[0] if path in known else path.rpartition("/")[0], []).append(path)
    return out


def named_as_outputs(params: Params) -> list[Path]:
    """The kernels outside all stacks of layers under names that output layers have, whatever their shapes say."""
    flat = flatten(params)
    stacked = layouts.layer_axes(flat)
    is_named = lambda path: _is_kernel(path) and _NAMES.fullmatch(path.split("/")[-2] if "/" in path else "") is not None
    return [path for path, leaf in flat.items() if path not in stacked and len(leaf.shape) > 1 and is_named(path)]
