"""The task head: made fresh for each task, so every method trains it."""

import re
from typing import Any

from jpeft.tree.paths import Params, Path, flatten
from jpeft.tree.select import select

# Where task heads are found in the families that people fine-tune. They are made fresh for every task, so every method trains them.
HEAD = r"(pre_classifier|classifier|score|qa_outputs|classification_head)(/.*)?"


def head_leaves(params: Params, head: str | None) -> dict[Path, Any]:
    """The leaves of the task head: ``"auto"`` looks for the usual names at the top of the tree, a regex must match, None is no head.

    Raises:
      ValueError: if a head was named that the model does not have.
    """
    if head is None:
        return {}
    flat = flatten(params)
    if head == "auto":
        return {path: leaf for path, leaf in flat.items() if re.fullmatch(HEAD, path)}
    chosen = select(flat, head, option="head", params=params)
    return {path: flat[path] for path in chosen}


def not_head(params: Params, head: str | None) -> dict[str, Any]:
    """The base's leaves by path without those of the task head: what a method chooses its targets from."""
    skip = head_leaves(params, head)
    return {path: leaf for path, leaf in flatten(params).items() if path not in skip}
