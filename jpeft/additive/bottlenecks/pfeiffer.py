"""Pfeiffer adapters: one bottleneck in every block, after the feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import layouts, tree
from jpeft.additive.bottlenecks.bottleneck import Activation, init_bottleneck, project_down_and_up
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod
from jpeft.additive.bottlenecks.sites import BottleneckSite
from jpeft.core.initializers import normal
from jpeft.core.layer import Layer
from jpeft.core.options import Count, Names, NotNegative
from jpeft.tree.adapters import ADDED

_EPSILON = 1e-5


class PfeifferAdapter(BottleneckMethod):
    r"""Pfeiffer adapter: ``u = LN(o + x), a = W_up relu(W_down u + b_down) + b_up + o, y = LN(a + x)`` after each feed-forward layer.

    o is the output of the feed-forward layer and x its residual. The pretrained LayerNorm is frozen and runs twice. The adapter's residual
    is o, which is not normalised. There are half as many adapters as Houlsby's, and no LayerNorm is trained.

    With ``h = o + x``, this is ``LN(h + W_up relu(W_down LN(h)))``, so the method wraps the LayerNorm of any post-norm block. In a pre-norm
    block nothing normalises the sum: ``LN`` is the identity, and the block's output h becomes ``h + W_up relu(W_down h)``.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 d m + m + d`` parameters. None for d / `reduction`.
      reduction: d / m, where `size` is not given.
      activation: "relu", "gelu" (exact), "gelu_new" (tanh approximation), "silu" or "tanh".
      target: The scales of LayerNorms, whose inputs are then adapted; or kernels, the outputs of whose modules are then adapted. If the
        regex has a named group, it is the output of the module in the group: ``(?P<block>.*)/mlp/down/kernel``. None takes the LayerNorms
        after the feed-forward layers of BERT and its relatives, or, if there are none, the blocks of common pre-norm families.
      std: Standard deviation of the initial kernels.
      own_norm: A new LayerNorm in front of the down-projection, ``2 d`` more parameters: on GPT-2 this is the adapter of Lin et al.
      hidden_state: Which output of the module is its hidden state, where several have its shape: a regex for the path among the outputs,
        such as "1" or "hidden".
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and therefore has no merge.

    Raises:
      ValueError: for a size or reduction below 1 or an unknown activation; from `init`, if nothing matches, a kernel has several output
        axes, or several kernels name one block.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"layer_0": {"output": {"LayerNorm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="pfeiffer").adapter)["layer_0"]["output"]["LayerNorm"]["+"]["down"]
    {'bias': (2,), 'kernel': (32, 2)}

    References: Pfeiffer et al., AdapterFusion, 2021, https://arxiv.org/abs/2005.00247; Lin, Madotto and Fung, Exploring Versatile
    Generative Language Model Via Parameter-Efficient Transfer Learning, 2020, https://arxiv.org/abs/2004.03829.

    Every default is that of the configuration `seq_bn` of the library adapters. Unlike Houlsby's, the adapter does not begin near the
    identity.
    """

    size: Count | None = None
    reduction: Count = 16
    activation: Activation = "relu"
    target: Names | None = None
    std: NotNegative = 0.02
    own_norm: bool = False

    name = "pfeiffer"
    summary = "one bottleneck layer a block, between two runs of its LayerNorm"

    def target_in(self, params: tree.Params) -> Names:
        """The option, or the LayerNorms of post-norm blocks, or pre-norm blocks."""
        if self.target is not None:
            return self.target
        post_norm = "@post_norm/scale"
        return post_norm if layouts.find(params, post_norm, required=False) else "@block"

    def init_at(self, key: jax.Array, site: BottleneckSite) -> dict[str, Any]:
        """Both kernels normal; a LayerNorm with scale one, if there is one."""
        draw, size = normal(self.std), self.size or max(1, site.width // self.reduction)
        leaves = init_bottleneck(key, width=site.width, size=size, stack=site.stack, down=draw, up=draw)
        if not self.own_norm:
            return leaves
        shape = (*site.stack, site.width)
        return leaves | {"norm": {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}}

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """``LN(h + f(LN(h)))`` around a normalisation, ``h + f(h)`` on the output h of any other module; f is the bottleneck."""
        del rng
        norm = leaves[ADDED].get("norm")

        def f(u: jax.Array) -> jax.Array:
            u = u if norm is None else _layer_norm(u, norm["scale"], norm["bias"])
            return project_down_and_up(leaves[ADDED], u, self.activation)

        if "scale" in layer.params:  # a normalisation: its input is the sum of output and residual
            h, *rest = inputs
            return layer(h + f(layer(h, *rest)).astype(h.dtype), *rest)
        return self.change(layer, inputs, leaves[ADDED], lambda h: h + f(h))


def _layer_norm(h: Float[Array, "*batch d"], scale: Float[Array, " d"], bias: Float[Array, " d"]) -> Float[Array, "*batch d"]:
    """LayerNorm in float32, returned in the dtype of `h`."""
    x = h.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + _EPSILON)
    # Strict rank promotion asks for leading axes of size one.
    scale, bias = (leaf.reshape((1,) * (h.ndim - 1) + (-1,)) for leaf in (scale, bias))
    return (x * scale + bias).astype(h.dtype)


pfeiffer = PfeifferAdapter
