"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or exactly 1 with positive probability, and yet have a gradient.

``s = sigmoid(log u - log(1 - u) + alpha)`` with u uniform is stretched to ``s' = s (r - l) + l`` and clipped, ``z = min(1, max(0, s'))``.
Louizos, Welling and Kingma, 2018, https://arxiv.org/abs/1712.01312, with the constants of DiffPruning: l = -1.5, r = 1.5, temperature 1.
So ``P(z > 0) = sigmoid(alpha)`` and ``P(z = 1) = sigmoid(alpha - log 5)``.
"""

import math

import jax
import jax.numpy as jnp

LOW, HIGH = -1.5, 1.5
CLAMP = 1e-4  # u stays this far from 0 and 1, whose logits are infinite


def gate(alpha: jax.Array, u: jax.Array | float) -> jax.Array:
    """Z for a given u: increasing in both, with a gradient to alpha where it is neither 0 nor 1.

    >>> import jax.numpy as jnp
    >>> [float(gate(jnp.zeros(()), u)) for u in (0.25, 0.5, 0.9)]
    [0.0, 0.0, 1.0]
    """
    u = jnp.asarray(u, alpha.dtype)
    s = jax.nn.sigmoid(jnp.log(u) - jnp.log1p(-u) + alpha)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0, 1)


def sample(key: jax.Array, alpha: jax.Array) -> jax.Array:
    """One draw of every gate."""
    u = jax.random.uniform(key, alpha.shape, alpha.dtype)
    return gate(alpha, jnp.clip(u, CLAMP, 1 - CLAMP))


def median(alpha: jax.Array) -> jax.Array:
    """The gate that a draw is as likely above as below: what stands for it where nothing may be random."""
    return gate(alpha, 0.5)


def open_probability(alpha: jax.Array) -> jax.Array:
    """``P(z > 0) = sigmoid(alpha - log(-l / r))``, which makes the expected number of nonzero gates differentiable."""
    return jax.nn.sigmoid(alpha - math.log(-LOW / HIGH))
