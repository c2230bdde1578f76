"""Train some output columns of a linear layer while the layer runs whole.

FAR trains some output neurons of a layer, its *learners*. Beside a kernel [inputs, outputs] stand ``values`` [inputs, n], the columns of
the n learners, and ``indices`` [n], the numbers of these columns (`jpeft.selective.indices`). Beside a bias [outputs] stand ``values`` [n]
and ``indices`` [n]. The layer runs on W', the kernel with the learners' columns in their places:

    forward     y  = x W'
    backward    dx = dy W'^T,     dvalues = x^T dy[:, indices]

The gradient of a frozen column is never formed. FAR's paper splits the layer in two instead, ``[x W_learners, x W_frozen]``, and permutes
the outputs back into order. Outputs and gradients are the same, but the split copies both parts and gathers the outputs at every step. In
both forms the layer's input x is kept for the backward pass.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.layer import Layer, Linear
from jpeft.selective.indices import INDICES, VALUES, as_integers

Run = Callable[[Mapping[str, Any], jax.Array], jax.Array]  # (parameters of the layer, x) -> y


def place_columns(
    leaf: Float[Array, "*rows outputs"], values: Float[Array, "*rows n"], indices: Float[Array, "*stack n"], axis: int = 0
) -> Float[Array, "*rows outputs"]:
    """Replace some columns of a kernel [*stack, inputs, outputs], or some entries of a bias [*stack, outputs], in the leaf's dtype.

    All other entries are bit for bit the same. A stack may be on another `axis` of all three, 1 or -1.

    >>> import jax.numpy as jnp
    >>> place_columns(jnp.zeros((2, 4)), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 3.0]))
    Array([[0., 1., 0., 2.],
           [0., 3., 0., 4.]], dtype=float32)
    """
    if indices.ndim > 1:  # each layer of a stack has its own learners
        return jax.vmap(place_columns, in_axes=axis, out_axes=axis)(leaf, values, indices)
    at = as_integers(indices)
    # XLA runs a scatter into columns as a loop. So each output gathers its column from the values, and a `where` keeps the frozen ones.
    position = jnp.full(leaf.shape[-1:], -1).at[at].set(jnp.arange(at.size), unique_indices=True)  # [outputs]: place in `values`, or -1
    learns = (position >= 0).reshape((1,) * (leaf.ndim - 1) + (-1,))  # [1, outputs], or [outputs] of a bias
    gathered = jnp.take(values.astype(leaf.dtype), jnp.maximum(position, 0), axis=-1, mode="clip")  # [inputs, outputs]
    return jnp.where(learns, gathered, leaf)


def place_leaves(params: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A layer's parameters with the learners in their places: those of the kernel, and those of the bias if it has some."""
    return {**params, **{name: place_columns(params[name], pair[VALUES], pair[INDICES]) for name, pair in leaves.items()}}


def run_with_columns(layer: Layer, linear: Linear, inputs: tuple[Any, ...], leaves: dict[str, Any]) -> jax.Array:
    """Run a layer with its learners: the whole kernel forward, the gradient of the learners' columns alone backward.

    Args:
      layer: A layer without middleware around it, as its outputs must be linear in the kernel.
      linear: Its geometry, with `apply_columns`.
      inputs: Its inputs.
      leaves: The pairs of values and indices beside the kernel and, perhaps, the bias.
    """
    x, *static = inputs
    kernel = leaves[linear.name]
    # A bias is small: its learners are placed in the ordinary way, and JAX differentiates that.
    params = place_leaves(layer.params, {name: pair for name, pair in leaves.items() if name != linear.name})

    def run(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return layer.run(params, x, *static)

    return _run_placed(run, linear, params, x, kernel[VALUES], kernel[INDICES])


def delay_until(values: Float[Array, "*shape"], until: jax.Array) -> Float[Array, "*shape"]:
    """Return `values` unchanged but only after `until` is computed, so that XLA does not keep a second copy of every kernel.

    The kernel with the learners in their places is a copy of the layer's kernel. Forward and backward pass each form the copy when they
    need it, so one copy exists at a time. XLA would otherwise form the copies of all layers at the start, or keep each from the forward to
    the backward pass.
    """
    # XLA on CPU ignores optimization_barrier, so there we use a `where` that it cannot simplify: no number is greater than infinity.
    tied = lambda values, until: jnp.where(until.reshape(-1)[0] > jnp.inf, jnp.zeros_like(values), values)
    barred = lambda values, until: jax.lax.optimization_barrier((values, until))[0]
    return jax.lax.platform_dependent(values, until, cpu=tied, default=barred)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_placed(
    run: Run,
    linear: Linear,
    params: Mapping[str, Any],
    x: Float[Array, "*batch inputs"],
    values: Float[Array, "inputs n"],
    indices: Float[Array, " n"],
) -> Float[Array, "*batch outputs"]:
    return run({**params, linear.name: place_columns(params[linear.name], delay_until(values, x), indices)}, x)


def _forward(
    run: Run, linear: Linear, params: Mapping[str, Any], x: jax.Array, values: jax.Array, indices: jax.Array
) -> tuple[jax.Array, Any]:
    # W' is not kept: the backward pass forms it again from the learners, which costs one pass over the kernel.
    return _run_placed(run, linear, params, x, values, indices), (params, x, values, indices)


def _backward(run: Run, linear: Linear, kept: Any, dy: Float[Array, "*batch outputs"]) -> tuple[Any, ...]:
    params, x, values, indices = kept
    late = delay_until(values, dy)
    _, pull_layer = jax.vjp(lambda params, x: run({**params, linear.name: place_columns(params[linear.name], late, indices)}, x), params, x)
    # Under `jit`, the gradients of the whole kernel and of other parameters that nobody asks for are dead code.
    dparams, dx = pull_layer(dy)
    assert linear.apply_columns is not None
    dy_learners = jnp.take(dy, as_integers(indices), axis=-1, mode="clip")  # [*batch, n]
    _, pull_columns = jax.vjp(functools.partial(linear.apply_columns, x), values)
    (dvalues,) = pull_columns(dy_learners)  # x^T dy: [inputs, n]
    return dparams, dx, dvalues.astype(values.dtype), jnp.zeros_like(indices)


_run_placed.defvjp(_forward, _backward)
