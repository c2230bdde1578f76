"""Inverted dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def inverted_dropout(key: jax.Array, x: Float[Array, "*shape"], rate: float) -> Float[Array, "*shape"]:
    """Set each entry to zero with probability `rate`, and divide the others by ``1 - rate`` so that the expected value stays.

    >>> import jax, jax.numpy as jnp
    >>> x = inverted_dropout(jax.random.key(0), jnp.ones(1000), 0.5)
    >>> sorted(set(x.tolist()))
    [0.0, 2.0]
    """
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
