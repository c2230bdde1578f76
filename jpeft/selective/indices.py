"""Indices among the leaves of an adapter.

Sparse differences (`jpeft.selective.sparse`) and FAR's learners (`jpeft.selective.columns`) train a part of a base leaf. Beside that leaf
they keep a pair: ``values``, which are trained, and ``indices``, which say where the values belong and are never trained.

Indices are whole numbers in float32. JAX does not differentiate a tree with integer leaves, and the adapter is the very tree that users,
the trainer and `optax` differentiate, add to and map over; so an adapter holds floats only. The gradient of the indices is zero and their
label is "freeze", so an optimizer from `jpeft.optimizer` keeps neither state nor updates for them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft import tree
from jpeft.core.method import FREEZE, TRAIN

VALUES, INDICES = "values", "indices"

# float32 holds every whole number below 2^24 exactly. Larger indices get two digits to this base. (An int32 whose bits are read as a
# float32 would always need one digit only. But the bits of small integers are subnormal numbers, which XLA may flush to zero.)
DIGIT = 2**24


def as_integers(indices: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The indices as int32, without a gradient.

    >>> import jax.numpy as jnp
    >>> as_integers(jnp.array([2.0, 5.0]))
    Array([2, 5], dtype=int32)
    """
    return jnp.rint(jax.lax.stop_gradient(indices)).astype(jnp.int32)


def count_digits(size: int) -> int:
    """How many digits an index into `size` entries has."""
    return 1 if size <= DIGIT else 2


def encode(index: Int[np.ndarray, " k"] | Int[Array, " k"], size: int) -> Float[Array, "digits k"]:
    """Flat indices into `size` entries as digits in float32, the lowest digit first."""
    return jnp.stack([jnp.asarray(index // DIGIT**i % DIGIT, jnp.float32) for i in range(count_digits(size))])


def decode(digits: Float[Array, "digits k"]) -> Int[Array, " k"]:
    """The flat indices whose digits `encode` returned.

    >>> import numpy as np
    >>> decode(encode(np.array([3, 2**24 + 1]), size=2**25))
    Array([       3, 16777217], dtype=int32)
    """
    integers = as_integers(digits)
    index = integers[0]
    for i in range(1, len(integers)):
        index = index + integers[i] * DIGIT**i
    return index


def label_pairs(adapter: tree.Adapter, is_frozen: Callable[[str], bool] = lambda path: False) -> Any:
    """The adapter's tree with "freeze" at the indices of each pair and "train" at all else.

    Args:
      adapter: An adapter, which may hold whole leaves besides pairs.
      is_frozen: Whether the values of the pair at a path are not trained either.
    """
    flat = tree.flatten(adapter)

    def label(path: str) -> str:
        pair, _, name = path.rpartition("/")
        # A base leaf may be called "values" itself; only both names together make a pair.
        in_pair = name in (VALUES, INDICES) and {f"{pair}/{VALUES}", f"{pair}/{INDICES}"} <= flat.keys()
        return FREEZE if in_pair and (name == INDICES or is_frozen(pair)) else TRAIN

    return tree.unflatten({path: label(path) for path in flat})
