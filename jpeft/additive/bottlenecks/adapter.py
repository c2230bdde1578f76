"""Adapters: small bottleneck layers inside every block (Houlsby et al.)."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from jpeft import tree
from jpeft.additive.bottlenecks import bottleneck
from jpeft.additive.bottlenecks.places import NORMS, PROJECTIONS, places
from jpeft.method import ADDED, Layer, Method, factory, not_head, with_head
from jpeft.tree.kernels import AxesRules


@factory
def adapter(
    *,
    size: int = 64,
    activation: str = "gelu",
    target: str | Sequence[str] = PROJECTIONS,
    std: float = 1e-3,
    train_norms: bool = True,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Adapter: ``h' = h + W_up act(W_down h + b_down) + b_up`` on the outputs of attention and of the feed-forward layer.

    Two in every block, each before its residual sum. With kernels near zero the model begins near the base. All LayerNorms are trained
    too, and the task head.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 d m + m + d`` parameters.
      activation: "gelu" (exact), "gelu_new" (tanh approximation), "relu", "silu" or "tanh".
      target: The kernels whose outputs are adapted; a regex or a list of names. By default the last projection of attention and of the MLP.
      std: Standard deviation of the initial kernels, before they are truncated.
      train_norms: Train scale and bias of all normalisation layers, as the paper does.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and so has no merge.

    Raises:
      ValueError: for a size below 1 or an unknown activation; from `init`, if nothing matches, or an output has several axes that are not
        features.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"down": {"kernel": jnp.ones((32, 8)), "bias": jnp.zeros(8)}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="adapter", size=2).adapter)["mlp"]["down"]["+"]["down"]
    {'bias': (2,), 'kernel': (8, 2)}

    Reference: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019, https://arxiv.org/abs/1902.00751.

    Follows the authors' code (google-research/adapter-bert) in the initial deviation of 1e-3. The code puts the adapter behind the dropout
    that follows the projection; here it is right at the projection's output, in front of that dropout: the same at evaluation.
    """
    bottleneck.check(size, activation)
    draw = bottleneck.truncated_normal(std)

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del stats
        out = {path: tree.copy(leaf) for path, leaf in not_head(params, head).items() if train_norms and re.fullmatch(NORMS, path)}
        for place in places(params, target, axes=axes, head=head):
            out |= bottleneck.init(key, place, size, down=draw, up=draw)
        return tree.unflatten(out)

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        del rng
        h = layer(*inputs)
        return h + bottleneck.apply(leaves[ADDED], h, activation)

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: leaf, why_not=bottleneck.WHY_NOT)

    return Method(init=with_head(init_fn, head), call=call_fn, merge=merge_fn)
