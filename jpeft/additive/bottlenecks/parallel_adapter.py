"""Parallel adapters: a bottleneck beside the feed-forward layer (He et al.)."""

from typing import Any

import jax

from jpeft.additive.bottlenecks.bottleneck import Activation, init_bottleneck, project_down_and_up
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod, width_of
from jpeft.additive.bottlenecks.hidden_state import is_hidden
from jpeft.additive.bottlenecks.sites import BottleneckSite, SiteKind
from jpeft.core.initializers import kaiming_uniform, zeros
from jpeft.core.layer import Layer
from jpeft.core.options import Count, Names
from jpeft.tree.adapters import ADDED

RESIDUAL = "residual"  # in the adapter: where the leaves of a site of the kind RESIDUAL stand


class ParallelAdapter(BottleneckMethod):
    r"""Scaled parallel adapter: ``y = FFN(x) + s (W_up relu(W_down x + b_down) + b_up)``, x the input of the feed-forward layer.

    W_up and the biases begin at zero, so the model begins as the base.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 d m + m + d`` parameters. The paper takes 512 for summarisation and
        translation (d = 1024) and 16 on GLUE.
      scale: s. 4 in the paper, 2 on GLUE; 1 is its unscaled parallel adapter.
      activation: "relu", "gelu" (exact), "gelu_new" (tanh approximation), "silu" or "tanh".
      target: Kernels with as many outputs as x has features. The module that owns the kernel gets the adapter beside it, or, if the regex
        has a named group, the module in the group: ``(?P<layer>.*/mlp)/down/kernel``. A group called ``residual`` must hold a module that
        takes x as its second argument and adds x to the output of the feed-forward layer, as `output` does in BERT; the branch is then
        added to that argument. By default the feed-forward layers of common families.
      hidden_state: Which output of the module is its hidden state, where several have its shape: a regex for the path among the outputs,
        such as "1" or "hidden".
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and therefore has no merge.

    Raises:
      ValueError: for a size below 1 or an unknown activation; from `init`, if nothing matches, a kernel has several output axes, or several
        kernels name one layer; from the first call, if the layer's input has another width.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"up": {"kernel": jnp.ones((8, 32))}, "down": {"kernel": jnp.ones((32, 8))}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="parallel_adapter", size=2).adapter)["mlp"]["+"]["down"]
    {'bias': (2,), 'kernel': (8, 2)}

    The paper's best method, the mix-and-match adapter, is a parallel adapter with a prefix:

    >>> jpeft.chain(prefix=jpeft.prefix_tuning(length=30), ffn=jpeft.parallel_adapter(size=512)).name
    'chain'

    Reference: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2022, https://arxiv.org/abs/2110.04366.

    As in the authors' code, the initial kernels are LoRA's and there is no LayerNorm. In pre-norm blocks x is normalised already.
    """

    size: Count = 64
    scale: float = 4.0
    activation: Activation = "relu"
    target: Names = "@ffn|@ffn_residual"

    name = "parallel_adapter"
    summary = "bottleneck layers beside the feed-forward ones, scaled (He et al.)"
    learning_rate = 1e-3
    begins_within = 0.0

    def init_at(self, key: jax.Array, site: BottleneckSite) -> dict[str, Any]:
        """W_down as torch initialises linear layers, W_up zero."""
        leaves = init_bottleneck(key, width=site.width, size=self.size, stack=site.stack, down=kaiming_uniform, up=zeros)
        return {RESIDUAL: leaves} if site.kind is SiteKind.RESIDUAL else leaves

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Add the branch to the output of the feed-forward layer, or to the residual that is added to that output."""
        del rng
        kind = SiteKind.RESIDUAL if RESIDUAL in leaves[ADDED] else SiteKind.MODULE
        bottleneck = leaves[ADDED][RESIDUAL] if kind is SiteKind.RESIDUAL else leaves[ADDED]
        x = _hidden_state(layer, inputs, kind, width=width_of(bottleneck))
        branch = self.scale * project_down_and_up(bottleneck, x, self.activation)  # [*batch, d]
        if kind is SiteKind.RESIDUAL:
            # The module computes norm(FFN(x) + residual) with residual = x, so this is the sum of the equation.
            return layer(inputs[0], x + branch, *inputs[2:])
        return self.change(layer, inputs, bottleneck, lambda y: y + branch.astype(y.dtype))


def _hidden_state(layer: Layer, inputs: tuple[Any, ...], kind: SiteKind, *, width: int) -> jax.Array:
    """The argument that is the input x of the feed-forward layer.

    Raises:
      ValueError: if that argument is missing or is no array of the bottleneck's width.
    """
    index = 1 if kind is SiteKind.RESIDUAL else 0
    # A module may take something else first, such as a mask.
    fitting = [x for x in inputs if is_hidden(x, width)]
    if kind is SiteKind.MODULE and len(fitting) == 1:
        return fitting[0]
    shapes = [getattr(x, "shape", ()) for x in inputs]
    if len(shapes) <= index or shapes[index][-1:] != (width,):
        raise ValueError(
            f"parallel_adapter: '{layer.path}' was called with arguments of the shapes {shapes}, where the argument with the index {index} "
            f"should be x, {width} wide. Choose the feed-forward layers with target=."
        )
    return inputs[index]


parallel_adapter = ParallelAdapter
