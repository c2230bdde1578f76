"""Initial values of trained leaves. An initializer is a function ``(key, shape) -> array``, float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """All zeros."""
    del key
    return jnp.zeros(shape)


def normal(std: float) -> Initializer:
    """N(0, std²)."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def truncated_normal(std: float) -> Initializer:
    """N(0, std²) truncated at two standard deviations and not rescaled, as in TensorFlow: the resulting deviation is 0.88 `std`."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -2, 2, shape)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], *, fan_in: int | None = None) -> Float[Array, "..."]:
    """Uniform within ± 1 / √fan_in, as torch initialises linear layers (``kaiming_uniform(a=√5)``).

    Args:
      key: A random key.
      shape: Shape of the leaf.
      fan_in: Number of inputs of the layer. By default the second to last axis of `shape`, which a kernel [*stack, inputs, outputs] has
        its inputs on; a bias must be given it.
    """
    bound = (shape[-2] if fan_in is None else fan_in) ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def glorot_uniform(gain: float) -> Initializer:
    """Uniform within ± gain √(6 / (inputs + outputs)), where the last two axes of the shape are inputs and outputs."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> Any:
        bound = (gain**2 * 6 / (shape[-2] + shape[-1])) ** 0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return draw
