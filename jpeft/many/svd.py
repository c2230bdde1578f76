"""Factors of lower rank, by singular values: the best ones of that rank."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jpeft.many.parts import Factors

Singular = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each matrix in a stack: u [*stack, in, k], s [*stack, k], vt [*stack, k, out]


def of_matrix(delta: np.ndarray) -> Singular:
    """The singular values and vectors of a change, in float32 or wider."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return u, s, vt


def of_factors(factors: Factors) -> Singular:
    """Those of ``a b``, from matrices of the size of the rank alone, in float64."""
    a, b = (np.asarray(leaf, np.float64) for leaf in factors)
    if min(a.shape[-2], b.shape[-1]) <= factors.rank:  # the product is the smaller matrix
        return of_matrix(a @ b)
    q, left = np.linalg.qr(a)
    p, right = np.linalg.qr(np.swapaxes(b, -1, -2))
    u, s, vt = np.linalg.svd(left @ np.swapaxes(right, -1, -2))
    return q @ u, s, vt @ np.swapaxes(p, -1, -2)


def rank_for(error: float) -> Callable[[np.ndarray], int]:
    """The lowest rank at which the rest is at most `error` of the whole, in the Frobenius norm, for each matrix of a stack.

    >>> rank_for(0.5)(np.array([4.0, 2.0, 1.0])), rank_for(0.0)(np.array([4.0, 2.0, 0.0]))
    (1, 2)
    """

    def rank(s: np.ndarray) -> int:
        squares = np.square(s.astype(np.float64))
        rest = np.cumsum(squares[..., ::-1], -1)[..., ::-1]  # what is lost if the values from here on are left out
        kept = (rest > error**2 * rest[..., :1]).sum(-1)
        return max(1, int(kept.max()))

    return rank


def truncated(singular: Singular, rank: int) -> Factors:
    """The factors of the largest singular values, whose roots both sides take; at most as many as there are."""
    u, s, vt = singular
    root = np.sqrt(s[..., :rank])
    a, b = u[..., :, :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    return Factors(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
