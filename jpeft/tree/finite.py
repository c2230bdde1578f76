"""Numbers that are not finite, NaN and infinity, among the leaves of a tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.tree.paths import Params, Path, flatten


def not_finite(tree: Params) -> list[Path]:
    """The paths of the leaves that hold a number that is not finite.

    >>> import jax.numpy as jnp
    >>> not_finite({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])})
    ['b']
    """
    leaves = {path: leaf for path, leaf in flatten(tree).items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    # Arrays of NumPy stay on the host; those of JAX may be sharded, and one program looks at all of them.
    found = {path: np.isfinite(leaf).all() for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    found |= _are_finite({path: leaf for path, leaf in leaves.items() if path not in found})
    return [path for path in leaves if not bool(found[path])]


@jax.jit
def _are_finite(leaves: dict[Path, Any]) -> dict[Path, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}
