"""The bottleneck that adapters are made of: down-projection, activation, up-projection."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.additive.bottlenecks.places import Place
from jpeft.method import ADDED
from jpeft.tree.paths import flatten, key_for

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> initial kernel

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

WHY_NOT = "an adapter is a nonlinear layer of its own, which no weight of the base can take up; keep using it through jpeft.wrap"


def check(size: int | None, activation: str) -> None:
    """Refuse what is no bottleneck.

    Raises:
      ValueError: for a size below 1 or an unknown activation.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {sorted(ACTIVATIONS)}.")


# --- initial kernels --------------------------------------------------------------------------------------------------------------------


def truncated_normal(std: float) -> Draw:
    """A normal cut at two standard deviations and not rescaled, as in TensorFlow, so that its real deviation is 0.88 `std`."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -2, 2, shape)


def normal(std: float) -> Draw:
    """N(0, std²)."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def kaiming(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform within ± 1 / √inputs: torch's for linear layers, ``kaiming_uniform(a=√5)``."""
    return jax.random.uniform(key, shape, minval=-(shape[-2] ** -0.5), maxval=shape[-2] ** -0.5)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All zero."""
    del key
    return jnp.zeros(shape)


# --- parameters and function ------------------------------------------------------------------------------------------------------------


def init(key: jax.Array, place: Place, size: int, *names: str, down: Draw, up: Draw) -> dict[str, Any]:
    """Parameters of one bottleneck, by path: ``2 width size + size + width`` scalars in each layer, the biases zero."""
    keys, width, stack = jax.random.split(key_for(key, place.leaf)), place.width, place.stack
    leaves = {
        "down": {"kernel": down(keys[0], (*stack, width, size)), "bias": jnp.zeros((*stack, size))},
        "up": {"kernel": up(keys[1], (*stack, size, width)), "bias": jnp.zeros((*stack, width))},
    }
    return added(place, leaves, *names)


def added(place: Place, leaves: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leaves by path, as they are added to the module at a place, under `names` there."""
    return {"/".join(filter(None, (place.path, ADDED, *names, name))): leaf for name, leaf in flatten(leaves).items()}


def apply(leaves: dict[str, Any], h: jax.Array, activation: str) -> jax.Array:
    """``W_up act(W_down h + b_down) + b_up``, computed in the dtype of `h`."""
    down, up = jax.tree.map(lambda leaf: leaf.astype(h.dtype), (leaves["down"], leaves["up"]))
    rows = h.reshape(-1, h.shape[-1])  # a matrix: with two leading axes XLA for CPU transposes all that the gradients contract
    inner = ACTIVATIONS[activation](rows @ down["kernel"] + down["bias"][None])  # (rows, size)
    return (inner @ up["kernel"] + up["bias"][None]).reshape(h.shape)


def on_hidden(outputs: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    """``change(h)`` in the place of the hidden state h: what a module returns, or the first thing where it returns a tuple."""
    return (change(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else change(outputs)
