"""Adapters: nested dicts that mirror the base tree.

What stands at a path says what it means, so no method needs a second way of saying it:

* an **array at the path of a base leaf** replaces that leaf (BitFit's biases, a task head);
* a **dict at the path of a base leaf** holds leaves that live beside it (LoRA's ``a`` and ``b`` beside ``kernel``);
* a **dict under the key** ``"+"`` holds leaves added to the module at that place (a bottleneck's ``down`` and ``up``).
"""

from collections.abc import Callable, Mapping
from typing import Any

from jpeft.tree.paths import Params, Path, first_few, flatten, replace, unflatten

Adapter = Any  # a nested dict of arrays that mirrors the base tree

ADDED = "+"  # adapter key: leaves added to a module rather than to one of its parameters
GRAFT = "jpeft"  # key inside a bound parameter tree: what a layer finds beside its own parameters


def split(params: Params, adapter: Adapter) -> tuple[dict[Path, Any], dict[Path, dict[str, Any]], dict[Path, dict[str, Any]]]:
    """The three things an adapter tree can hold: replaced leaves, leaves beside a parameter, leaves added to a module.

    Returns:
      ``(replaced, beside, added)``: path of a base leaf -> array; path of a base leaf -> dict of leaves; module path -> dict of leaves.

    Raises:
      ValueError: if a part of the adapter belongs to no place of the base.
    """
    base = flatten(params)
    replaced: dict[Path, Any] = {}
    beside: dict[Path, dict[str, Any]] = {}
    added: dict[Path, dict[str, Any]] = {}
    for path, leaf in flatten(adapter).items():
        if path in base:
            replaced[path] = leaf
            continue
        parts = path.split("/")
        if ADDED in parts:
            at = parts.index(ADDED)
            added.setdefault("/".join(parts[:at]), {})["/".join(parts[at + 1 :])] = leaf
            continue
        for n in range(len(parts) - 1, 0, -1):
            owner = "/".join(parts[:n])
            if owner in base:
                beside.setdefault(owner, {})["/".join(parts[n:])] = leaf
                break
        else:
            raise ValueError(
                f"The adapter holds '{path}', but the parameters have neither a leaf of that name nor one that it could stand beside. "
                f"Was it made for another model? Parameters begin with: {first_few(base)}."
            )
    return replaced, {k: unflatten(v) for k, v in beside.items()}, {k: unflatten(v) for k, v in added.items()}


def graft(params: Params, adapter: Adapter) -> Params:
    """Bind an adapter to its base: replaced leaves take their place, all others are put where their layer can read them.

    The layer of ``a/b/kernel`` finds the leaves beside its kernel as ``a/b/jpeft/kernel/...`` and those added to it as ``a/b/jpeft/+/...``.
    Lifted transforms (`nn.scan`, `nn.remat`, `nn.jit`, ...) slice and forward them together with the kernel, since they stand in the
    same collection. No array is touched: this builds dicts only.

    Raises:
      ValueError: if the adapter does not fit the base, or leaves must be added and `params` is not a nested dict.
    """
    replaced, beside, added = split(params, adapter)
    params = replace(params, replaced) if replaced else params
    grafts: dict[Path, dict[str, Any]] = {}
    for path, leaves in beside.items():
        module, _, name = path.rpartition("/")
        grafts.setdefault(module, {})[name] = leaves
    for module, leaves in added.items():
        grafts.setdefault(module, {})[ADDED] = leaves
    return put_grafts(params, grafts)


def put_grafts(params: Params, grafts: Mapping[Path, Any]) -> Params:
    """Insert ``{module path: leaves}`` under the key ``"jpeft"`` of those modules, copying only the dicts on the way.

    Raises:
      ValueError: if `params` is not a nested mapping.
    """
    if not grafts:
        return params
    if not isinstance(params, Mapping):
        raise ValueError(
            f"Leaves can be added only to parameters in nested dicts, as linen keeps them, not to a {type(params).__name__}. "
            "Use a selective method, or a mergeable one through the dense host: `jpeft.wrap(fn, method, host='dense')`."
        )
    out = dict(params)
    for module, leaves in grafts.items():
        node = out
        for name in module.split("/") if module else ():
            key = key_of(node, name)
            child = node.get(key, {})
            node[key] = dict(child)
            node = node[key]
        node[GRAFT] = leaves
    return out


def key_of(node: Mapping[Any, Any], name: str) -> Any:
    """The key of a mapping that a path calls `name`: lists of NNX modules have numbers as keys.

    >>> key_of({0: "first"}, "0"), key_of({"0": "first"}, "0")
    (0, '0')
    """
    return int(name) if name not in node and name.isdecimal() and int(name) in node else name


def pop_grafts(params: Params) -> tuple[Params, dict[Path, Any]]:
    """Take all grafts out again: ``(params without them, {module path: leaves})``."""
    found: dict[Path, Any] = {}

    def strip(node: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        if GRAFT in node:
            found["/".join(map(str, path))] = node[GRAFT]
        children = {key: strip(child, (*path, key)) for key, child in node.items() if key != GRAFT}
        # A parameterless module exists in the tree only because something was grafted onto it.
        return {key: child for key, child in children.items() if not (isinstance(child, dict) and not child and node[key])}

    stripped = strip(params, ())
    return (stripped, found) if found else (params, found)


def merge_leaves(params: Params, adapter: Adapter, merge_leaf: Callable[[Path, Any, dict[str, Any]], Any], *, why_not: str = "") -> Params:
    """Merge: replaced leaves take their place; ``merge_leaf(path, leaf, leaves)`` gives the new value of a leaf with leaves beside it.

    Raises:
      ValueError: if the adapter adds leaves to modules, which no parameter can take up; `why_not` ends the message.
    """
    replaced, beside, added = split(params, adapter)
    if added:
        raise ValueError(f"Cannot merge: {why_not or 'new computation was added to ' + first_few(added)}.")
    base = flatten(params)
    return replace(params, replaced | {path: merge_leaf(path, base[path], leaves) for path, leaves in beside.items()})
