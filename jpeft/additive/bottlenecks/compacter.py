"""Compacter: adapters whose kernels are sums of Kronecker products with factors shared by all layers."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.bottlenecks import bottleneck
from jpeft.additive.bottlenecks.places import FEED_FORWARD, NORMS, SELF_AND_FEED_FORWARD, Place, places
from jpeft.method import ADDED, Layer, Method, factory, not_head, with_head
from jpeft.tree.kernels import AxesRules

RULE = f"{ADDED}/rule"  # the shared factors A, once at the adapter's root


@factory
def compacter(
    *,
    size: int | None = None,
    reduction: int = 32,
    division: int = 4,
    rank: int = 1,
    plus_plus: bool = False,
    activation: str = "gelu_new",
    std: float = 1e-4,
    target: str | Sequence[str] | None = None,
    train_norms: bool = True,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Compacter: ``h' = h + W_up act(W_down h + b_down) + b_up`` with ``W = Σ_i A_i ⊗ (S_i T_i)``, i = 1 … n.

    The n × n matrices A_i are shared by all kernels of all layers; S_i and T_i of rank r are a kernel's own. Adapters sit as Houlsby's do,
    behind self-attention and behind the feed-forward layer, each before its residual sum. All LayerNorms are trained too.

    Args:
      size: Bottleneck width m; an adapter on width d has ``2 r (d + m) + m + d`` parameters. None for d / `reduction`, rounded down to a
        multiple of n.
      reduction: d / m, where `size` is not given.
      division: n. It divides d and m.
      rank: r of each ``S_i T_i``.
      plus_plus: Compacter++: no adapter behind attention.
      activation: "gelu_new" (tanh approximation), "gelu" (exact), "relu", "silu" or "tanh".
      std: Standard deviation of A at first. So small that the model begins near the base.
      target: The kernels whose outputs are adapted instead; a regex or a list of names.
      train_norms: Train scale and bias of all normalisation layers, as the paper does.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It adds computation and so has no merge.

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

    Follows the authors' code (rabeehk/compacter) in all initial values: S and T Glorot-uniform with gain √2, A normal. As there, the
    cross-attention of an encoder-decoder gets no adapter.
    """
    bottleneck.check(size, activation)
    for name, value in {"reduction": reduction, "division": division, "rank": rank}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if plus_plus and target is not None:
        raise ValueError("plus_plus=True chooses the feed-forward layers; with a target of your own leave it out.")
    n, where = division, target or (FEED_FORWARD if plus_plus else SELF_AND_FEED_FORWARD)

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del stats
        out = {path: tree.copy(leaf) for path, leaf in not_head(params, head).items() if train_norms and re.fullmatch(NORMS, path)}
        out[RULE] = std * jax.random.normal(tree.key_for(key, RULE), (n, n, n))
        for place in places(params, where, axes=axes, head=head):
            m = size or max(n, place.width // reduction // n * n)
            if place.width % n or m % n:
                raise ValueError(f"division={n} must divide the width {place.width} of '{place.leaf}' and the bottleneck's {m}.")
            out |= bottleneck.added(place, _factors(tree.key_for(key, place.leaf), place, m, n, rank))
        return tree.unflatten(out)

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        del rng
        return tree.graft(params, with_kernels(adapter))

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        del rng
        return bottleneck.on_hidden(layer(*inputs), lambda h: h + bottleneck.apply(leaves[ADDED], h, activation))

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: leaf, why_not=bottleneck.WHY_NOT)

    return Method(init=with_head(init_fn, head), bind=bind_fn, call=call_fn, merge=merge_fn, reduces=True)


def _factors(key: jax.Array, place: Place, m: int, n: int, rank: int) -> dict[str, Any]:
    """S, T and bias of both kernels of an adapter."""
    out: dict[str, Any] = {}
    for side, inputs, outputs in (("down", place.width, m), ("up", m, place.width)):
        left, right = jax.random.split(tree.key_for(key, side))
        out[side] = {
            "left": _glorot(left, (*place.stack, n, inputs // n, rank)),
            "right": _glorot(right, (*place.stack, n, rank, outputs // n)),
            "bias": jnp.zeros((*place.stack, outputs)),
        }
    return out


def _glorot(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Glorot-uniform with gain √2, each of the n matrices by itself."""
    bound = (2 * 6 / (shape[-2] + shape[-1])) ** 0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def kronecker_sum(
    rule: Float[Array, "n n n"], left: Float[Array, "*stack n p r"], right: Float[Array, "*stack n r q"]
) -> Float[Array, "*stack np nq"]:
    """``Σ_i A_i ⊗ (S_i T_i)``."""
    kernel = jnp.einsum("iac,...ipr,...irq->...apcq", rule, left, right)
    *stack, a, p, c, q = kernel.shape
    return kernel.reshape(*stack, a * p, c * q)


def with_kernels(adapter: tree.Adapter) -> tree.Adapter:
    """The adapter with kernels in the place of their factors: one of ordinary bottlenecks, for plain and for stacked layers alike."""
    leaves = tree.flatten(adapter)
    rule, out = leaves.pop(RULE), {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        if f"/{ADDED}/" not in path or name == "bias":
            out[path] = leaf
        elif name == "left":
            out[f"{module}/kernel"] = kronecker_sum(rule, leaf, leaves[f"{module}/right"])
    return tree.unflatten(out)
