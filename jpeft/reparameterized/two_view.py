"""One layer, two views: the cheapest forward and backward pass of a linear layer with a low-rank update.

For ``y = layer(W + s a b, x)`` with N inputs of size D, F outputs and rank r, leaving out the layer's own 2NDF each way:

| view | forward | dX | da, db |
|---|---|---|---|
| factored, ``layer(W, x) + s (x a) b`` | 2N(D+F)r, and another N x F activation | 2N(D+F)r | 4N(D+F)r less what is kept |
| merged, ``layer(W + s a b, x)`` | 2DFr | 2DFr | 2NDF for a dense dW, then contracted |

Neither is best at everything: the merged view has the cheapest forward and the cheapest dX, the factored view gets da and db without ever
forming dW. A custom VJP takes each from where it is cheapest. Choosing the form of the computation by its cost is the idea of RunLoRA
(Cherniuk et al., 2023, https://arxiv.org/abs/2312.03415); here it works around any layer that is linear in its kernel, since the merged
view is the layer itself, run on another kernel.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.dropout import inverted_dropout
from jpeft.core.layer import Layer, Linear
from jpeft.core.residuals import changed
from jpeft.reparameterized import joined

Run = Callable[..., jax.Array]
A = Float[Array, "..."]  # [*stack, *inputs, r], in the order of the kernel's axes
B = Float[Array, "..."]  # [*stack, r, *outputs], likewise
Start = tuple[A, B] | None  # the factors that a and b began as, where their product is taken off the update


def low_rank(
    layer: Layer,
    linear: Linear,
    scale: float,
    inputs: tuple[Any, ...],
    a: A,
    b: B,
    *,
    view: str = "auto",
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    start: Start = None,
) -> jax.Array:
    """A layer with the update ``s a b``, in the view that is asked for; "auto" takes the cheaper one for the layer's shape.

    A layer that cannot be run in the view takes the factored one, and so does one whose branch has inputs of its own, by dropout. With
    `start`, the factors ``(a0, b0)`` that ``a`` and ``b`` began as, the update is ``s (a b - a0 b0)``; they take no gradient.
    """
    if dropout and rng is not None and jnp.issubdtype(inputs[0].dtype, jnp.floating):
        return factored(layer, linear, scale, inputs, inverted_dropout(rng, inputs[0], dropout), a, b, start)
    if view == "joined" and start is None and joined.applies(layer, linear, inputs):
        return changed(joined.joined(layer, linear, scale, inputs[0], a, b))
    # With middleware of another method in between, a bottleneck say, the outputs are no longer linear in the kernel.
    if "merged" in linear.views and not layer.is_wrapped:
        wanted = "factored" not in linear.views or (applies(layer, linear, inputs, a) if view == "auto" else view == "two-view")
        if wanted:
            return two_view(layer, linear, scale, inputs, a, b, start)
    return factored(layer, linear, scale, inputs, inputs[0], a, b, start)


def factored(
    layer: Layer, linear: Linear, scale: float, inputs: tuple[Any, ...], x: jax.Array, a: A, b: B, start: Start = None
) -> jax.Array:
    """``layer(inputs) + s (x a) b``; ``x`` is the branch's own input, which dropout may have thinned. The start's branch is not thinned."""
    y = layer(*inputs)  # [*batch, *outputs]
    # The branch computes in the layer's own dtype, where float32 leaves would widen all its activations; its sum is brought to that of y.
    a, b = a.astype(layer.dtype), b.astype(layer.dtype)
    branch = linear.apply_low_rank(x, a, b)
    if start is not None:
        a0, b0 = (jax.lax.stop_gradient(leaf).astype(layer.dtype) for leaf in start)
        branch = branch - linear.apply_low_rank(inputs[0], a0, b0)
    return changed(y + (scale * branch).astype(y.dtype))


def add(kernel: Float[Array, "*kernel"], delta: Float[Array, "*kernel"]) -> jax.Array:
    """``W + delta``, summed in the wider of the two dtypes and kept in the kernel's own."""
    return (kernel.astype(jnp.promote_types(kernel.dtype, delta.dtype)) + delta).astype(kernel.dtype)


