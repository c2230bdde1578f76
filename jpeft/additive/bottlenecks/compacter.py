"""Compacter: adapters whose kernels are sums of Kronecker products with factors shared by all layers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.bottlenecks.bottleneck import Activation
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod
from jpeft.additive.bottlenecks.sites import BottleneckSite, find_sites
from jpeft.core.initializers import glorot_uniform
from jpeft.core.options import Count, Names, NotNegative
from jpeft.tree.adapters import ADDED

RULE = f"{ADDED}/rule"  # path of the shared factors A, once at the adapter's root


class Compacter(BottleneckMethod):
    r"""Compacter: ``h' = h + W_up act(W_down h + b_down) + b_up`` with ``W = Σ_i A_i ⊗ (S_i T_i)``, i = 1 … n.

    The n × n matrices A_i are shared by all kernels of all layers; each kernel has its own S_i and T_i of rank r. The adapters follow
    self-attention and the feed-forward layer, each before its residual sum, as Houlsby's do. All LayerNorms are trained too.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 r (d + m) + m + d`` parameters. None for d / `reduction`, rounded down to a
        multiple of n.
      reduction: d / m, where `size` is not given.
      division: n. It divides d and m.
      rank: r of each ``S_i T_i``.
      plus_plus: Compacter++: no adapter after attention.
      activation: "gelu_new" (tanh approximation), "gelu" (exact), "relu", "silu" or "tanh".
      std: Standard deviation of the initial A. It is so small that the model begins near the base.
      target: Other kernels whose outputs are adapted: a regex or a list of names.
      train_norms: Train scale and bias of all normalisation layers, as the paper does.
      hidden_state: Which output of the module is its hidden state, where several have its shape: a regex for the path among the outputs,
        such as "1" or "hidden".
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and therefore has no merge.

    Raises:
      ValueError: for a size, reduction, division or rank below 1, an unknown activation, a `target` beside `plus_plus`; from `init`, if
        nothing matches, a kernel has several output axes, or n does not divide d and m.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"down": {"kernel": jnp.ones((32, 8)), "bias": jnp.zeros(8)}}}
    >>> adapter = jpeft.apply(params, method="compacter", size=4).adapter
    >>> jax.tree.map(jnp.shape, adapter["+"]), jax.tree.map(jnp.shape, adapter["mlp"]["down"]["+"]["down"])
    ({'rule': (4, 4, 4)}, {'bias': (4,), 'left': (4, 2, 1), 'right': (4, 1, 1)})

    Reference: Mahabadi, Henderson and Ruder, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, 2021,
    https://arxiv.org/abs/2106.04647.

    All initial values are those of the authors' code (rabeehk/compacter): S and T Glorot-uniform with gain √2, A normal. As there, the
    cross-attention of an encoder-decoder gets no adapter.
    """

    size: Count | None = None
    reduction: Count = 32
    division: Count = 4
    rank: Count = 1
    plus_plus: bool = False
    activation: Activation = "gelu_new"
    std: NotNegative = 1e-4
    target: Names | None = None
    train_norms: bool = True

    name = "compacter"
    summary = "bottlenecks of Kronecker products with shared factors (Compacter, Compacter++)"
    learning_rate = 3e-3
    reduce_grads_locally = True  # the gradients of the factors come from those of whole kernels

    def check(self) -> None:
        """Refuse two ways of choosing kernels at once."""
        if self.plus_plus and self.target is not None:
            raise ValueError("plus_plus=True chooses the feed-forward layers; leave it out when you give a target.")

    @property
    def in_both_parts(self) -> bool:
        """Unless the user says where."""
        return self.target is None and not self.plus_plus

    def target_in(self, params: tree.Params) -> Names:
        """The option, or the feed-forward layers, or these and self-attention."""
        del params
        return self.target or ("@ffn_out" if self.plus_plus else "@attention_out|@ffn_out")

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """A bottleneck for each site, and the shared A at the adapter's root."""
        rule = self.std * jax.random.normal(tree.key_for(key, RULE), (self.division,) * 3)
        return tree.unflatten({RULE: rule, **tree.flatten(super().init(key, params, stats=stats))})

    def init_at(self, key: jax.Array, site: BottleneckSite) -> dict[str, Any]:
        """S (`left`), T (`right`) and a zero bias for both kernels.

        Raises:
          ValueError: if n does not divide d and m.
        """
        d, n = site.width, self.division
        m = self.size or max(n, d // self.reduction // n * n)
        if d % n or m % n:
            raise ValueError(f"division={n} must divide the width {d} of '{site.leaf}' and the bottleneck's {m}.")
        draw = glorot_uniform(gain=2**0.5)  # each of the n matrices by itself, since only the last two axes count
        out: dict[str, Any] = {}
        for side, inputs, outputs in (("down", d, m), ("up", m, d)):
            left_key, right_key = jax.random.split(tree.key_for(key, side))
            out[side] = {
                "left": draw(left_key, (*site.stack, n, inputs // n, self.rank)),
                "right": draw(right_key, (*site.stack, n, self.rank, outputs // n)),
                "bias": jnp.zeros((*site.stack, outputs)),
            }
        return out

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Form the kernels once for all layers, outside of the model: A is not sliced by `nn.scan`, and their cost has no batch in it."""
        return super().bind(params, with_kernels(adapter, self._stack_axes(params, adapter)), rng=rng)

    def _stack_axes(self, params: tree.Params, adapter: tree.Adapter) -> dict[str, int]:
        """The axis of the layers in the leaves of each module, where it is not the first."""
        if all(leaf.ndim < 4 for leaf in jax.tree.leaves(adapter)):  # S and T of a single layer have three axes
            return {}
        sites = find_sites(params, self.target_in(params), axes=self.axes, head=self.head)
        return {site.path: site.axis for site in sites if site.axis}


def kronecker_sum(
    rule: Float[Array, "n n n"], left: Float[Array, "*stack n p r"], right: Float[Array, "*stack n r q"]
) -> Float[Array, "*stack np nq"]:
    """``Σ_i A_i ⊗ (S_i T_i)``."""
    kernel = jnp.einsum("iac,...ipr,...irq->...apcq", rule, left, right)  # [*stack, n, p, n, q]
    *stack, a, p, c, q = kernel.shape
    return kernel.reshape(*stack, a * p, c * q)


def with_kernels(adapter: tree.Adapter, axes: Mapping[str, int] = MappingProxyType({})) -> tree.Adapter:
    """The adapter with kernels in place of their factors, as ordinary bottlenecks have them; for plain and for stacked layers alike.

    Args:
      adapter: The adapter.
      axes: The axis of the layers in the leaves of a module, by its path; the first, where none is given.
    """
    leaves = tree.flatten(adapter)
    rule, out = leaves.pop(RULE), {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        if f"/{ADDED}/" not in path or name == "bias":
            out[path] = leaf
        elif name == "left":
            axis = axes.get(module.rpartition(f"/{ADDED}/")[0], 0)
            left, right = (jnp.moveaxis(side, axis, 0) for side in (leaf, leaves[f"{module}/right"]))
            out[f"{module}/kernel"] = jnp.moveaxis(kronecker_sum(rule, left, right), 0, axis)
    return tree.unflatten(out)


compacter = Compacter
