"""How a token is drawn from the logits of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.options import Count, Positive, Share, fits, shown


def check_sampling(key: Any, temperature: Any, top_k: Any, top_p: Any) -> None:
    """Raise a ValueError for an option outside its range, or one without a key. Traced options are not checked."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if key is None and any(value is not None for value in options.values()):
        names = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
        raise ValueError(f"{names} without a key= has no effect: greedy text takes the most likely word each time. Pass key=.")
    if temperature is not None and not is_array(temperature) and not fits(temperature, Positive):
        raise ValueError(
            f"temperature={shown(temperature)} must be above 0 and finite; for the most likely word each time leave `key` out."
        )
    if top_k is not None and not fits(top_k, Count):
        raise ValueError(f"top_k={shown(top_k)} must be a whole number of at least 1.")
    if top_p is not None and not is_array(top_p) and not fits(top_p, Share):
        raise ValueError(f"top_p={shown(top_p)} is not in (0, 1].")


def is_array(value: Any) -> bool:
    """Whether a number may only be known while the program runs."""
    return isinstance(value, jax.Array)


def filter_logits(
    logits: Float[Array, "batch vocab"],
    temperature: float | Array | None = None,
    top_k: int | None = None,
    top_p: float | Array | None = None,
) -> Float[Array, "batch vocab"]:
    """Return the logits to draw from: divided by the temperature, -inf for words that `top_k` and then `top_p` exclude.

    Words that are as likely as the least likely word kept are kept too.

    >>> filter_logits(jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]])), top_p=0.6)[0, 1:] > -jnp.inf
    Array([ True, False, False], dtype=bool)
    """
    if temperature is not None:
        logits = logits / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]  # [batch, 1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # probability of all likelier words, [batch, vocab]
        # The most likely word is always kept, even if it alone has more than top_p.
        least = jnp.where((before < top_p).at[:, 0].set(True), descending, jnp.inf).min(-1, keepdims=True)  # [batch, 1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
