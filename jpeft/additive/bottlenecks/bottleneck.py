"""The bottleneck that adapters are made of: a projection to a few features, a nonlinearity, a projection back."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.initializers import Initializer

Activation = Literal["gelu", "gelu_new", "relu", "silu", "tanh"]

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def init_bottleneck(
    key: jax.Array, *, width: int, size: int, stack: tuple[int, ...], down: Initializer, up: Initializer
) -> dict[str, dict[str, Array]]:
    """The leaves of one bottleneck, ``2 width size + size + width`` scalars for each layer of the stack.

    Args:
      key: A random key.
      width: d, the features of the hidden state.
      size: m, the features inside.
      stack: Sizes of the stack axes.
      down: Initialises W_down.
      up: Initialises W_up.
    """
    down_key, up_key = jax.random.split(key)
    return {
        "down": {"kernel": down(down_key, (*stack, width, size)), "bias": jnp.zeros((*stack, size))},
        "up": {"kernel": up(up_key, (*stack, size, width)), "bias": jnp.zeros((*stack, width))},
    }


def project_down_and_up(leaves: Mapping[str, Any], h: Float[Array, "*batch d"], activation: Activation) -> Float[Array, "*batch d"]:
    """``W_up act(W_down h + b_down) + b_up``, computed in the dtype of `h`.

    Args:
      leaves: ``{"down": {"kernel", "bias"}, "up": {"kernel", "bias"}}``; other entries are not read.
      h: The hidden state.
      activation: Name of the nonlinearity.
    """
    down, up = jax.tree.map(lambda leaf: leaf.astype(h.dtype), (leaves["down"], leaves["up"]))
    # One matrix: with two leading axes XLA on CPU transposes every operand of the contractions in the backward pass.
    rows = h.reshape(-1, h.shape[-1])  # [tokens, d]
    inner = ACTIVATIONS[activation](_linear(down, rows))  # [tokens, m]
    return _linear(up, inner).reshape(h.shape)


def _linear(leaves: Mapping[str, Any], x: Float[Array, "tokens inputs"]) -> Float[Array, "tokens outputs"]:
    return x @ leaves["kernel"] + leaves["bias"][None]
