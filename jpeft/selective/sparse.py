"""Sparse differences: a few entries of a weight are trained, and nothing of the weight's size is held.

Beside a base leaf stand ``values`` [k], which are trained, and ``indices`` [digits, k], which are not (`jpeft.selective.indices`). Binding
*adds* the values to the base at the indices. Where the entries were chosen more than once, a second pair under ``kept`` holds the
differences of entries that are no longer trained.

The adapter holds differences rather than new weights for three reasons. Differences add up with what other methods of a chain change.
Weight decay pulls them towards the pretrained weight and not towards zero. And they stay in float32 beside a bfloat16 base, whose rounding
would swallow small steps.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.selective.choice import is_abstract
from jpeft.selective.indices import INDICES, VALUES, decode, encode
from jpeft.tree.paths import trained_dtype

KEPT = "kept"
Chosen = Mapping[str, Int[np.ndarray, " chosen"]]  # path of a base leaf -> flat indices of its trained entries, ascending


def new_differences(base: Mapping[str, Any], chosen: Chosen, dense: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The adapter's leaves, by path, for chosen entries.

    Args:
      base: The base's leaves by path.
      chosen: The entries.
      dense: Differences to start from, as arrays of the base leaves' sizes; zeros if not given.

    Raises:
      ValueError: for a base leaf of 2^31 entries or more.
    """
    out: dict[str, Any] = {}
    for path, index in chosen.items():
        if base[path].size >= 2**31:
            raise ValueError(f"'{path}' has {base[path].size:,} entries; sparse differences index fewer than 2^31.")
        values = np.zeros(index.size) if dense is None else dense[path].reshape(-1)[index]
        out[f"{path}/{VALUES}"] = jnp.asarray(values, difference_dtype(base[path]))
        out[f"{path}/{INDICES}"] = encode(index, base[path].size)
    return out


def reselect(base: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]], chosen: Chosen, name: str) -> dict[str, Any]:
    """The adapter's leaves, by path, after another choice of entries. The bound parameters do not change.

    An entry that was chosen before starts from its present difference. The differences of entries that are not chosen again move to
    ``kept``.

    Args:
      base: The base's leaves by path.
      beside: The present leaves beside each base leaf.
      chosen: The new choice.
      name: Name of the method, for the message.

    Raises:
      ValueError: if the adapter is abstract.
    """
    old: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # path -> indices and values of all entries that differ, trained or kept
    for path, part in beside.items():
        pairs = list(pairs_of(part))
        if is_abstract(*(leaf for pair in pairs for leaf in pair)):
            raise ValueError(f"{name}: entries are chosen again by their values, so call jpeft.advance outside of jit and eval_shape.")
        old[path] = np.concatenate([np.asarray(decode(i)) for i, _ in pairs]), np.concatenate([np.asarray(v) for _, v in pairs])
    out: dict[str, Any] = {}
    for path in base:
        index, values = old.get(path, (np.zeros(0, np.int32), np.zeros(0, np.float32)))
        new = chosen.get(path, np.zeros(0, np.int64))
        if new.size:
            dense = np.zeros(base[path].size, values.dtype)
            dense[index] = values
            out |= new_differences({path: base[path]}, {path: new}, {path: dense})
        not_again = ~np.isin(index, new)
        if not_again.any():
            index, values = index[not_again], values[not_again]
            order = np.argsort(index)  # binding relies on ascending indices
            out[f"{path}/{KEPT}/{VALUES}"] = jnp.asarray(values[order])
            out[f"{path}/{KEPT}/{INDICES}"] = encode(index[order], base[path].size)
    return out


def add_differences(leaf: Any, leaves: Mapping[str, Any]) -> Any:
    """A base leaf with its differences added, those that are kept included."""
    for indices, values in pairs_of(leaves):
        leaf = _add(leaf, indices, values)
    return leaf


def _add(leaf: Float[Array, "*shape"], indices: Float[Array, "digits k"], values: Float[Array, " k"]) -> Float[Array, "*shape"]:
    # One array of coordinates [k] for each axis. Reshaping the leaf to a vector instead would gather a sharded leaf on every device.
    at = jnp.unravel_index(decode(indices), leaf.shape)
    # The sum is taken in the wider dtype, of the values, and rounded once.
    new = leaf[at].astype(values.dtype) + values
    return leaf.at[at].set(new.astype(leaf.dtype), indices_are_sorted=True, unique_indices=True)


def pairs_of(leaves: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs ``(indices, values)`` beside one base leaf: first what is kept, then what is trained."""
    for pair in (leaves.get(KEPT, {}), leaves):
        if VALUES in pair:
            yield pair[INDICES], pair[VALUES]


def difference_dtype(leaf: Any) -> Any:
    """The dtype of a leaf's differences: float32 or wider."""
    return trained_dtype(leaf.dtype)
