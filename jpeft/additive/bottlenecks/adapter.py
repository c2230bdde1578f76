"""Adapters: small bottleneck layers inside every block (Houlsby et al.)."""

from typing import Any

import jax

from jpeft.additive.bottlenecks.bottleneck import Activation, init_bottleneck
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod
from jpeft.additive.bottlenecks.sites import BottleneckSite
from jpeft.core.initializers import truncated_normal
from jpeft.core.options import Count, Names, NotNegative


class HoulsbyAdapter(BottleneckMethod):
    r"""Adapter: ``h' = h + W_up act(W_down h + b_down) + b_up`` on the outputs of attention and of the feed-forward layer.

    Every block gets two bottlenecks, each before its residual sum. The kernels begin near zero, so the model begins near the base. All
    LayerNorms and the task head are trained too.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 d m + m + d`` parameters.
      activation: "gelu" (exact), "gelu_new" (tanh approximation), "relu", "silu" or "tanh".
      target: The kernels whose outputs are adapted: a regex or a list of names. By default the last projection of attention and of the MLP.
      std: Standard deviation of the initial kernels, before they are truncated.
      train_norms: Train scale and bias of all normalisation layers, as the paper does.
      hidden_state: Which output of the module is its hidden state, where several have its shape: a regex for the path among the outputs,
        such as "1" or "hidden".
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and therefore has no merge.

    Raises:
      ValueError: for a size below 1 or an unknown activation; from `init`, if nothing matches, or an output has several axes.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"down": {"kernel": jnp.ones((32, 8)), "bias": jnp.zeros(8)}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="adapter", size=2).adapter)["mlp"]["down"]["+"]["down"]
    {'bias': (2,), 'kernel': (8, 2)}

    Reference: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019, https://arxiv.org/abs/1902.00751.

    The initial deviation of 1e-3 is that of the authors' code (google-research/adapter-bert). There the adapter comes after the dropout
    that follows the projection; here it comes before that dropout. At evaluation both are the same.
    """

    size: Count = 64
    activation: Activation = "gelu"
    target: Names = "@attention_out|@cross_attention_out|@ffn_out"
    std: NotNegative = 1e-3
    train_norms: bool = True

    name = "adapter"
    summary = "bottleneck layers after attention and feed-forward (Houlsby)"

    @property
    def in_both_parts(self) -> bool:
        """Unless the user says where."""
        return self.target == type(self).target

    def init_at(self, key: jax.Array, site: BottleneckSite) -> dict[str, Any]:
        """Both kernels truncated normal."""
        draw = truncated_normal(self.std)
        return init_bottleneck(key, width=site.width, size=self.size, stack=site.stack, down=draw, up=draw)


adapter = HoulsbyAdapter
