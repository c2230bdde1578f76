"""Parallel adapters: a bottleneck beside the feed-forward layer (He et al.)."""

from collections.abc import Sequence
from typing import Any

import jax

from jpeft import tree
from jpeft.additive.bottlenecks import bottleneck
from jpeft.additive.bottlenecks.places import places
from jpeft.method import ADDED, Layer, Method, factory, with_head
from jpeft.tree.kernels import AxesRules

# A feed-forward layer that is a module of its own; or, in BERT's relatives, the module that adds its output to its input: with the residual
# x there, which in post-norm blocks is what the feed-forward layer reads, adding to the residual is adding to the output.
TARGET = (
    r"(?P<layer>(.*/)?(mlp|ffn|feed_forward|DenseReluDense))/(c_proj|lin2|down_proj|down|fc2|wo)/kernel|"
    r"(?P<residual>(.*/)?(?<!attention/)output)/LayerNorm/scale"
)
RESIDUAL = "residual"


@factory
def parallel_adapter(
    *,
    size: int = 64,
    scale: float = 4.0,
    activation: str = "relu",
    target: str | Sequence[str] = TARGET,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Scaled parallel adapter: ``y = FFN(x) + s (W_up relu(W_down x + b_down) + b_up)``, x the input of the feed-forward layer.

    W_up and the biases begin at zero, so the model begins as the base.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 d m + m + d`` parameters. The paper takes 512 for summarisation and
        translation (d = 1024) and 16 on GLUE.
      scale: s. 4 in the paper, 2 on GLUE; 1 is its unscaled parallel adapter.
      activation: "relu", "gelu" (exact), "gelu_new" (tanh approximation), "silu" or "tanh".
      target: Kernels, as wide as the input, whose owners get an adapter beside them; with a named group in the regex the module that it
        holds does, ``(?P<layer>.*/mlp)/down/kernel``. In a group called ``residual`` it is a module that gets x as its second argument and
        adds it to the output of the feed-forward layer, as `output` does in BERT. By default the feed-forward layers of common families.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and so has no merge.

    Raises:
      ValueError: for a size below 1 or an unknown activation; from `init`, if nothing matches, a kernel has several output axes, or several
        kernels name one layer; from the first call, if the layer's input has another width.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"up": {"kernel": jnp.ones((8, 32))}, "down": {"kernel": jnp.ones((32, 8))}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="parallel_adapter", size=2).adapter)["mlp"]["+"]["down"]
    {'bias': (2,), 'kernel': (8, 2)}

    The paper's best, the mix-and-match adapter, is this with a prefix:

    >>> jpeft.chain(prefix=jpeft.prefix_tuning(length=30), ffn=jpeft.parallel_adapter(size=512)).name
    'chain'

    Reference: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2022, https://arxiv.org/abs/2110.04366.

    Follows the authors' code in the initial kernels (LoRA's) and in having no LayerNorm. In pre-norm blocks x is normalised already.
    """
    bottleneck.check(size, activation)

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del stats
        out: dict[str, Any] = {}
        for place in places(params, target, axes=axes, head=head):
            names = (RESIDUAL,) if place.group == RESIDUAL else ()
            out |= bottleneck.init(key, place, size, *names, down=bottleneck.kaiming, up=bottleneck.zeros)
        return tree.unflatten(out)

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        del rng
        at = 1 if RESIDUAL in leaves[ADDED] else 0
        own = leaves[ADDED].get(RESIDUAL, leaves[ADDED])
        shapes, width = [getattr(x, "shape", ()) for x in inputs], own["up"]["bias"].shape[-1]
        if shapes[at:] == [] or shapes[at][-1:] != (width,):
            raise ValueError(
                f"parallel_adapter: '{layer.path}' was called with arguments of the shapes {shapes}, where that with the index {at} should "
                f"be x, {width} wide. Choose the feed-forward layers with target=."
            )
        x = inputs[at]
        branch = scale * bottleneck.apply(own, x, activation)
        if at:
            return layer(inputs[0], x + branch, *inputs[2:])
        return bottleneck.on_hidden(layer(*inputs), lambda y: y + branch.astype(y.dtype))

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: leaf, why_not=bottleneck.WHY_NOT)

    return Method(init=with_head(init_fn, head), call=call_fn, merge=merge_fn)
