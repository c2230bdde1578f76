"""OutputShift: a trained vector added to the outputs of chosen layers. A skeleton to copy for a method of your own.

Save the copy as ``jpeft/<selective|additive|reparameterized>/<name>.py``. jpeft finds every method in these folders by itself.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import Names, Number
from jpeft.tree.head import not_head
from jpeft.tree.kernels import axes_of
from jpeft.tree.select import select


class OutputShift(Method):
    """OutputShift: ``y = layer(x) + s v``, with v trained and zero at the start.

    Args:
      scale: s.
      target: Which kernels' layers: a regex for whole paths, or a list of names.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge, since a layer need not have a bias that could take v up.

    Raises:
      ValueError: from `init`, for a target that matches nothing.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4))}}
    >>> jpeft.apply(params, method=OutputShift(target=["dense"])).adapter["dense"]["kernel"]["v"].shape
    (4,)

    Reference: authors, title, year, link. Say where the code differs from the paper or from HF PEFT.
    """

    # The options: name, type (with its range, see jpeft/core/options.py) and default. The docstring above explains each.
    scale: Number = 1.0
    target: Names = ("out",)
    head: str | None = "auto"

    # What lists of methods say, and the learning rate that suits the defaults.
    name = "output_shift"
    family = "additive"
    summary = "a vector added to the outputs of chosen layers"
    learning_rate = 1e-2
    why_no_merge = "the layers need not have a bias that could take the vector up; keep using it through jpeft.wrap"

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """A vector beside each chosen kernel. A kernel of stacked (scanned) layers gets one for each layer, a head axis keeps its place."""
        del key, stats  # random leaves would be drawn with tree.key_for(key, path)
        kernels = {path: leaf for path, leaf in not_head(params, self.head).items() if path.endswith("kernel")}
        leaves = {}
        for path in select(kernels, self.target, params=params):
            shape = kernels[path].shape
            axes = axes_of(path, shape)  # which axes are stack, inputs and outputs: never guessed from their number
            leaves[f"{path}/v"] = jnp.zeros([shape[i] for i in axes.stack + axes.outputs])
        return with_head(leaves, params, self.head)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """The layer's outputs plus the vector, in the outputs' dtype. Inside a scan the stack axis is gone."""
        y = layer(*inputs)
        v = (self.scale * leaves["kernel"]["v"]).astype(y.dtype)
        return y + v.reshape((1,) * (y.ndim - v.ndim) + v.shape)  # [..., *outputs]


output_shift = OutputShift  # the public spelling: jpeft.output_shift(scale=2.0)
