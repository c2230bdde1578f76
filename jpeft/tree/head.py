"""The task head: made fresh for each task, so every method trains it."""

from typing import Any

from jpeft import layouts
from jpeft.tree.paths import Params, Path, flatten
from jpeft.tree.select import select

# A regex of the heads that most families have, for options that extend it.
HEAD = rf"({layouts.PLAIN.head})(/.*)?"


def head_leaves(params: Params, head: str | None) -> dict[Path, Any]:
    """The leaves of the task head: ``"auto"`` looks for what the model's layout calls it, a regex must match, None is no head.

    Raises:
      ValueError: if a head was named that the model does not have.
    """
    if head is None:
        return {}
    flat = flatten(params)
    if head == "auto":
        return {path: flat[path] for path in layouts.find(flat, layouts.Role.HEAD, required=False)}
    chosen = select(flat, head, option="head", params=params)
    return {path: flat[path] for path in chosen}


def not_head(params: Params, head: str | None) -> dict[str, Any]:
    """The base's leaves by path without those of the task head: what a method chooses its targets from."""
    skip = head_leaves(params, head)
    return {path: leaf for path, leaf in flatten(params).items() if path not in skip}
