"""Choose which entries of all weights are trained: the k with the highest scores."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from jpeft import tree
from jpeft.core.statistics import Fisher, Movement, find
from jpeft.tree.head import head_leaves

ScoreKinds = tuple[type[Fisher | Movement], ...]  # kinds of statistics with a number for every entry of every parameter


def budget(params: tree.Params, sparsity: float, head: str | None) -> int:
    """How many entries outside the head may change: ``k = int(total * sparsity) - |head|``. The head is trained whole, within the budget.

    Raises:
      ValueError: if the head alone is larger than the budget.
    """
    total, in_head = tree.size(params), tree.size(head_leaves(params, head))
    k = int(total * sparsity) - in_head
    if k < 1:
        raise ValueError(
            f"sparsity={sparsity} of {total:,} parameters are {int(total * sparsity):,}, which the head with {in_head:,} uses up. "
            f"Use a sparsity above {in_head / total:.2g}, or leave the head out with head=None."
        )
    return k


def find_scores(stats: Any, kinds: ScoreKinds) -> tree.Params | None:
    """The tree of scores among the statistics that the user gave: of the first kind that is there. A plain tree is returned as is.

    >>> find_scores([Movement({"w": 1.0}), Fisher({"w": 2.0})], (Fisher, Movement))
    {'w': 2.0}
    """
    for kind in kinds:
        found = find(stats, kind)
        if found is not None:
            return found.values
    return None


def read_scores(leaves: Mapping[str, Any], scores: Any, name: str, how: str) -> dict[str, np.ndarray]:
    """The scores of some base leaves as NumPy arrays.

    Args:
      leaves: The base leaves by path.
      scores: A tree like the parameters with a score for each entry; None if the user gave no statistics.
      name: Name of the method, for messages.
      how: How to make the scores, for messages.

    Raises:
      ValueError: without scores, for abstract scores, or if a leaf has no scores or scores of another shape.
    """
    if scores is None:
        raise ValueError(f"{name} chooses what to train by statistics (stats=...), and was given none. {how}")
    flat = tree.flatten(scores)
    if is_abstract(*flat.values()):
        raise ValueError(
            f"{name}: the number of trained entries of each weight depends on the values of stats, and these are abstract. The parameters "
            "may be abstract, but stats must be arrays: make them outside of jit and eval_shape and close over them."
        )
    wrong = [path for path, leaf in leaves.items() if path not in flat or flat[path].shape != leaf.shape]
    if wrong:
        raise ValueError(
            f"{name}: stats must have scores for every parameter, in its shape; {len(wrong)} are missing or differ, such as '{wrong[0]}'. "
            f"{how}"
        )
    return {path: np.asarray(jax.device_get(flat[path])) for path in leaves}


def is_abstract(*leaves: Any) -> bool:
    """Whether some leaf has a shape but no value, as under `jax.jit` and `jax.eval_shape`."""
    return any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in leaves)


def choose_largest(scores: Mapping[str, np.ndarray], k: int) -> dict[str, Int[np.ndarray, " chosen"]]:
    """The k highest scores of all leaves together. Of equal scores, the first in the order of the tree are taken.

    Returns:
      ``{path: flat indices, ascending}``, without the leaves of which no entry is chosen.

    Raises:
      ValueError: if there are fewer than k entries, or a score is not finite.

    >>> import numpy as np
    >>> choose_largest({"a": np.array([0.1, 0.5]), "b": np.array([[0.3, 0.5]])}, k=2)
    {'a': array([1]), 'b': array([1])}
    """
    everything = np.concatenate([score.reshape(-1) for score in scores.values()])
    if k > everything.size:
        raise ValueError(f"{k:,} entries are to be trained, but there are only {everything.size:,}.")
    if not np.all(np.isfinite(everything)):
        bad = next(path for path, score in scores.items() if not np.all(np.isfinite(score)))
        raise ValueError(f"The scores of '{bad}' are not finite.")
    # Everything above the k-th largest score is chosen. `ties` entries that equal it fill the rest.
    threshold = np.partition(everything, everything.size - k)[everything.size - k]
    ties = k - int(np.count_nonzero(everything > threshold))
    chosen: dict[str, np.ndarray] = {}
    for path, score in scores.items():
        flat = score.reshape(-1)
        equal = np.flatnonzero(flat == threshold)[:ties]
        ties -= equal.size
        index = np.sort(np.concatenate([np.flatnonzero(flat > threshold), equal]))
        if index.size:
            chosen[path] = index
    return chosen
