"""AdaLoRA's budget: how many ranks are kept after which step, and which, by how sensitive the loss is to them.

A *triplet* is one rank of one kernel: a column of ``a``, an entry of ``e``, a row of ``b``. The functions see every kernel as matrices,
with the axes of a stack in front.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Budget(NamedTuple):
    """How many triplets are kept after each step. Steps are counted from 1.

    Attributes:
      begin: The last step with all triplets.
      end: The step with the last choice. Afterwards that choice stays.
      interval: Steps between two choices. A triplet that one choice leaves out may come back in the next.
      first: Triplets at the start.
      last: Triplets in the end.

    >>> budget = Budget(begin=500, end=1500, interval=1, first=120, last=80)
    >>> [budget.at(step) for step in (500, 501, 750, 1000, 1250, 1500)]
    [120, 119, 96, 85, 80, 80]
    """

    begin: int
    end: int
    interval: int
    first: int
    last: int

    def at(self, step: int) -> int:
        """The triplets that are kept after a step: ``last + (first - last) (1 - (step - begin) / (end - begin))^3``, rounded down."""
        if step <= self.begin:
            return self.first
        left = 1 - (min(step, self.end) - self.begin) / (self.end - self.begin)
        return int((self.first - self.last) * left**3 + self.last)

    def drops(self) -> np.ndarray:
        """The steps at which the budget falls by one, in order; a step stands there as often as it falls by.

        A compiled step finds its budget among them, exactly as `at` has it: the cube in float32 would round some budgets down by one.
        """
        steps = range(self.begin, self.end + 1)
        # `at` falls, so the first step with a budget of at most b is found by halving.
        found = []
        for kept in range(self.first - 1, self.last - 1, -1):
            low, high = 0, len(steps) - 1
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.at(steps[middle]) <= kept else (middle + 1, high)
            found.append(steps[low])
        return np.asarray(found, np.int32)

    def at_traced(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """`at`, inside of a compiled step."""
        return self.first - jnp.searchsorted(jnp.asarray(self.drops()), step, side="right")

    def chooses(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the triplets are chosen anew after a step."""
        return (step > self.begin) & (((step % self.interval == 0) & (step < self.end)) | (step == self.end))


class Averages(NamedTuple):
    """Moving averages of one leaf, entry by entry."""

    sensitivity: Float[Array, "..."]
    uncertainty: Float[Array, "..."]


def averaged(old: Averages, value: Float[Array, "..."], grad: Float[Array, "..."], betas: tuple[float, float]) -> Averages:
    """The averages after a step: of ``|value grad|``, about how much the loss would change without the entry, and of its spread."""
    importance = jnp.abs(value * grad)
    sensitivity = betas[0] * old.sensitivity + (1 - betas[0]) * importance
    uncertainty = betas[1] * old.uncertainty + (1 - betas[1]) * jnp.abs(importance - sensitivity)
    return Averages(sensitivity, uncertainty)


def score(of: Mapping[str, Averages]) -> Float[Array, "*stack rank"]:
    """The score of each triplet of a kernel: that of its entry of ``e``, and the means of those of its column of ``a`` and row of ``b``."""
    entry = {name: averages.sensitivity * averages.uncertainty for name, averages in of.items()}
    return entry["e"] + entry["a"].mean(-2) + entry["b"].mean(-1)


def keep(scores: Mapping[str, Float[Array, "..."]], kept: Int[Array, ""]) -> dict[str, Bool[Array, "..."]]:
    """Which triplets of all kernels have the highest scores. Of equal scores at the threshold none is kept."""
    ordered = jnp.sort(jnp.concatenate([each.reshape(-1) for each in scores.values()]))
    left_out = ordered.size - kept
    threshold = jnp.where(left_out > 0, ordered[jnp.maximum(left_out - 1, 0)], -jnp.inf)
    return {path: each > threshold for path, each in scores.items()}


def orthogonality(a: Float[Array, "*stack inputs rank"], b: Float[Array, "*stack rank outputs"]) -> Float[Array, ""]:
    """``|aᵀ a - I| + |b bᵀ - I|``, in Frobenius norms, summed over a stack."""
    return sum((_distance(rows) for rows in (jnp.swapaxes(a, -1, -2), b)), jnp.zeros(()))


def _distance(rows: Float[Array, "*stack rank size"]) -> Float[Array, ""]:
    products = rows @ jnp.swapaxes(rows, -1, -2)
    squares = jnp.square(products - jnp.broadcast_to(jnp.eye(rows.shape[-2], dtype=rows.dtype), products.shape)).sum((-1, -2))
    # The slope of the root at zero is infinite; there the norm counts as flat.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0).sum()


def without_zeros(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The triplets of a kernel whose ``e`` is not zero. In a stack, kernels with fewer than the most of them are filled up with zeros."""
    stack = leaves["e"].shape[:-1]
    rows = {"a": np.swapaxes(leaves["a"], -1, -2), "e": leaves["e"][..., None], "b": leaves["b"]}  # [*stack, rank, ...]
    flat = {name: leaf.reshape(-1, *leaf.shape[len(stack) :]) for name, leaf in rows.items()}
    kept = [np.flatnonzero(each) for each in flat["e"][..., 0]]
    most = max(map(len, kept))

    def packed(leaf: np.ndarray) -> np.ndarray:
        out = np.zeros((len(kept), most, leaf.shape[-1]), leaf.dtype)
        for i, index in enumerate(kept):
            out[i, : len(index)] = leaf[i, index]
        return out.reshape(*stack, most, leaf.shape[-1])

    new = {name: packed(leaf) for name, leaf in flat.items()}
    return {"a": np.swapaxes(new["a"], -1, -2), "e": new["e"][..., 0], "b": new["b"]}
