"""Factors and leaves as an adapter of LoRA, or vectors as one of (IA)³."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jpeft import tree
from jpeft.core.peft import Peft
from jpeft.many.parts import Factors, forms_of
from jpeft.reparameterized.ia3 import IA3
from jpeft.reparameterized.lora import LoRA
from jpeft.tree.kernels import AxesRules
from jpeft.tree.paths import Params, Path


def as_lora(params: Params, updates: Mapping[Path, Factors], replaced: Mapping[Path, Any], axes: AxesRules) -> Peft:
    """An adapter of LoRA with these factors, at a scale of 1, and these leaves whole: as its head, which LoRA trains along."""
    ranks = {path: factors.rank for path, factors in updates.items()}
    method = LoRA(
        rank=rules_of(ranks),
        alpha=rules_of({path: float(rank) for path, rank in ranks.items()}),
        target=one_of(updates) or "",
        head=one_of(replaced),
        axes=axes or None,
    )
    forms, leaves = forms_of(params, list(updates), axes), {}
    for path, factors in updates.items():
        for name, leaf in factors._asdict().items():
            leaves[f"{path}/{name}"] = forms[path].leaf_from_matrix(leaf, LoRA.leaf_axes[name])
    return Peft(params, tree.unflatten(leaves | whole(params, replaced)), method)


def as_ia3(params: Params, scales: Mapping[Path, Mapping[str, Any]], replaced: Mapping[Path, Any], axes: AxesRules) -> Peft:
    """An adapter of (IA)³ with these vectors, and these leaves whole."""
    inner = [path for path, own in scales.items() if "l_in" in own]
    outer = [path for path in scales if path not in inner]
    method = IA3(target=one_of(outer or inner) or "", feedforward=one_of(inner), head=one_of(replaced), axes=axes or None)
    forms, leaves = forms_of(params, list(scales), axes), {}
    for path, own in scales.items():
        leaves |= {f"{path}/{name}": forms[path].leaf_from_matrix(leaf, IA3.leaf_axes[name]) for name, leaf in own.items()}
    return Peft(params, tree.unflatten(leaves | whole(params, replaced)), method)


def whole(params: Params, replaced: Mapping[Path, Any]) -> dict[Path, Any]:
    """Copies of leaves that an adapter holds whole, in the dtype that adapters have."""
    base = tree.flatten(params)
    return {path: tree.copy(leaf.astype(tree.trained_dtype(base[path].dtype))) for path, leaf in replaced.items()}


def rules_of(numbers: Mapping[Path, Any]) -> Any:
    """An option that has these values at these paths: one value if all are equal, else rules."""
    values = set(numbers.values()) or {1}
    return values.pop() if len(values) == 1 else {re.escape(path): number for path, number in sorted(numbers.items())}


def one_of(paths: Collection[Path]) -> str | None:
    """A regex for exactly these paths; None for none."""
    return "|".join(map(re.escape, sorted(paths))) or None
