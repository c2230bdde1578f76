"""LoRA: low-rank updates of kernels."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.method import Layer, Method, factory, not_head, with_head
from jpeft.reparameterized import two_view
from jpeft.tree.kernels import AxesRules, KernelAxes, axes_of, axes_rules
from jpeft.tree.select import Rules, first_match, select


@factory
def lora(
    *,
    rank: int | Rules = 8,
    alpha: float | Rules = 16.0,
    target: str | Sequence[str] = r"(.*/)?kernel",
    dropout: float = 0.0,
    rslora: bool = False,
    init: str = "kaiming",
    view: str = "auto",
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""LoRA: ``W' = W + s a b`` with a low-rank ``a b``, trained in place of ``W``.

    ``h = W x + (alpha / r) b a dropout(x)`` in the paper's symbols; here, with Flax's (in, out) kernels, ``y = layer(x) + s (x a) b``,
    ``a`` of shape ``[*stack, *inputs, r]``, ``b`` of shape ``[*stack, r, *outputs]``, ``s = alpha / r``. ``b`` is zero at the start, so
    the adapted model begins as the base. One ``a`` is shared by all heads of a kernel with a head axis.

    Args:
      rank: r; or rules ``{regex or module path: r}``, first match wins.
      alpha: Scale before the division by r; or rules. 16 for rank 8 is what the authors' GLUE scripts use.
      target: Which kernels. A regex for whole paths, or a list of names as in HF PEFT, ``["query", "value"]``; by default every kernel
        but the head's, which reaches full fine-tuning's quality where query and value alone do not (Schulman et al., 2025,
        https://thinkingmachines.ai/blog/lora). ``embedding`` leaves can be targets too.
      dropout: Rate on the input of the branch alone; active when the model is given a ``dropout`` rng.
      rslora: ``s = alpha / sqrt(r)``, which keeps the update's size as r grows (https://arxiv.org/abs/2312.03732).
      init: ``a`` is uniform in +-1/sqrt(fan_in) ("kaiming", the authors' code) or N(0, 1/r^2) ("gaussian"). For embeddings it is ``b``
        that is random, N(0, 1), and ``a`` that is zero.
      view: How training computes it. "two-view" takes forward and dX from the merged kernel and da, db from the factors
        (`jpeft.reparameterized.two_view`); "factored" is the equation above, and the one for forward-mode derivatives; "auto" takes
        the cheaper one for each layer's shape.
      axes: Geometry of kernels with more than two axes, ``((regex, KernelAxes), ...)``, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1, a dropout rate outside [0, 1), an unknown view or init; from `init` for a target that matches nothing
        or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> peft = jpeft.apply(params, method=jpeft.lora(rank=4))
    >>> jax.tree.map(jnp.shape, peft.adapter)
    {'query': {'kernel': {'a': (32, 4), 'b': (4, 16)}}}

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, https://arxiv.org/abs/2106.09685.

    Differs from HF PEFT in the default target (there query and value, by architecture) and alpha (there 8), and in computing in the
    layer's own dtype with float32 factors (there a bfloat16 input is cast to float32 for the branch).
    """
    rules = axes_rules(axes)
    ranks = [r for _, r in rank] if isinstance(rank, tuple) else [rank]
    if not all(isinstance(r, int) and r >= 1 for r in ranks):
        raise ValueError(f"rank={rank!r}: every rank must be a whole number of at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be at least 0 and below 1.")
    if init not in ("kaiming", "gaussian"):
        raise ValueError(f"init={init!r} is not one of 'kaiming', 'gaussian'.")
    if view not in ("auto", "two-view", "factored"):
        raise ValueError(f"view={view!r} is not one of 'auto', 'two-view', 'factored'.")

    def scale(path: str) -> float:
        r = first_match(path, rank, "rank")
        return first_match(path, alpha, "alpha") / (math.sqrt(r) if rslora else r)

    def delta(path: str, shape: tuple[int, ...], leaves: dict[str, Any]) -> jax.Array:
        return scale(path) * axes_of(path, shape, rules).product(leaves["a"], leaves["b"])

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del stats
        kernels = {path: leaf for path, leaf in not_head(params, head).items() if len(leaf.shape) > 1 and not path.endswith("bias")}
        chosen = select(kernels, target, params=params)
        return tree.unflatten({path: factors(tree.key_for(key, path), path, kernels[path].shape) for path in chosen})

    def factors(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        geometry, r = axes_of(path, shape, rules), first_match(path, rank, "rank")
        shape_a, shape_b = geometry.factor_shapes(shape, r)
        if path.rpartition("/")[2] == "embedding":
            return {"a": jnp.zeros(shape_a), "b": jax.random.normal(key, shape_b)}
        bound = 1 / math.sqrt(geometry.fan_in(shape))
        a = jax.random.uniform(key, shape_a, minval=-bound, maxval=bound) if init == "kaiming" else jax.random.normal(key, shape_a) / r
        return {"a": a, "b": jnp.zeros(shape_b)}

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        linear = layer.linear
        if linear is None or list(leaves) != [linear.name]:
            # A module of the user's own: all that is known is its parameters, so it runs on the merged ones.
            deltas = {name: delta(f"{layer.path}/{name}", layer.params[name].shape, ab) for name, ab in leaves.items()}
            return layer.run({**layer.params, **{name: two_view.add(layer.params[name], d) for name, d in deltas.items()}}, *inputs)
        a, b = leaves[linear.name]["a"], leaves[linear.name]["b"]
        path, s = f"{layer.path}/{linear.name}", scale(f"{layer.path}/{linear.name}")
        check_geometry(path, layer.params[linear.name].shape, linear.axes, first_match(path, rank, "rank"), a, b)
        x = inputs[0]
        if dropout and rng is not None and jnp.issubdtype(x.dtype, jnp.floating):
            keep = jax.random.bernoulli(rng, 1 - dropout, x.shape)
            return two_view.factored(layer, linear, s, inputs, jnp.where(keep, x / (1 - dropout), 0).astype(x.dtype), a, b)
        # With the middleware of another method in between, a bottleneck say, what comes out is no longer linear in the kernel.
        if not layer.beneath and (two_view.applies(layer, linear, inputs, a) if view == "auto" else view == "two-view"):
            return two_view.two_view(layer, linear, s, inputs, a, b)
        return two_view.factored(layer, linear, s, inputs, x, a, b)

    def fold_fn(path: str, kernel: jax.Array, leaves: dict[str, Any]) -> jax.Array:
        return two_view.add(kernel, delta(path, kernel.shape, leaves))

    return Method(init=with_head(init_fn, head), call=call_fn, merge=lambda params, adapter: tree.merge_leaves(params, adapter, fold_fn))


def check_geometry(path: str, shape: tuple[int, ...], axes: KernelAxes, rank: int, a: jax.Array, b: jax.Array) -> None:
    """Compare the factors with what the real layer says of its kernel: a name may have promised another geometry.

    Raises:
      ValueError: if they differ, with the rule that mends it.
    """
    expected = axes.factor_shapes(shape, rank)
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"'{path}': the layer's kernel {shape} has inputs {axes.inputs} and outputs {axes.outputs}, which asks for factors of shapes "
            f"{expected[0]} and {expected[1]}, but the adapter holds {a.shape} and {b.shape}. Its axes were taken from its name; "
            "let the model tell them: axes=jpeft.kernel_axes(model, params, *example_inputs)."
        )
