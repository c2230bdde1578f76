"""Several methods as one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.method import AdvanceFn, Layer, Method, Stage


def chain(**parts: Method) -> Method:
    """Apply several methods to one base; the result is a `Method` again. The first listed is closest to the base.

    The adapter is a dict with one adapter for each part, and each part is a collection of its own in `Peft.variables`. Binding, the order
    of middleware around a layer, and merging all go from the first to the last. A leaf that two parts would replace (the task head, say)
    belongs to the first.

    Args:
      **parts: Methods by a name of your choice; two LoRAs may stand side by side.

    Returns:
      A `Method` that merges if all its parts do.

    Raises:
      ValueError: without parts, for a part that is no `Method`, for several parts whose training takes stages; from `init`, if a part
        replaces a leaf that an earlier part adapts.

    >>> import jpeft
    >>> jpeft.chain(lora=jpeft.lora(rank=8), bitfit=jpeft.bitfit()).parts[1][0]
    'bitfit'
    """
    if not parts:
        raise ValueError("chain() needs methods: jpeft.chain(lora=jpeft.lora(), bitfit=jpeft.bitfit()).")
    for name, part in parts.items():
        if not isinstance(part, Method):
            raise ValueError(f"chain({name}={part!r}): each part must be a jpeft.Method, such as jpeft.lora().")
        if part.parts:
            raise ValueError(f"chain({name}=...): a chain within a chain; list its parts here: {[n for n, _ in part.parts]}.")
        if name == "params":
            raise ValueError("chain(params=...): 'params' is the base's own collection; choose another name.")
    items = tuple(parts.items())
    needs = {part.needs for part in parts.values() if part.needs is not None}
    if len(needs) > 1:
        raise ValueError(f"chain: its parts need different statistics, {sorted(needs)}, and stats= holds one.")

    staged = [name for name, part in items if part.stages]
    if len(staged) > 1:
        raise ValueError(
            f"chain: the training of {' and of '.join(map(repr, staged))} takes stages, and a run has one course of stages, whose lengths "
            "are shares of it. Chain one of them, and give the others as they are in their last stage."
        )

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        out: dict[str, Any] = {}
        replaced: set[str] = set()
        beside: dict[str, str] = {}
        for name, part in items:
            adapter = part.init(tree.key_for(key, name), params, stats=stats)
            mine, adapts, _ = tree.split(params, adapter)
            for path in mine.keys() & beside.keys():
                raise ValueError(
                    f"chain: '{name}' replaces '{path}', which '{beside[path]}' before it adapts, so the earlier change would be lost. "
                    f"List '{name}' before '{beside[path]}'."
                )
            out[name] = tree.unflatten({path: leaf for path, leaf in tree.flatten(adapter).items() if path not in replaced})
            replaced |= mine.keys()
            beside |= dict.fromkeys(adapts, name)
        return out

    def shapes_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        out: dict[str, Any] = {}
        replaced: set[str] = set()
        for name, part in items:
            expected = part.expected(params, adapter.get(name, {}))
            mine, beside, _ = tree.split(params, expected)
            # What an earlier part replaces a part lacks, and what would stand beside it too, if it was replaced a stage ago.
            held = list(tree.flatten(adapter.get(name, {})))
            gone = [path for path in beside.keys() & replaced if not any(leaf.startswith(f"{path}/") for leaf in held)]
            absent = replaced | {f"{path}/{leaf}" for path in gone for leaf in tree.flatten(beside[path])}
            out[name] = tree.unflatten({path: leaf for path, leaf in tree.flatten(expected).items() if path not in absent})
            replaced |= mine.keys()
        return out

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        grafts: dict[str, dict[str, Any]] = {}
        for i, (name, part) in enumerate(items):
            bound = part.bind(params, adapter[name], rng=None if rng is None else jax.random.fold_in(rng, i))
            params, new = tree.pop_grafts(bound)
            for path, leaves in new.items():
                grafts.setdefault(path, {})[name] = leaves
        return tree.put_grafts(params, grafts)

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        for i, (name, part) in enumerate(items):
            if name in leaves:
                layer = layer.through(part.call, name, leaves[name], None if rng is None else jax.random.fold_in(rng, i))
        return layer(*inputs)

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        for name, part in items:
            params = part.merge(params, adapter[name])
        return params

    def fold_fn(params: tree.Params, adapter: tree.Adapter) -> tuple[Method, tree.Adapter]:
        folded = {name: part.fold(params, adapter[name]) if part.fold else (part, adapter[name]) for name, part in items}
        return chain(**{name: part for name, (part, _) in folded.items()}), {name: leaves for name, (_, leaves) in folded.items()}

    def advance(name: str, stage: Stage) -> AdvanceFn:
        def advance_fn(params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None) -> tuple[Method, tree.Adapter]:
            part, moved = stage.advance(params, adapter[name], key=tree.key_for(key, name), stats=stats)
            return chain(**(dict(items) | {name: part})), {**adapter, name: moved}

        return advance_fn

    def changed_fn(params: tree.Params, adapter: tree.Adapter) -> int:
        paths: set[str] = set()
        for name, _ in items:
            replaced, beside, _ = tree.split(params, adapter[name])
            paths |= replaced.keys() | beside.keys()
        # Two parts may change the same scalars, so the sum is a bound, and so are the leaves that they touch.
        total = sum(part.changed(params, adapter[name]) for name, part in items)
        return min(total, tree.size([leaf for path, leaf in tree.flatten(params).items() if path in paths]))

    def labels_fn(adapter: tree.Adapter) -> Any:
        # Two parts may have groups of one name.
        return {
            name: jax.tree.map(lambda label, own=dict(part.groups), name=name: f"{name}/{label}" if label in own else label, labels)
            for name, part, labels in ((name, part, part.labels(adapter[name])) for name, part in items)
        }

    return Method(
        init=init_fn,
        bind=bind_fn,
        call=call_fn,
        merge=merge_fn,
        labels=labels_fn,
        penalty=lambda adapter: sum((part.penalty(adapter[name]) for name, part in items), jnp.zeros(())),
        changed=changed_fn,
        needs=needs.pop() if needs else None,
        shapes=shapes_fn,
        fold=fold_fn if any(part.fold for _, part in items) else None,
        stages=tuple(dataclasses.replace(stage, advance=advance(name, stage)) for name, part in items for stage in part.stages),
        groups=tuple((f"{name}/{label}", group) for name, part in items for label, group in part.groups),
        reduces=any(part.reduces for _, part in items),
        name="chain",
        parts=items,
    )
