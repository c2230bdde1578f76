"""An index for each example of a batch: which of several adapters, or tasks, it is for.

The index is a leaf of the adapter: whole numbers in float32, since JAX does not differentiate trees with integer leaves, with the label
"freeze". So it goes wherever the adapter goes, through `jit`, `grad`, `nn.scan` and `jpeft.models.generate`, and nothing else has to know
of it. A method that takes one sets `Method.takes_index` and defines `Method.assign` and `Method.assigned`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jpeft.core.method import Method
from jpeft.tree.adapters import Adapter


def as_leaf(index: Any, *, low: int, high: int, what: str) -> Float[Array, " batch"]:
    """An index as a leaf of an adapter, checked where its values are known.

    Args:
      index: What the user gave.
      low: The smallest number that there is.
      high: The largest.
      what: What is counted, for the message: "slots 0 to 3, or -1 for the base".

    Raises:
      ValueError: for anything else than one axis of whole numbers between `low` and `high`.

    >>> as_leaf([0, -1, 2], low=-1, high=3, what="slots 0 to 3, or -1 for the base")
    Array([ 0., -1.,  2.], dtype=float32)
    """
    try:
        values = index if isinstance(index, jax.Array) else np.asarray(index)
        whole = jnp.issubdtype(values.dtype, jnp.integer)
    except (ValueError, TypeError):
        values, whole = np.zeros(()), False
    if values.ndim != 1 or not values.size or not whole:
        raise ValueError(f"The index holds a whole number for each example, such as [0, 2, 0], and was {_shown(index)}. There are {what}.")
    if not isinstance(values, Tracer):
        known = np.asarray(values)
        wrong = np.flatnonzero((known < low) | (known > high))
        if wrong.size:
            raise ValueError(f"The index of example {wrong[0]} is {known[wrong[0]]}. There are {what}.")
    return jnp.asarray(values, jnp.float32)


def repeated(variables: Mapping[str, Any], method: Method | None, count: int) -> dict[str, Any]:
    """The variables of a wrapped model for batches in which each example stands `count` times in a row, as in a beam search."""
    if method is None or not method.takes_index:
        return dict(variables)
    adapter = method.from_collections(variables)
    index = method.assigned(adapter)
    if index is None:
        return dict(variables)
    return {**variables, **method.to_collections(method.assign(adapter, jnp.repeat(index, count).astype(jnp.int32)))}


def rows_of(index: Float[Array, " batch"], rows: int, path: str) -> Any:
    """The index of each row of an array that a layer is given: whole numbers [rows], or [batch] for an array of one row for all.

    A layer may see the examples one by one, or the positions of all examples in one axis, those of an example side by side.

    Raises:
      ValueError: if the rows cannot be divided among the examples.
    """
    whole = jax.lax.stop_gradient(index).astype(jnp.int32)
    if rows == 1:
        return whole
    if rows % len(index):
        raise ValueError(
            f"'{path}' is given an array of {rows} rows and the index has {len(index)} entries, so it cannot tell which rows belong to "
            "which example. Leave the layer out of the target, if its inputs are not those of single examples."
        )
    return whole if rows == len(index) else jnp.repeat(whole, rows // len(index))


def check_batch(method: Method, adapter: Adapter, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare the index with the batch of a call: the first axis of the first array among its inputs, or of one that is given by name.

    Raises:
      ValueError: if they differ, or no index was assigned.
    """
    index = method.assigned(adapter)
    if index is None:
        raise ValueError(f"{method.name} needs an index for each example of the batch: peft = jpeft.assign(peft, [0, 2, ...]).")
    sizes = _first_axes(args)[:1] or _first_axes(
        [value for name, value in kwargs.items() if name not in ("rngs", "collections", "mutable")]
    )
    if sizes and index.shape[0] not in sizes:
        raise ValueError(
            f"The batch has {sizes[0]} examples and the index {index.shape[0]}: jpeft.assign(peft, index) takes a number for each example."
        )


def _first_axes(inputs: Any) -> list[int]:
    """The sizes of the first axes of all arrays in a tree."""
    return [leaf.shape[0] for leaf in jax.tree.leaves(inputs) if getattr(leaf, "shape", ())]


def _shown(index: Any) -> str:
    """What the user gave, in a few words."""
    if hasattr(index, "dtype"):
        return f"an array of {index.dtype} of shape {tuple(index.shape)}"
    return repr(index)[:80]
