"""Learners: some output neurons of a linear layer that are trained, while the layer runs whole.

Of a kernel [inputs, outputs], the columns of the learners stand beside it as ``values`` [inputs, n], their places as ``indices`` [n], whole
numbers in float32 as in `jpeft.selective.sparse`; of a bias likewise. The layer runs on the kernel with these columns in their places:

    forward     y  = x W'            W' = W with the learners' columns
    backward    dx = dy W'^T         and, for the learners alone,  dW_t = x^T dy[:, learners]

No gradient of a frozen column is formed, let alone kept. FAR's paper splits the layer in two instead, ``[x W_t, x W_f]``, and permutes the
outputs back into their order; that has the same outputs and gradients for every split, but needs copies of both parts and a gather of the
outputs at every step. What the input x of a layer with learners is needed for remains: it is kept for the backward pass either way.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.layer import Layer, Linear

VALUES, INDICES = "values", "indices"
Run = Callable[[Mapping[str, Any], jax.Array], jax.Array]


def places(indices: jax.Array) -> jax.Array:
    """The indices as integers; they take no gradient."""
    return jnp.rint(jax.lax.stop_gradient(indices)).astype(jnp.int32)


def placed(leaf: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    """A kernel [*stack, inputs, outputs] or bias [*stack, outputs] with the learners' part in its place; all else is bit for bit the same.

    Written as a gather and a choice, element by element, because XLA runs a scatter into columns as a loop.

    >>> import jax.numpy as jnp
    >>> placed(jnp.zeros((2, 4)), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 3.0]))
    Array([[0., 1., 0., 2.],
           [0., 3., 0., 4.]], dtype=float32)
    """
    if indices.ndim > 1:
        return jax.vmap(placed)(leaf, values, indices)
    at = places(indices)
    # For each output its position among the learners, or -1.
    position = jnp.full(leaf.shape[-1:], -1).at[at].set(jnp.arange(at.size), unique_indices=True)
    learns = (position >= 0).reshape((1,) * (leaf.ndim - 1) + (-1,))
    return jnp.where(learns, jnp.take(values.astype(leaf.dtype), jnp.maximum(position, 0), axis=-1, mode="clip"), leaf)


def apply(layer: Layer, linear: Linear, inputs: tuple[Any, ...], leaves: dict[str, Any]) -> jax.Array:
    """The layer with its learners: the whole kernel forward, the gradient of the learners' columns alone backward."""
    x, *static = inputs
    kernel = leaves[linear.name]
    others = {name: placed(layer.params[name], part[VALUES], part[INDICES]) for name, part in leaves.items() if name != linear.name}

    def run(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return layer.run(params, x, *static)

    return _layer(run, linear, {**layer.params, **others}, x, kernel[VALUES], kernel[INDICES])


def delay_until(values: jax.Array, until: jax.Array) -> jax.Array:
    """The values, bit for bit, but not before another array is there.

    The kernel with its learners is a copy of the layer's weights. Formed when it is needed, forward and again backward, there is one at a
    time; formed at once, or kept from one to the other, there would be a second copy of all layers. XLA for CPUs schedules what can be
    computed as early as it can, merges equal computations, and heeds no barrier in that, so there the values pass through a choice whose
    outcome it cannot foresee: no number is greater than infinity.
    """
    tied = lambda values, until: jnp.where(until.reshape(-1)[0] > jnp.inf, jnp.zeros_like(values), values)
    barred = lambda values, until: jax.lax.optimization_barrier((values, until))[0]
    return jax.lax.platform_dependent(values, until, cpu=tied, default=barred)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(run: Run, linear: Linear, params: Mapping[str, Any], x: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    return run({**params, linear.name: placed(params[linear.name], delay_until(values, x), indices)}, x)


def _forward(
    run: Run, linear: Linear, params: Mapping[str, Any], x: jax.Array, values: jax.Array, indices: jax.Array
) -> tuple[jax.Array, Any]:
    return _layer(run, linear, params, x, values, indices), (params, x, values, indices)


def _backward(run: Run, linear: Linear, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    params, x, values, indices = kept
    again = delay_until(values, dy)
    _, pull_layer = jax.vjp(lambda params, x: run({**params, linear.name: placed(params[linear.name], again, indices)}, x), params, x)
    # The gradient of the whole kernel, and of whatever else nobody asked for, is dead code under `jit`.
    dparams, dx = pull_layer(dy)
    assert linear.apply_columns is not None
    _, pull_columns = jax.vjp(functools.partial(linear.apply_columns, x), values)
    (dvalues,) = pull_columns(jnp.take(dy, places(indices), axis=-1, mode="clip"))
    return dparams, dx, dvalues.astype(values.dtype), jnp.zeros_like(indices)


_layer.defvjp(_forward, _backward)
