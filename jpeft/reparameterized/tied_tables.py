"""A table of embeddings that is the head of its model too, and a method that changes its look-ups alone."""

from collections.abc import Iterable
from typing import Any, Literal

import jax.numpy as jnp

Tied = Literal["both", "lookup"]


def is_table(path: str) -> bool:
    """Whether a path is that of a table of embeddings."""
    return path.rpartition("/")[2] == "embedding"


def scores(tied: Tied, path: str, x: Any) -> bool:
    """Whether a product of a table is one that stays as it is in the base: one with activations, where a look-up takes ids."""
    return tied == "lookup" and is_table(path) and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def check_merge(tied: Tied, kernels: Iterable[str], method: str) -> None:
    """Refuse to merge a change of look-ups.

    Raises:
      ValueError: with the table and the reason.
    """
    table = next(filter(is_table, kernels), None) if tied == "lookup" else None
    if table is not None:
        raise ValueError(
            f"Cannot merge: {method} has tied='lookup', which changes the look-ups of '{table}' and not the scores that it gives as the "
            "head, and one table cannot be both. Keep using it through jpeft.wrap. For a table that is no head, tied='both' does the same "
            "and merges."
        )
