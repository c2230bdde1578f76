"""One layer, two views, for any update ``W + delta(leaves)`` whose product with the inputs has a cheap way of its own.

It is what `jpeft.reparameterized.two_view` is to ``s a b``. The *branch* computes ``x delta`` without the kernel-sized `delta`. The merged
view takes forward pass and dX from the layer on ``W + delta``, and the gradient of the leaves from the branch, so that no gradient of the
kernel's size is formed. The factored view is ``layer(x) + branch(x)``.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core.layer import Layer, Linear
from jpeft.core.residuals import changed
from jpeft.reparameterized.two_view import add

Leaves = Mapping[str, jax.Array]


class Update(NamedTuple):
    """An update of a kernel in both of its forms. The functions close over no array.

    Attributes:
      delta: ``leaves -> delta``, in the kernel's shape and the dtype of the leaves.
      branch: ``(x, leaves) -> y``: the layer without its bias on `delta`, in the layer's dtype.
      per_row: FLOPs of the branch for one row of inputs.
      once: FLOPs of forming `delta`.
    """

    delta: Callable[[Leaves], jax.Array]
    branch: Callable[[jax.Array, Leaves], jax.Array]
    per_row: int
    once: int


def added(layer: Layer, linear: Linear, inputs: tuple[Any, ...], leaves: Leaves, update: Update) -> jax.Array:
    """A layer with an update, in the cheaper view for the layer's shape and dtypes."""
    x, *static = inputs
    # With middleware of another method in between, a bottleneck say, the outputs are no longer linear in the kernel.
    if "merged" in linear.views and not layer.is_wrapped and ("factored" not in linear.views or _merges(layer, linear, inputs, update)):

        def run(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
            return layer.run(params, x, *static)

        return _merged(run, linear.name, update, dict(layer.params), x, dict(leaves))
    y = layer(*inputs)
    return changed(y + update.branch(x, leaves).astype(y.dtype))


def thinned(
    layer: Layer, linear: Linear, inputs: tuple[Any, ...], leaves: Leaves, update: Update, key: jax.Array, thinning: "Thinning"
) -> jax.Array:
    """A layer with an update of which training leaves out some outputs, or all, as LyCORIS does."""
    y, change = layer(*inputs), update.branch(inputs[0], leaves)
    key_outputs, key_whole = jax.random.split(key)
    if thinning.outputs and linear.scale_outputs is not None:
        axes, shape = linear.axes, layer.params[linear.name].shape
        kept = jax.random.bernoulli(key_outputs, 1 - thinning.outputs, [shape[i] for i in sorted(axes.stack + axes.outputs)])
        mask = kept.astype(change.dtype)
        change = linear.scale_outputs(change, mask / jnp.maximum(mask.mean(), 1 / mask.size) if thinning.rescale else mask)
    if thinning.whole:
        change = jnp.where(jax.random.bernoulli(key_whole, 1 - thinning.whole), change, 0)
    return changed(y + change.astype(y.dtype))


class Thinning(NamedTuple):
    """What of an update a step of training leaves out.

    Attributes:
      outputs: The probability of each output.
      whole: The probability of all of it, at one layer.
      rescale: Whether the other outputs are divided by their share.
    """

    outputs: float
    whole: float
    rescale: bool = True


def _merges(layer: Layer, linear: Linear, inputs: tuple[Any, ...], update: Update) -> bool:
    """Whether the merged view is both exact enough and cheaper; see `two_view.applies`, whose rule for dtypes this is."""
    kernel, x = layer.params[linear.name], inputs[0]
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(kernel.dtype, jnp.floating) or jnp.finfo(kernel.dtype).bits < 32:
        return False
    stack = math.prod(kernel.shape[i] for i in linear.axes.stack)
    ins, outs = linear.axes.fan_in(kernel.shape), linear.axes.fan_out(kernel.shape)
    rows = x.size / (ins * stack) if linear.reads_once else layer.shape(*inputs).size / (outs * stack)
    # Each side adds its result to an array of its size.
    return rows * (update.per_row + outs) > update.once + ins * outs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _merged(run: Callable[..., jax.Array], name: str, update: Update, params: dict[str, Any], x: jax.Array, leaves: Any) -> jax.Array:
    return run(_substituted(name, update, params, leaves), x)


def _forward(run: Callable[..., jax.Array], name: str, update: Update, params: dict[str, Any], x: jax.Array, leaves: Any) -> Any:
    # The backward pass forms the kernel again: keeping it would need a second copy of all weights.
    return run(_substituted(name, update, params, leaves), x), (params, x, leaves)


def _backward(run: Callable[..., jax.Array], name: str, update: Update, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    params, x, leaves = kept
    # Under `jit`, XLA drops the forward pass inside `vjp` and the frozen kernel's gradient, which nobody asks for.
    _, pull_layer = jax.vjp(run, _substituted(name, update, params, leaves), x)
    dparams, dx = pull_layer(dy)
    y, pull_branch = jax.vjp(functools.partial(update.branch, x), leaves)
    return dparams, dx, *pull_branch(dy.astype(y.dtype))


_merged.defvjp(_forward, _backward)


def _substituted(name: str, update: Update, params: dict[str, Any], leaves: Any) -> dict[str, Any]:
    return {**params, name: add(params[name], update.delta(leaves))}
