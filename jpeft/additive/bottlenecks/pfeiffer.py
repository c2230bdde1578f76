"""Pfeiffer adapters: one bottleneck in every block, behind the feed-forward layer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.additive.bottlenecks import bottleneck
from jpeft.additive.bottlenecks.places import POST_NORM, places
from jpeft.method import ADDED, Layer, Method, factory, not_head, with_head
from jpeft.tree.kernels import AxesRules
from jpeft.tree.select import matches

# In pre-norm blocks the sum is what the block returns. A kernel named by its block alone comes last: `.+?` tries the short ways first.
BLOCK = r"(?P<block>.+?)/(mlp/(c_proj|down_proj|down|fc2|wo)|DenseReluDense/wo|(?<!attention/)output/dense|down)/kernel"
_EPSILON = 1e-5


@factory
def pfeiffer(
    *,
    size: int | None = None,
    reduction: int = 16,
    activation: str = "relu",
    target: str | Sequence[str] | None = None,
    std: float = 0.02,
    own_norm: bool = False,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Pfeiffer adapter: ``u = LN(o + x), a = W_up relu(W_down u + b_down) + b_up + o, y = LN(a + x)`` behind each feed-forward layer.

    o is what the feed-forward layer gives and x its residual. The pretrained LayerNorm is frozen and runs twice; the adapter's own residual
    is o, from before it. Half the adapters of Houlsby and no LayerNorm trained.

    With ``h = o + x``, this is ``LN(h + W_up relu(W_down LN(h)))``, so it goes around the LayerNorm of any post-norm block. In a pre-norm
    block nothing normalises the sum, so ``LN`` is the identity and the block's output h becomes ``h + W_up relu(W_down h)``.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 d m + m + d`` parameters. None for d / `reduction`.
      reduction: d / m, where `size` is not given.
      activation: "relu", "gelu" (exact), "gelu_new" (tanh approximation), "silu" or "tanh".
      target: Where the sum is: the scales of LayerNorms, whose inputs are adapted; or kernels whose owners' outputs are, and with a named
        group in the regex the outputs of the module that it holds: ``(?P<block>.*)/mlp/down/kernel``. None looks for the LayerNorms behind
        the feed-forward layers of BERT's relatives, and if there are none for the blocks of common pre-norm families.
      std: Standard deviation of the initial kernels.
      own_norm: A new LayerNorm in front of the down-projection, ``2 d`` parameters more: on GPT-2 this is the adapter of Lin et al.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and so has no merge.

    Raises:
      ValueError: for a size or reduction below 1 or an unknown activation; from `init`, if nothing matches, a kernel has several output
        axes, or several kernels name one block.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"layer_0": {"output": {"LayerNorm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="pfeiffer").adapter)["layer_0"]["output"]["LayerNorm"]["+"]["down"]
    {'bias': (2,), 'kernel': (32, 2)}

    References: Pfeiffer et al., AdapterFusion, 2021, https://arxiv.org/abs/2005.00247; Lin, Madotto and Fung, Exploring Versatile
    Generative Language Model Via Parameter-Efficient Transfer Learning, 2020, https://arxiv.org/abs/2004.03829.

    Follows the configuration `seq_bn` of the library adapters in every default. Unlike Houlsby's, it is not near the identity at first.
    """
    bottleneck.check(size, activation)
    if reduction < 1:
        raise ValueError(f"reduction={reduction} must be at least 1.")
    draw = bottleneck.normal(std)

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del stats
        post_norm = any(matches(POST_NORM, path) for path in not_head(params, head))
        out: dict[str, Any] = {}
        for place in places(params, target or (POST_NORM if post_norm else BLOCK), axes=axes, head=head):
            out |= bottleneck.init(key, place, size or max(1, place.width // reduction), down=draw, up=draw)
            if own_norm:
                shape = (*place.stack, place.width)
                out |= bottleneck.added(place, {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}, "norm")
        return tree.unflatten(out)

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        del rng

        def change(u: jax.Array) -> jax.Array:
            return bottleneck.apply(leaves[ADDED], _normalised(leaves[ADDED].get("norm"), u), activation)

        if "scale" in layer.params:  # a normalisation: what goes into it is the sum
            h, *rest = inputs
            return layer(h + change(layer(h, *rest)).astype(h.dtype), *rest)
        return bottleneck.on_hidden(layer(*inputs), lambda h: h + change(h))

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: leaf, why_not=bottleneck.WHY_NOT)

    return Method(init=with_head(init_fn, head), call=call_fn, merge=merge_fn)


def _normalised(norm: dict[str, jax.Array] | None, h: jax.Array) -> jax.Array:
    """LayerNorm with its statistics in float32; `h` itself without one."""
    if norm is None:
        return h
    x = h.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + _EPSILON)
    scale, bias = (norm[name].reshape((1,) * (h.ndim - 1) + (-1,)) for name in ("scale", "bias"))
    return (x * scale + bias).astype(h.dtype)