def two_view(layer: Layer, linear: Linear, scale: float, inputs: tuple[Any, ...], a: A, b: B, start: Start = None) -> jax.Array:
    """``layer(W + s a b, x)``: forward and dX of the merged view, da and db of the factored one. Equal to both up to rounding."""
    x, *static = inputs  # the inputs after x are configuration, such as the equation of an einsum

    def run(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return layer.run(params, x, *static)

    # All arrays are arguments of the custom VJP: a function that closed over a traced array would hide the array from autodiff.
    return _two_view(run, linear, scale, dict(layer.params), x, a, b, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _two_view(run: Run, linear: Linear, scale: float, params: Mapping[str, Any], x: jax.Array, a: A, b: B, start: Start) -> jax.Array:
    return run(_substituted(linear, scale, params, a, b, start), x)


def _forward(
    run: Run, linear: Linear, scale: float, params: Mapping[str, Any], x: jax.Array, a: A, b: B, start: Start
) -> tuple[jax.Array, Any]:
    # The backward pass forms the merged kernel again, for 2DFr FLOPs. Keeping it would need a second copy of all weights.
    return run(_substituted(linear, scale, params, a, b, start), x), (params, x, a, b, start)


def _backward(run: Run, linear: Linear, scale: float, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    params, x, a, b, start = kept
    # dX from the merged view. Under `jit`, XLA drops the forward pass inside `vjp` and the gradients of parameters that are not used: the
    # frozen kernel's [inputs, outputs] gradient among them.
    _, pull_layer = jax.vjp(run, _substituted(linear, scale, params, a, b, start), x)
    dparams, dx = pull_layer(dy)
    # da and db from the factored view: x and dy meet through the rank, so nothing of the kernel's size is formed.
    _, pull_branch = jax.vjp(functools.partial(linear.apply_low_rank, x), a, b)
    # The scale multiplies the small results. Multiplying dy instead would make XLA compute dy's own inputs a second time.
    da, db = pull_branch(dy)
    return dparams, dx, (scale * da).astype(a.dtype), (scale * db).astype(b.dtype), jax.tree.map(jnp.zeros_like, start)


_two_view.defvjp(_forward, _backward)


def _substituted(linear: Linear, scale: float, params: Mapping[str, Any], a: A, b: B, start: Start) -> dict[str, Any]:
    """The layer's parameters with ``W + s a b``, or ``W + s (a b - a0 b0)``, in place of W."""
    update = linear.axes.product(a, b)
    update = update if start is None else update - linear.axes.product(*start)
    return {**params, linear.name: add(params[linear.name], scale * update)}


def applies(layer: Layer, linear: Linear, inputs: tuple[Any, ...], a: A) -> bool:
    """Whether the merged forward pass is both exact enough and cheaper: N > D F / (D + F).

    A kernel that is *stored* in bfloat16 would round a small update away: W is a number of that grid, and W + s a b goes back to it. The
    factored view is used there; also where the input takes no gradient, as token ids. A kernel that is stored in float32 and *computed
    with* in bfloat16 loses nothing. It is rounded in any case, and since it lies anywhere between two numbers of the grid, an update far
    below their distance moves as many of its entries across as it should. `y` is then not read and written once more.
    """
    kernel, x = layer.params[linear.name], inputs[0]
    wide = all(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32 for dtype in (kernel.dtype, a.dtype))
    if not wide or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    stack = math.prod(kernel.shape[i] for i in linear.axes.stack)
    ins, outs = linear.axes.fan_in(kernel.shape), linear.axes.fan_out(kernel.shape)
    # N, the number of positions at which the kernel is applied. Tracing the layer for the size of its output costs more than the layer.
    positions = inputs[0].size / (ins * stack) if linear.reads_once else layer.shape(*inputs).size / (outs * stack)
    return positions > ins * outs / (ins + outs)
