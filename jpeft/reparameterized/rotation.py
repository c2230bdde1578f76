"""Orthogonal matrices from trained numbers, and layers whose inputs are rotated: ``y = layer(x R)``, the layer on the kernel ``R W``.

Rotating the inputs costs what R costs for each row, and gives the gradient of R without one of the kernel's size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.layer import Layer, Linear
from jpeft.reparameterized.matrix_form import MatrixForm

Blocks = Float[Array, "blocks size size"]


def rotated(
    layer: Layer,
    linear: Linear,
    inputs: tuple[Any, ...],
    turn: Callable[[jax.Array, Any], jax.Array],
    matrices: Mapping[str, Any],
) -> Any:
    """A layer on its inputs plus ``turn(inputs, matrices)``.

    Args:
      layer: The layer.
      linear: Its geometry, with `map_inputs`.
      inputs: Its inputs.
      turn: ``(v, matrices) -> x (R - 1)`` for the vectors v [rows, inputs] of one kernel of a stack. R itself would lose a small rotation
        where the layer computes in bfloat16.
      matrices: What `turn` needs, [*stack, ...].
    """
    assert linear.map_inputs is not None
    form = MatrixForm(layer.params[linear.name].shape, linear.axes)
    own = jax.tree.map(lambda leaf: leaf.astype(layer.dtype), dict(matrices))
    change = lambda v: v + form.each(turn)(v.astype(layer.dtype), own).astype(v.dtype)
    return layer(linear.map_inputs(inputs[0], change), *inputs[1:])


def skew(upper: Float[Array, "blocks elements"], size: int) -> Blocks:
    """Skew-symmetric matrices from the entries above their diagonals, row by row."""
    rows, columns = jnp.triu_indices(size, 1)
    zeros = jnp.zeros((len(upper), size, size), upper.dtype)
    half = zeros.at[:, rows, columns].set(upper)
    return half - half.swapaxes(1, 2)


def cayley(q: Blocks) -> Blocks:
    """``R - 1`` with the rotation ``R = (1 - Q) (1 + Q)^-1``: that is ``-2 Q (1 + Q)^-1``."""
    one = jnp.eye(q.shape[-1], dtype=q.dtype)[None]
    # Q and (1 + Q)^-1 commute.
    return -2 * jnp.linalg.solve(one + q, q)


def neumann(q: Blocks, terms: int) -> Blocks:
    """``R - 1`` with the series of ``(1 + Q) (1 - Q)^-1`` cut off, as HF PEFT does: ``R = 1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4`` for five terms.

    Two terms are ``1 + 2 Q``. Of three or more, the last power is ``terms - 1``, but at least 3, and is taken once.
    """
    total = 2 * q
    if terms == 2:
        return total
    power, last = q, max(terms - 1, 3)
    for i in range(2, last + 1):
        power = power @ q
        total = total + (power if i == last else 2 * power)
    return total


def without_some(key: jax.Array, blocks: Blocks, share: float) -> Blocks:
    """The blocks of ``R - 1`` with a share of them, rounded down and drawn at random, that do not turn; a single block always does."""
    count = int(share * len(blocks)) if len(blocks) > 1 else 0
    still = jax.random.permutation(key, len(blocks)) < count
    return jnp.where(still[:, None, None], 0, blocks)


def turn_blocks(v: Float[Array, "rows inputs"], blocks: Blocks) -> Float[Array, "rows inputs"]:
    """Each part of the inputs times its block; one block for all parts, if there is one."""
    size = blocks.shape[-1]
    parts = v.reshape(len(v), -1, size)
    turned = parts @ blocks[0] if len(blocks) == 1 else jnp.einsum("npi,pij->npj", parts, blocks)
    return turned.reshape(v.shape)
