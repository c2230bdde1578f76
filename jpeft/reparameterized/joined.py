"""A low-rank update inside the layer's own product: ``y = [x, s x a] [W; b]``.

The factored view reads and writes `y` once more to add the update, and in bfloat16 it rounds the sum: an update below the grid of `y` is
lost. Here the update is summed where the product sums, in float32, and `y` is written and rounded once. The price are copies: of x with r
more columns and of W with r more rows, so it moves fewer bytes than the factored view where N F > N D + D F, for N inputs of size D and F
outputs. The FLOPs are those of the factored view.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.layer import Layer, Linear

Params = Mapping[str, Any]


def applies(layer: Layer, linear: Linear, inputs: tuple[Any, ...]) -> bool:
    """Whether the layer is one whose inputs can be made longer, and no middleware stands around it that would see them."""
    return linear.apply_joined is not None and not layer.is_wrapped and len(inputs) == 1


def joined(layer: Layer, linear: Linear, scale: float, x: Float[Array, "*batch d"], a: Float[Array, "d r"], b: Float[Array, "r f"]) -> Any:
    """A layer on x with the update ``s a b``.

    A custom VJP keeps x and no copy. The backward pass forms ``s x a`` again, and gets its gradient and that of x from one product.
    """
    return _joined(linear, scale, dict(layer.params), x, a.astype(layer.dtype), b.astype(layer.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _joined(linear: Linear, scale: float, params: Params, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    assert linear.apply_joined is not None
    return linear.apply_joined(params, x, _down(linear, scale, x, a), b)


def _forward(linear: Linear, scale: float, params: Params, x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return _joined(linear, scale, params, x, a, b), (params, x, a, b)


def _backward(linear: Linear, scale: float, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    run = linear.apply_joined
    assert run is not None
    assert linear.apply_columns is not None
    params, x, a, b = kept
    hidden, pull_down = jax.vjp(functools.partial(_down, linear, scale), x, a)
    _, pull = jax.vjp(lambda params, x, hidden: run(params, x, hidden, b), params, x, hidden)
    dparams, dx, dhidden = pull(dy)
    # Not from the product above, whose gradient for [W; b] has the rows of W too.
    (db,) = jax.vjp(functools.partial(linear.apply_columns, hidden), b)[1](dy)
    through_hidden, da = pull_down(dhidden)
    return dparams, dx + through_hidden, da, db


_joined.defvjp(_forward, _backward)


def _down(linear: Linear, scale: float, x: jax.Array, a: jax.Array) -> jax.Array:
    """``s x a``."""
    assert linear.apply_columns is not None
    hidden = linear.apply_columns(x, a)
    return jnp.asarray(scale, hidden.dtype) * hidden
