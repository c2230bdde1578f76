"""Whether adapters stand on one base."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jpeft.tree.paths import Params, Path, first_few, flatten


def check_same_base(params: Params, other: Params, what: str, *, skip: Collection[Path] = ()) -> None:
    """Compare two bases: the very same arrays, or equal ones.

    Args:
      params: The base.
      other: That of an adapter.
      what: Whose it is, for the message.
      skip: Leaves that need not be equal, because the adapter holds its own value of them.

    Raises:
      ValueError: if they differ, with the first leaf that does.
    """
    mine, theirs = flatten(params), flatten(other)
    if mine.keys() != theirs.keys():
        differ = sorted(mine.keys() ^ theirs.keys())
        raise ValueError(f"{what} is for another base: only one of the two has {first_few(differ)}.")
    for path, leaf in mine.items():
        if leaf is theirs[path]:
            continue
        if leaf.shape != theirs[path].shape:
            raise ValueError(f"{what} is for another base: '{path}' has the shape {theirs[path].shape} there, and {leaf.shape} here.")
        if path not in skip and not _equal(leaf, theirs[path]):
            raise ValueError(f"{what} is for another base: '{path}' has other values there. Load it on these very params.")


def _equal(one: jax.Array, two: jax.Array) -> bool:
    """Whether two arrays of one shape hold the same numbers. What is not known yet, inside of `jit`, is not compared."""
    if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in (one, two)):
        return True
    return one.dtype == two.dtype and bool(jnp.array_equal(one, two))
