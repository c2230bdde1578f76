"""The bottleneck that adapters are made of: down-projection, activation, up-projection."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def init(key: jax.Array, width: int, size: int, std: float, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    """Parameters of one bottleneck: ``2 width size + size + width`` scalars, kernels truncated normal, biases zero.

    The normal is cut at two standard deviations and not rescaled, as in TensorFlow, so its real deviation is 0.88 ``std``.
    """
    down, up = jax.random.split(key)
    return {
        "down": {"kernel": std * jax.random.truncated_normal(down, -2, 2, (*stack, width, size)), "bias": jnp.zeros((*stack, size))},
        "up": {"kernel": std * jax.random.truncated_normal(up, -2, 2, (*stack, size, width)), "bias": jnp.zeros((*stack, width))},
    }


def apply(leaves: dict[str, Any], h: jax.Array, activation: str) -> jax.Array:
    """``W_up act(W_down h + b_down) + b_up``, computed in the dtype of `h`."""
    down, up = jax.tree.map(lambda leaf: leaf.astype(h.dtype), (leaves["down"], leaves["up"]))
    rows = h.reshape(-1, h.shape[-1])  # a matrix: with two leading axes XLA for CPU transposes all that the gradients contract
    inner = ACTIVATIONS[activation](rows @ down["kernel"] + down["bias"][None])  # (rows, size)
    return (inner @ up["kernel"] + up["bias"][None]).reshape(h.shape)
