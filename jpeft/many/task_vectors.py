"""How several changes of one array become one: sums, TIES and DARE.

`changes` is [n, ...], one change for each adapter; `weights` are n numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Weights = Sequence[float | int] | np.ndarray | jax.Array


class Options(NamedTuple):
    """What the ways of combining may be told.

    Attributes:
      density: The share of the numbers of each change that is kept.
      majority_sign: What elects a sign: "total", the sum, or "frequency", the number of positive and negative ones.
      key: For what is dropped at random.
    """

    density: float = 1.0
    majority_sign: str = "total"
    key: jax.Array | None = None


def weighted_sum(changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """``sum_i w_i d_i``."""
    del options
    return np.tensordot(np.asarray(weights, changes.dtype), changes, 1)


def trimmed(change: np.ndarray, density: float) -> np.ndarray:
    """A change with the numbers of the largest absolute value, and zeros for the others.

    >>> trimmed(np.array([[3.0, -1.0], [0.5, -4.0]]), 0.5).tolist()
    [[3.0, 0.0], [0.0, -4.0]]
    """
    kept = int(density * change.size)
    out = np.zeros_like(change)
    largest = np.argsort(-np.abs(change), axis=None, kind="stable")[:kept]
    out.reshape(-1)[largest] = change.reshape(-1)[largest]
    return out


def dropped(change: np.ndarray, density: float, key: jax.Array) -> np.ndarray:
    """A change with each number kept with a probability of `density`, and divided by it: its mean stays. DARE's drop and rescale."""
    if density == 1:
        return change
    keep = np.asarray(jax.random.bernoulli(key, density, change.shape))
    return np.where(keep, change / change.dtype.type(density), change.dtype.type(0))


def magnitude_prune(changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """The sum of trimmed changes."""
    return weighted_sum(np.stack([trimmed(change, options.density) for change in changes]), weights, options)


def ties(changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """TIES: trim, elect a sign for each number, and take the mean of those with that sign."""
    return _elected(np.stack([trimmed(change, options.density) for change in changes]), weights, options)


def dare_linear(changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """The sum of changes with numbers dropped at random."""
    return weighted_sum(_all_dropped(changes, options), weights, options)


def dare_ties(changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """TIES, with numbers dropped at random in the place of small ones."""
    return _elected(_all_dropped(changes, options), weights, options)


def _all_dropped(changes: np.ndarray, options: Options) -> np.ndarray:
    assert options.key is not None
    return np.stack([dropped(change, options.density, jax.random.fold_in(options.key, i)) for i, change in enumerate(changes)])


def _elected(changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """``sum_i w_i d_i [sign d_i = elected] / number of those``, by number."""
    votes = changes if options.majority_sign == "total" else np.sign(changes)
    elected = np.where(votes.sum(0) >= 0, 1, -1)
    agree = np.sign(changes) == elected  # what was trimmed agrees with none
    return weighted_sum(changes * agree, weights, options) / np.maximum(agree.sum(0), 1).astype(changes.dtype)


WAYS: dict[str, Callable[[np.ndarray, Any, Options], np.ndarray]] = {
    "linear": weighted_sum,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
