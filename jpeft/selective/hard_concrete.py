"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or exactly 1 with positive probability and still have a gradient.

``s = sigmoid(log u - log(1 - u) + alpha)`` with u uniform is stretched to ``s' = s (r - l) + l`` and clipped, ``z = min(1, max(0, s'))``.
From Louizos, Welling and Kingma, 2018, https://arxiv.org/abs/1712.01312, with the constants of DiffPruning: l = -1.5, r = 1.5,
temperature 1. So ``P(z > 0) = sigmoid(alpha)`` and ``P(z = 1) = sigmoid(alpha - log 5)``.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOW, HIGH = -1.5, 1.5
CLAMP = 1e-4  # u keeps this distance from 0 and 1, whose logits are infinite


def gate(alpha: Float[Array, "*#shape"], u: Float[Array, "*#shape"] | float) -> Float[Array, "..."]:
    """The gate z for a given u. It increases with both arguments, and alpha has a gradient where z is neither 0 nor 1.

    >>> import jax.numpy as jnp
    >>> [float(gate(jnp.zeros(()), u)) for u in (0.25, 0.5, 0.9)]
    [0.0, 0.0, 1.0]
    """
    u = jnp.asarray(u, alpha.dtype)
    s = jax.nn.sigmoid(jnp.log(u) - jnp.log1p(-u) + alpha)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0, 1)


def sample(key: jax.Array, alpha: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """One draw of every gate."""
    u = jax.random.uniform(key, alpha.shape, alpha.dtype)
    return gate(alpha, jnp.clip(u, CLAMP, 1 - CLAMP))


def median(alpha: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The median of every gate, which replaces a draw where nothing may be random."""
    return gate(alpha, 0.5)


def open_probability(alpha: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``P(z > 0) = sigmoid(alpha - log(-l / r))``, which makes the expected number of open gates differentiable."""
    return jax.nn.sigmoid(alpha - math.log(-LOW / HIGH))
