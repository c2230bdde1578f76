"""The attentions of a model that get a prefix, found through their key projections, and the modules that count positions."""

import math
from typing import Any, NamedTuple

from jpeft import layouts
from jpeft.core.options import Axes, Names
from jpeft.tree.head import not_head
from jpeft.tree.kernels import axes_of, axes_rules
from jpeft.tree.paths import Params, Path
from jpeft.tree.select import select

KEY = "@key|@qkv"  # key projections, and fused ones, which produce queries, keys and values of equal width

# Two modules without parameters, so a target cannot match them; they are called so in `jpeft.models`.
CORE = "core"  # beside the key projection: maps queries, keys, values and mask to the context
POSITIONS = "positions"  # beside the word embedding or the module `embeddings` around it: says which position each token has


class AttentionSite(NamedTuple):
    """The attention of one layer, or of all layers of one `nn.scan`, as far as the parameters describe it.

    They do not tell the number of heads. A prefix is therefore stored flat and split into heads as the keys are.

    Attributes:
      kernel: Path of the key kernel.
      core: Path of the attention core.
      stack: Sizes of the stack axes: () or (layers,).
      inputs: Width of the residual stream.
      width: Width of a flat key: kv_heads * head_dim.
    """

    kernel: Path
    core: Path
    stack: tuple[int, ...]
    inputs: int
    width: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return math.prod(self.stack)


def find_attention_sites(
    params: Params, *, target: Names = KEY, width: int | None = None, axes: Axes | None = None, head: str | None = "auto"
) -> list[AttentionSite]:
    """Find the attentions of a model, in the order of its layers.

    Args:
      params: The base.
      target: The key kernels.
      width: Width of a flat key, where the kernel does not tell it.
      axes: Geometry of kernels with more than two axes, as in `jpeft.lora`.
      head: Where the task head is, which gets no prefix.

    Raises:
      ValueError: if the target matches nothing, or the geometry of a kernel is not known.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in not_head(params, head).items() if len(leaf.shape) > 1}
    fused = set(layouts.find(params, "@qkv", required=False))
    found, layers = [], layouts.layer_axes(params)
    for path in sorted(select(shapes, target, params=params), key=_in_order_of_numbers):
        geometry, shape = axes_of(path, shapes[path], axes_rules(axes), layers=layers), shapes[path]
        if sorted(geometry.stack) != list(range(len(geometry.stack))):
            raise ValueError(
                f"'{path}' {shape} has its layers on the axes {geometry.stack}, and a prefix has them on the first. Scan the layers on "
                "axis 0, or use another method, such as lora."
            )
        attention = path.split("/")[:-2]
        kinds = 3 if path in fused else 1  # outputs that one kernel produces: queries, keys and values, or keys alone
        key_width = width or geometry.fan_out(shape) // kinds
        stack = tuple(shape[i] for i in geometry.stack)
        found.append(AttentionSite(path, "/".join([*attention, CORE]), stack, geometry.fan_in(shape), key_width))
    return found


def find_position_modules(params: Params) -> list[Path]:
    """The paths of the modules that say which position each token has: one for each word embedding.

    A model whose word embedding has none of the usual names, or a part of a model without one, has no such module as far as its parameters
    tell, and the list is empty.

    >>> find_position_modules({"bert": {"embeddings": {"word_embeddings": {"embedding": 0}}}, "decoder": {"wte": {"embedding": 0}}})
    ['bert/positions', 'decoder/positions']
    """
    bodies = [table.split("/")[:-2] for table in layouts.find(params, "@embedding", required=False)]
    return ["/".join([*(body[:-1] if body[-1:] == ["embeddings"] else body), POSITIONS]) for body in bodies]


def _in_order_of_numbers(path: Path) -> list[tuple[Any, ...]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split("/")]
