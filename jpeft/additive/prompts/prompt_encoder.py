"""The network that computes the prompt of P-tuning: a bidirectional LSTM of two layers, or none, and an MLP of two layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.initializers import kaiming_uniform
from jpeft.tree.paths import key_for

DIRECTIONS, GATES = ("forward", "backward"), 4


def init_encoder(key: jax.Array, rows: int, width: int, hidden: int | None) -> dict[str, jax.Array]:
    """The embedding and the weights of the network at their start, by path: torch's starting values.

    Args:
      key: Each leaf draws with its own key.
      rows: Rows of the prompt.
      width: Width of the embedding and of the prompt.
      hidden: Width of the LSTM in each direction; None without an LSTM.
    """
    layers = {} if hidden is None else _lstm_layers(width, hidden)
    inputs = width if hidden is None else 2 * hidden  # the outputs of both directions stand side by side
    layers |= {"mlp/first": (inputs, width, inputs), "mlp/second": (width, width, width)}
    leaves = {"embedding": jax.random.normal(key_for(key, "embedding"), (rows, width))}
    for path, (inputs, outputs, fan) in layers.items():
        for name, shape in (("kernel", (inputs, outputs)), ("bias", (outputs,))):
            leaves[f"{path}/{name}"] = kaiming_uniform(key_for(key, f"{path}/{name}"), shape, fan_in=fan)
    return leaves


def _lstm_layers(width: int, hidden: int) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and fan of the linear layers of the LSTM. torch takes the hidden width for the fan of all of them."""
    return {
        f"lstm/{layer}/{direction}/{part}": (part_inputs, GATES * hidden, hidden)
        for layer, inputs in enumerate((width, 2 * hidden))
        for direction in DIRECTIONS
        for part, part_inputs in (("input", inputs), ("hidden", hidden))
    }


def compute_prompt(leaves: Mapping[str, Any]) -> Float[Array, "rows width"]:
    """The prompt that the network makes of its embedding. It has no LSTM if there is none among the leaves."""
    x = leaves["embedding"]  # [rows, width]
    for layer in sorted(leaves.get("lstm", {})):
        directions = leaves["lstm"][layer]
        backward = _lstm(directions["backward"], x[::-1])[::-1]
        x = jnp.concatenate([_lstm(directions["forward"], x), backward], axis=-1)  # [rows, 2 hidden]
    return _linear(leaves["mlp"]["second"], jax.nn.relu(_linear(leaves["mlp"]["first"], x)))


def _lstm(leaves: Mapping[str, Any], x: Float[Array, "rows inputs"]) -> Float[Array, "rows hidden"]:
    """``c' = σ(f) c + σ(i) tanh(g)``, ``h' = σ(o) tanh(c')`` from row to row, from zeros; torch's gates i, f, g, o."""
    hidden = leaves["hidden"]["kernel"].shape[0]

    def step(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(x + h @ leaves["hidden"]["kernel"] + leaves["hidden"]["bias"], GATES)  # [hidden] each
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    # What the inputs add to the gates does not depend on the state, so it is one product for all rows.
    return jax.lax.scan(step, (jnp.zeros(hidden), jnp.zeros(hidden)), _linear(leaves["input"], x))[1]


def _linear(leaves: Mapping[str, Any], x: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
    return x @ leaves["kernel"] + leaves["bias"][None]
