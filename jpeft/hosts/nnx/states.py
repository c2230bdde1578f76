"""The variables of an NNX model by path, and copies of the model made from them.

A path is that of a linen tree where the layouts agree: ``layers/0/attn/query/kernel``, without the variable's own key and with the index of
a list as a name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.tree.paths import Params, Path, first_few, flatten, replace

STATE = "state"  # the collection in which a model's other state goes into a call and comes out of it


def params_of(tree: Any) -> Params:
    """The parameters of a module or of a state, as a state of their own; any other tree is returned as it is.

    Raises:
      ValueError: if there are variables and none is a parameter.
    """
    if isinstance(tree, nnx.Module):
        return _only_params(detached(nnx.state(tree)))
    if isinstance(tree, nnx.State) and not all(isinstance(leaf, nnx.Param) for leaf in _variables(tree)):
        return _only_params(tree)
    return tree


def _only_params(state: Any) -> Any:
    params = nnx.filter_state(state, nnx.Param)
    if not _variables(params):
        kinds = sorted({type(leaf).__name__ for leaf in _variables(state)})
        raise ValueError(
            f"This NNX model or state holds no nnx.Param, and only these are parameters. It holds: {', '.join(kinds) or 'none'}."
        )
    return params


def _variables(state: Any) -> list[Any]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Variable)]


def detached(state: Any) -> Any:
    """A state with variables of its own, so that what happens to those of the model does not reach it."""
    return jax.tree.map(lambda leaf: leaf, state)


class Missing:
    """Stands for the value of a variable that a graphdef alone does not have."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model at the time when it was wrapped.

    Attributes:
      graphdef: Its structure.
      params: Its parameters. Only the structure counts: the values are those of the call.
      others: All else: running means, caches, random keys and counters, plain arrays.
    """

    graphdef: Any
    params: Any
    others: Any

    @classmethod
    def of(cls, model: Any) -> "Snapshot":
        """The snapshot of a module, or of a graphdef, which has no values."""
        if isinstance(model, nnx.GraphDef):
            model = nnx.merge(model, [Missing()] * model.num_leaves)
        graphdef, params, others = nnx.split(model, nnx.Param, ...)
        return cls(graphdef, detached(params), detached(others))

    def merge(self, params: Any, others: Any) -> Any:
        """A new module. `copy`: variables of an outer trace may be read in an inner one, but not be part of its modules."""
        return nnx.merge(self.graphdef, params, others, copy=True)

    def with_params(self, flat: Mapping[Path, Any]) -> Any:
        """The parameters as a state, from those of the caller by path.

        Raises:
          ValueError: if they are not those of the model.
        """
        own = flatten(self.params)
        if absent := [path for path in own if path not in flat]:
            raise ValueError(f"The parameters lack {first_few(absent)}, which the NNX model has. They begin with: {first_few(flat)}.")
        if strange := [path for path in flat if path not in own]:
            others = flatten(self.others)
            why = (
                "which the model keeps, but not as an nnx.Param: give jpeft.apply the model, or nnx.state(model, nnx.Param)"
                if strange[0] in others
                else f"which the NNX model does not have; its own begin with: {first_few(own)}"
            )
            raise ValueError(f"The parameters hold '{strange[0]}', {why}.")
        return replace(self.params, flat)

    def with_others(self, collections: Mapping[str, Any]) -> Any:
        """The other state, with the variables that the caller gives in place of those of the snapshot.

        Raises:
          ValueError: for a variable that the model does not have, and for one that nobody gave.
        """
        own, given = flatten(self.others), {}
        for name, state in collections.items():
            # What a model has recorded in an earlier call has no place in it before the call.
            kept = nnx.filter_state(state, nnx.Not(nnx.Intermediate)) if isinstance(state, nnx.State) else state
            given |= {path: (name, leaf) for path, leaf in flatten(kept).items()}
        if strange := [path for path in given if path not in own]:
            name = given[strange[0]][0]
            raise ValueError(
                f"collections={{{name!r}: ...}} holds '{strange[0]}', which is no state of the NNX model beside its parameters. "
                f"It has: {first_few(own) or 'none'}."
            )
        others = replace(self.others, {path: leaf for path, (_, leaf) in given.items()}) if given else detached(self.others)
        if missing := [path for path, leaf in flatten(others).items() if isinstance(leaf, Missing)]:
            raise ValueError(
                f"A graphdef holds no values, and this model needs {first_few(missing)} beside its parameters: wrap the module itself, or "
                "give the state, forward(peft, x, collections={'state': nnx.state(model, nnx.Not(nnx.Param))})."
            )
        return others
