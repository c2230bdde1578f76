"""The network that makes a prefix in training: ``P = W_2 tanh(W_1 P' + b_1) + b_2``, for all layers at once.

Its leaves stand once at the adapter's root: ``embedding`` is P' [l, d], ``down`` has W_1 [d, m] and b_1, ``up`` has W_2 [m, outputs] and
b_2, where the outputs are the keys and values of all layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.additive.prefixes.attention_sites import AttentionSite
from jpeft.additive.prefixes.key_values import Prefix, from_rows, to_rows
from jpeft.core.initializers import kaiming_uniform
from jpeft.tree.paths import key_for


def init_network(
    key: jax.Array, sites: list[AttentionSite], *, length: int, inner: int, start: Prefix | None, std: float | None = None
) -> dict[str, Any]:
    """The network's leaves: by default P' is N(0, 1), and the rest begins as torch's linear layers.

    Args:
      key: A random key.
      sites: The attentions that get a prefix.
      length: l, rows of the prefix.
      inner: m.
      start: A prefix that the network is to make at the start, or None. The paper fits the whole network to it by 500 steps of Adam. Least
        squares in the last layer alone fit it exactly, if l <= m.
      std: Standard deviation of P', W_1 and W_2, with biases of zero; None for the default.
    """
    d, outputs = sites[0].inputs, 2 * sum(site.layers * site.width for site in sites)

    def linear(name: str, inputs: int, outputs: int) -> dict[str, jax.Array]:
        shapes = {"kernel": (inputs, outputs), "bias": (outputs,)}
        if std is not None:
            return {"kernel": std * jax.random.normal(key_for(key, f"{name}/kernel"), shapes["kernel"]), "bias": jnp.zeros(outputs)}
        return {leaf: kaiming_uniform(key_for(key, f"{name}/{leaf}"), shape, fan_in=inputs) for leaf, shape in shapes.items()}

    leaves: dict[str, Any] = {
        "embedding": (1.0 if std is None else std) * jax.random.normal(key_for(key, "embedding"), (length, d)),
        "down": linear("down", d, inner),
    }
    if start is None:
        return {**leaves, "up": linear("up", inner, outputs)}
    kernel = jnp.linalg.pinv(_hidden(leaves)) @ to_rows(sites, start)  # [m, l] @ [l, outputs]
    return {**leaves, "up": {"kernel": kernel, "bias": jnp.zeros(outputs)}}


def run_network(leaves: dict[str, Any], sites: list[AttentionSite]) -> Prefix:
    """The prefix that the network makes."""
    rows = _hidden(leaves) @ leaves["up"]["kernel"] + leaves["up"]["bias"][None]  # [l, outputs]
    return from_rows(sites, rows)


def _hidden(leaves: dict[str, Any]) -> Float[Array, "l m"]:
    """``tanh(W_1 P' + b_1)``."""
    return jnp.tanh(leaves["embedding"] @ leaves["down"]["kernel"] + leaves["down"]["bias"][None])
