"""Learning rates by path: multiples of the optimizer's, for the leaves that rules choose."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import optax

from jpeft import layouts
from jpeft.tree.paths import Params, Path, flatten, path_str
from jpeft.tree.select import applies, chooses

Rule = str | Sequence[str]  # a role, a regex or a name; or names


def scale_by_path(
    tx: optax.GradientTransformation, tree: Any, lr_scale: Mapping[Any, float | int], params: Params
) -> optax.GradientTransformation:
    """Return an optimizer whose updates of some leaves are multiplied.

    Args:
      tx: The optimizer of the whole tree.
      tree: The adapter or `Peft.variables`.
      lr_scale: ``{rule: factor}``; the first rule that chooses a leaf counts, all other leaves keep the factor 1.
      params: The base, in which roles are looked for.

    Raises:
      ValueError: if a rule chooses no leaf, or a factor is not a positive number.
    """
    paths = list(flatten(tree))
    factors: dict[Path, float] = {}
    for rule, factor in lr_scale.items():
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < float("inf"):
            raise ValueError(f"lr_scale: the factor of {rule!r} must be a positive number, got {factor!r}.")
        chosen = _chosen(rule, paths, params)
        if not chosen:
            shown = ", ".join(f"'{path}'" for path in paths[:8])
            raise ValueError(f"lr_scale: {rule!r} chooses none of the {len(paths)} leaves that there are: {shown}, ...")
        factors = {path: float(factor) for path in chosen} | factors
    for factor in dict.fromkeys(factors.values()):
        tx = scale_leaves(tx, tree, [path for path in factors if factors[path] == factor], factor)
    return tx


def scale_leaves(tx: optax.GradientTransformation, tree: Any, paths: Collection[Path], factor: float) -> optax.GradientTransformation:
    """Return an optimizer whose updates of the leaves at some paths are multiplied, such as those of a newly initialised head.

    The name of a chain's part or of a collection may precede the paths in the tree.
    """
    chosen = lambda keys, _: not {path_str(keys), path_str(keys).partition("/")[2]}.isdisjoint(paths)
    return optax.chain(tx, optax.masked(optax.scale(factor), jax.tree_util.tree_map_with_path(chosen, tree)))


def _chosen(rule: Rule, paths: list[Path], params: Params) -> list[Path]:
    """Return the leaves that a rule chooses.

    A leaf may be spelled without the name of the chain's part or of the collection in front of it. What stands beside a leaf of the base,
    such as LoRA's ``kernel/a``, is chosen along with that leaf.
    """
    if layouts.is_role(rule):
        with_role = set(layouts.find(params, str(rule), option="lr_scale", required=False))
        return [path for path in paths if any(owner in with_role for spelling in _spellings(path) for owner in _owners(spelling))]
    chosen = lambda path: applies(rule, path) if isinstance(rule, str) else chooses(rule, path)
    return [path for path in paths if any(chosen(owner) for spelling in _spellings(path) for owner in _owners(spelling))]


def _spellings(path: Path) -> tuple[Path, Path]:
    return path, path.partition("/")[2]


def _owners(path: Path) -> tuple[Path, Path]:
    return path, path.rpartition("/")[0]
