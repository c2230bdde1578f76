"""Several methods as one."""

import dataclasses
import functools
from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.groups import Group
from jpeft.core.layer import Layer
from jpeft.core.method import Method
from jpeft.core.stages import Stage
from jpeft.core.statistics import Statistic
from jpeft.core.update_rule import UpdateRule


class Chain(Method):
    """Several methods applied to one base; made by `jpeft.chain`.

    Attributes:
      methods: The parts as pairs of name and method, the one closest to the base first.
    """

    methods: tuple[tuple[str, Method], ...]

    name = "chain"
    summary = "several methods at once"

    def check(self) -> None:
        """Refuse parts that are chains themselves, or that take stages together."""
        for name, part in self.methods:
            if part.parts:
                raise ValueError(f"chain({name}=...): a chain within a chain; list its parts here: {[n for n, _ in part.parts]}.")
            if not name or {"/", tree.ADDED} & {name, *name}:
                raise ValueError(f"chain: {name!r} is no name for a part: it must be neither empty nor {tree.ADDED!r}, and hold no '/'.")
            if name == "params":
                raise ValueError("chain(params=...): 'params' is the base's own collection; choose another name.")
        staged = [name for name, part in self.methods if part.stages]
        if len(staged) > 1:
            raise ValueError(
                f"chain: the training of {' and of '.join(map(repr, staged))} takes stages, and the steps of a run are divided among the "
                "stages of one method. Chain one of them, and give the others as they are in their last stage."
            )

        budgets = [name for name, part in self.methods if type(part).update_rule is not Method.update_rule]
        if staged and budgets:
            raise ValueError(
                f"chain: {budgets[0]!r} counts the steps of its optimizer, and each stage of {staged[0]!r} begins with a new optimizer. "
                "Chain one of them without the other."
            )

    # --- making and binding ---------------------------------------------------------------------------------------------------------

    def check_base(self, params: tree.Params) -> None:
        """Each part's own check."""
        for _, part in self.methods:
            part.check_base(params)

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """One adapter for each part. A leaf that two parts would replace, such as the task head, belongs to the first.

        Raises:
          ValueError: if a part replaces a leaf that an earlier part adapts, or changes a kernel behind a part that computes with it.
        """
        out: dict[str, Any] = {}
        replaced: set[str] = set()
        adapted: dict[str, str] = {}  # path of a base leaf -> the part that adapts it
        for name, part in self.methods:
            adapter = part.init(tree.key_for(key, name), params, stats=stats)
            own, beside, _ = tree.split(params, adapter)
            if not part.wraps_layers:
                self._check_kernels(name, beside.keys(), params, out)
            for path in own.keys() & adapted.keys():
                raise ValueError(
                    f"chain: '{name}' replaces '{path}', which '{adapted[path]}' before it adapts, so the earlier change would be lost. "
                    f"List '{name}' before '{adapted[path]}'."
                )
            out[name] = tree.unflatten({path: leaf for path, leaf in tree.flatten(adapter).items() if path not in replaced})
            replaced |= own.keys()
            adapted |= dict.fromkeys(part.adapted_paths(params, adapter) - own.keys(), name)
        return out

    def _check_kernels(self, name: str, changed: Set[str], params: tree.Params, earlier: tree.Adapter) -> None:
        """Refuse a part that changes kernels in `bind`, so before all layers, behind one whose change depends on the kernel.

        Raises:
          ValueError: with the order that is meant.
        """
        for other, adapter in earlier.items():
            part = dict(self.methods)[other]
            if part.wraps_layers and not part.adds_to_kernel and part.why_no_merge is None:
                for path in sorted(changed & part.adapted_paths(params, adapter)):
                    raise ValueError(
                        f"chain: '{name}' changes '{path}' itself, so '{other}' before it would compute with it, while merging would "
                        f"add it afterwards. List '{name}' before '{other}'."
                    )

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes of each part's adapter, without the leaves that an earlier part replaces."""
        out: dict[str, Any] = {}
        replaced: set[str] = set()
        for name, part in self.methods:
            expected = part.expected(params, adapter.get(name, {}))
            own, beside, _ = tree.split(params, expected)
            # A part holds no leaf that an earlier part replaces, and nothing beside such a leaf if it was replaced in an earlier stage.
            held = list(tree.flatten(adapter.get(name, {})))
            gone = [path for path in beside.keys() & replaced if not any(leaf.startswith(f"{path}/") for leaf in held)]
            absent = replaced | {f"{path}/{leaf}" for path in gone for leaf in tree.flatten(beside[path])}
            out[name] = tree.unflatten({path: leaf for path, leaf in tree.flatten(expected).items() if path not in absent})
            replaced |= own.keys()
        return out

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Bind the parts one after the other; each module finds the leaves of each part under the part's name."""
        grafts: dict[str, dict[str, Any]] = {}
        for i, (name, part) in enumerate(self.methods):
            bound = part.bind(params, adapter[name], rng=None if rng is None else jax.random.fold_in(rng, i))
            params, new = tree.pop_grafts(bound)
            for path, leaves in new.items():
                grafts.setdefault(path, {})[name] = leaves
        return tree.put_grafts(params, grafts)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """The middleware of all parts that have leaves here, the first part closest to the layer."""
        for i, (name, part) in enumerate(self.methods):
            if name in leaves:
                layer = layer.with_middleware(part, name, leaves[name], None if rng is None else jax.random.fold_in(rng, i))
        return layer(*inputs)

    @property
    def wraps_layers(self) -> bool:
        """Whether any part does."""
        return any(part.wraps_layers for _, part in self.methods)

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """Merge the parts one after the other, the first part first."""
        for name, part in self.methods:
            params = part.merge(params, adapter[name])
        return params

    # --- training -------------------------------------------------------------------------------------------------------------------

    def labels(self, adapter: tree.Adapter) -> Any:
        """The labels of all parts. Two parts may have groups of one name, so a group's label begins with its part's name."""
        out: dict[str, Any] = {}
        for name, part in self.methods:
            own = dict(part.groups)
            rename = lambda label, own=own, name=name: f"{name}/{label}" if label in own else label
            out[name] = jax.tree.map(rename, part.labels(adapter[name]))
        return out

    @property
    def groups(self) -> tuple[tuple[str, Group], ...]:
        """The groups of all parts."""
        return tuple((f"{name}/{label}", group) for name, part in self.methods for label, group in part.groups)

    def penalty(self, adapter: tree.Adapter) -> jax.Array:
        """The sum of the parts' penalties."""
        return sum((part.penalty(adapter[name]) for name, part in self.methods), jnp.zeros(()))

    def penalty_on(self, params: tree.Params, adapter: tree.Adapter) -> jax.Array:
        """The sum of the parts' penalties."""
        return sum((part.penalty_on(params, adapter[name]) for name, part in self.methods), jnp.zeros(()))

    def update_rule(self, params: tree.Params, adapter: tree.Adapter) -> UpdateRule | None:
        """The rules of the parts that have one, each for its own adapter."""
        found = {name: part.update_rule(params, adapter[name]) for name, part in self.methods}
        rules = {name: rule for name, rule in found.items() if rule is not None}

        def update(grads: Any, updates: Any, state: Any, adapter: Any) -> tuple[Any, Any]:
            moved = {name: rule.update(grads[name], updates[name], state[name], adapter[name]) for name, rule in rules.items()}
            return {**updates, **{name: new for name, (new, _) in moved.items()}}, {name: own for name, (_, own) in moved.items()}

        return UpdateRule(lambda adapter: {name: rule.init(adapter[name]) for name, rule in rules.items()}, update) if rules else None

    def for_steps(self, steps: int) -> "Chain":
        """Each part for so many updates."""
        return Chain(methods=tuple((name, part.for_steps(steps)) for name, part in self.methods))

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """The kinds of all parts, each once."""
        return tuple(dict.fromkeys(kind for _, part in self.methods for kind in part.requires_stats))

    @property
    def reduce_grads_locally(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part's gradient is computed from a larger one."""
        return any(part.reduce_grads_locally for _, part in self.methods)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the one part that has some."""
        return tuple(
            dataclasses.replace(stage, advance=functools.partial(self._advance, name, stage))
            for name, part in self.methods
            for stage in part.stages
        )

    def _advance(
        self, name: str, stage: Stage, params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None
    ) -> tuple[Method, tree.Adapter]:
        """Move one part to its next stage; the others stay as they are."""
        part, moved = stage.advance(params, adapter[name], key=tree.key_for(key, name), stats=stats)
        return chain(**(dict(self.methods) | {name: part})), {**adapter, name: moved}

    @property
    def folds(self) -> bool:
        """Whether any part does."""
        return any(part.folds for _, part in self.methods)

    def fold(self, params: tree.Params, adapter: tree.Adapter) -> tuple[Method, tree.Adapter]:
        """Fold each part."""
        folded = {name: part.fold(params, adapter[name]) for name, part in self.methods}
        return chain(**{name: part for name, (part, _) in folded.items()}), {name: leaves for name, (_, leaves) in folded.items()}

    @property
    def takes_index(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part does."""
        return any(part.takes_index for _, part in self.methods)

    def assign(self, adapter: tree.Adapter, index: Any) -> tree.Adapter:
        """The index for each part that takes one."""
        if not self.takes_index:
            raise ValueError(f"{self!r}: no part takes an index; each does the same to every example of a batch.")
        return {name: part.assign(adapter[name], index) if part.takes_index else adapter[name] for name, part in self.methods}

    def assigned(self, adapter: tree.Adapter) -> jax.Array | None:
        """The index, which all parts that take one have in common."""
        return next((part.assigned(adapter[name]) for name, part in self.methods if part.takes_index), None)

    def adapted_paths(self, params: tree.Params, adapter: tree.Adapter) -> set[str]:
        """The paths of all parts."""
        return {path for name, part in self.methods for path in part.adapted_paths(params, adapter[name])}

    def count_changed(self, params: tree.Params, adapter: tree.Adapter) -> int:
        """A bound: two parts may change the same scalars, and no part changes more than the leaves that it adapts."""
        total = sum(part.count_changed(params, adapter[name]) for name, part in self.methods)
        paths = self.adapted_paths(params, adapter)
        return min(total, tree.size([leaf for path, leaf in tree.flatten(params).items() if path in paths]))

    # --- as data --------------------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[tuple[str, Method], ...]:
        """The methods by name, in order."""
        return self.methods

    def config(self) -> dict[str, Any]:
        """The configurations of the parts by name."""
        return {"method": "chain", "parts": {name: part.config() for name, part in self.methods}}

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"jpeft.chain({', '.join(f'{name}={part!r}' for name, part in self.methods)})"


def chain(**parts: Method) -> Chain:
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
    return Chain(methods=tuple(parts.items()))
