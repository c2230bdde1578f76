"""The variables of a linen model, ``{"params": ..., "batch_stats": ...}``, where its parameters alone are meant."""

import warnings
from collections.abc import Mapping
from typing import Any

from jpeft.tree.paths import Params

PARAMS = "params"

# The collections of linen's own layers. A tree with other keys beside "params" may be the parameters of a model with a module of that name.
COLLECTIONS = frozenset({"batch_stats", "cache", "intermediates", "perturbations"})


def split_variables(tree: Any) -> tuple[Params, dict[str, Any]]:
    """Split variables, such as ``model.init`` returns them, into the parameters and the other collections.

    A tree that is not variables is returned as it is, without other collections.

    Raises:
      ValueError: for a tree that may be variables or parameters, and for variables with an adapter in them.

    >>> split_variables({"params": {"kernel": 1}, "batch_stats": {"mean": 2}})
    ({'kernel': 1}, {'batch_stats': {'mean': 2}})
    >>> split_variables({"kernel": 1})
    ({'kernel': 1}, {})
    """
    others: dict[str, Any] = {}
    # More than once, because a train state may hold {"params": model.init(...)}.
    while isinstance(tree, Mapping) and not _is_nnx_state(tree) and isinstance(tree.get(PARAMS), Mapping):
        beside = {name: part for name, part in tree.items() if name != PARAMS}
        if unknown := sorted(beside.keys() - COLLECTIONS):
            raise ValueError(
                f"This tree holds 'params' beside {', '.join(map(repr, unknown))}, as the variables of a linen model do, where the "
                "parameters alone are needed: give variables['params']. Give the other collections to the wrapped model: "
                f"forward(peft, x, collections={{{unknown[0]!r}: ...}})."
            )
        tree, others = tree[PARAMS], beside | others
    return tree, others


def _is_nnx_state(tree: Any) -> bool:
    """Whether a tree is the state of an NNX model, in which `params` is a module's name; told by name so that NNX need not be imported."""
    return any(cls.__name__ == "State" and cls.__module__.startswith("flax.nnx") for cls in type(tree).__mro__)


def params_of(tree: Any) -> Params:
    """Return the parameters in a model's variables; any other tree is returned as it is.

    Collections that are left out are named in a warning, because the model cannot run without them.
    """
    params, others = split_variables(tree)
    if others:
        names = sorted(others)
        warnings.warn(
            f"jpeft took the parameters of the variables that it was given. It keeps no other collections ({', '.join(names)}): give them "
            f"to the wrapped model, forward(peft, x, collections={{{names[0]!r}: variables[{names[0]!r}]}}). Give variables['params'] to "
            "end this warning.",
            stacklevel=6,  # the caller of `jpeft.apply` or `jpeft.load`
        )
    return params
