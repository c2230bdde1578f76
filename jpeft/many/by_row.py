"""A function run for each row of a batch, with something of its own for each of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def by_row(fn: Callable[..., Any], own: Any, *inputs: Any, rows: int, path: str) -> Any:
    """``fn(own_i, *inputs_i)`` for each row i, as one batched computation.

    Arrays among the inputs that have as many rows are taken apart, and keep an axis of one row; anything else is the same for all rows. So
    `fn` sees a batch of one, and its products with what all rows share become one product again.

    Args:
      fn: Its outputs have the axis of that one row.
      own: A tree of arrays whose first axis is that of the rows.
      *inputs: Trees of arrays and of anything else.
      rows: Number of rows.
      path: Of the layer, for the message.

    Raises:
      ValueError: if an output has no axis of rows.
    """
    leaves, treedef = jax.tree.flatten(inputs)
    apart = [i for i, leaf in enumerate(leaves) if getattr(leaf, "ndim", 0) and leaf.shape[0] == rows]

    def one(own: Any, arrays: list[jax.Array]) -> Any:
        row = {i: array[None] for i, array in zip(apart, arrays, strict=True)}
        out = fn(own, *jax.tree.unflatten(treedef, [row.get(i, leaf) for i, leaf in enumerate(leaves)]))
        if any(y.ndim == 0 or y.shape[0] != 1 for y in jax.tree.leaves(out)):
            raise ValueError(
                f"'{path}' does not give every example its own outputs, with the batch as the first axis, as mixed adapters need. Leave "
                "the layer out of the target."
            )
        return jax.tree.map(lambda y: y[0], out)

    return jax.vmap(one)(own, [leaves[i] for i in apart])


def pick(leaf: Float[Array, "..."], slots: Int[Array, " rows"], axis: int, neutral: Any) -> Float[Array, "rows ..."]:
    """The entries of a leaf for each row, on a new first axis: those of its slot, or `neutral` for the base, which is slot -1.

    A slot that there is not, which only a traced index can hold, gives numbers that are none, so that it cannot go unseen.
    """
    beyond = leaf.shape[axis]
    found = jnp.take(leaf, jnp.where(slots < -1, beyond, jnp.maximum(slots, 0)), axis=axis, mode="fill", fill_value=jnp.nan)
    found = jnp.moveaxis(found, axis, 0)
    is_base = (slots == -1).reshape(-1, *[1] * (found.ndim - 1))
    return jnp.where(is_base, jnp.asarray(neutral, found.dtype), found)


def pick_rows(
    table: Float[Array, "slots vocab r"], slots: Int[Array, " rows"], ids: Int[Array, "rows *more"]
) -> Float[Array, "rows *more r"]:
    """The rows of each slot's own table, which are zero for the base and for ids beyond the table."""
    count = table.shape[0]
    mine = jnp.where((slots >= 0) & (slots < count), slots, count).reshape(-1, *[1] * (ids.ndim - 1))
    return table.at[jnp.broadcast_to(mine, ids.shape), ids].get(mode="fill", fill_value=0)
