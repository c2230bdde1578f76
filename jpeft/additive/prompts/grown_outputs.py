"""Which inputs and outputs of a body go by the length of its text.

A prompt makes the text longer. What the body returns for the tokens of the text must be cut back, and nothing else: an output may have the
longer text's length by chance, as the logits of a decoder, whose target has a length of its own. And an input that happens to be as long
as the text may have nothing to do with it. The body itself tells: it is traced abstractly, and what does not change with the text's length
does not go by it. A trace costs time, so it is made only where chance is possible.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jpeft.core.layer import Layer

Shapes = list[tuple[int, ...] | None]


def output_shapes(layer: Layer, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Shapes | None:
    """The shape of each output in the order of `jax.tree.leaves`, None for what is no array; None if the layer does not take the inputs.

    Nothing is computed.
    """
    found: list[Shapes] = []

    def run(params: Mapping[str, Any]) -> None:
        outputs = layer.run(params, *inputs, **keywords)
        found.append([getattr(leaf, "shape", None) for leaf in jax.tree.leaves(outputs)])

    try:
        jax.eval_shape(run, dict(layer.params))
    except Exception:
        return None
    return found[-1]


def cut_outputs(layer: Layer, inputs: Sequence[Any], keywords: Mapping[str, Any], outputs: Any, longer: tuple[int, ...], cut: Any) -> Any:
    """The outputs with ``cut(y)`` in place of each y [batch, longer, ...] that has an entry for each token of the longer text.

    Args:
      layer: The body.
      inputs: What it is given for the text itself.
      keywords: The same, by name.
      outputs: What it returned for the longer text.
      longer: The shape of the longer text, [batch, longer].
      cut: Cuts an output back.
    """
    leaves, structure = jax.tree.flatten(outputs)
    fitting = [getattr(y, "ndim", 0) in (2, 3) and tuple(y.shape[:2]) == longer for y in leaves]
    if any(fitting) and _may_be_chance(layer, inputs, keywords, [y for y, fits in zip(leaves, fitting) if fits], longer[1]):
        shapes = output_shapes(layer, inputs, keywords)
        if shapes is not None and len(shapes) == len(leaves):
            fitting = [fits and shape is not None and shape[:2] != longer for fits, shape in zip(fitting, shapes)]
    return jax.tree.unflatten(structure, [cut(y) if fits else y for y, fits in zip(leaves, fitting)])


def _may_be_chance(layer: Layer, inputs: Sequence[Any], keywords: Mapping[str, Any], outputs: Sequence[Any], length: int) -> bool:
    """Whether anything but the longer text has its length: another input, a parameter such as a table of queries, a number."""
    sizes = {size for leaf in jax.tree.leaves(layer.params) for size in getattr(leaf, "shape", ())}
    others = jax.tree.leaves((list(inputs[1:]), dict(keywords)))
    sizes |= {size for x in others for size in getattr(x, "shape", ())} | {x for x in others if type(x) is int}
    # [batch, longer] may be [batch, width]: few models return one number for each token.
    return length in sizes or any(y.ndim == 2 for y in outputs)
