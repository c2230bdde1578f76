"""Methods of a module besides `__call__`, such as `encode` or `project`: which of a module's leaves they are for.

A module may compute with its parameters in any number of methods, and may have others that only give a mask or a number. What a method
does is found by tracing it abstractly, by itself: which parameters its outputs depend on, and what its outputs are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.core import DenyList

from jpeft.core.method import Method
from jpeft.hosts.linen.dependence import inputs_used
from jpeft.tree.adapters import ADDED


class Traced(NamedTuple):
    """One call of a module.

    Attributes:
      reads: The names of the module's own parameters that the outputs depend on.
      outputs: Shapes and dtypes of the outputs.
    """

    reads: set[str]
    outputs: Any


def leaves_for(
    method: Method,
    leaves: Mapping[str, Any],
    module: nn.Module,
    name: str,
    own: Mapping[str, Any],
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> dict[str, Any]:
    """The leaves at a module that one of its methods is to be changed by; empty for a method that has nothing to do with them.

    Args:
      method: The method of fine-tuning.
      leaves: All its leaves at the module.
      module: The bound module.
      name: The name of the module's method.
      own: The module's parameters.
      inputs: The positional arguments of the call.
      keywords: Its keyword arguments.
    """
    return belonging(method, leaves, own, inputs, _trace(module, name, own, inputs, keywords))


def has_added(method: Method, leaves: Mapping[str, Any]) -> bool:
    """Whether there are leaves that were added to a module, and not to one of its parameters."""
    return ADDED in leaves or any(has_added(part, leaves[name]) for name, part in method.parts if name in leaves)


def belonging(method: Method, leaves: Mapping[str, Any], own: Mapping[str, Any], inputs: tuple[Any, ...], call: Traced) -> dict[str, Any]:
    """The leaves at a module that one of its methods is to be changed by, given what the call reads and returns."""
    if method.parts:
        parts = {name: belonging(part, leaves[name], own, inputs, call) for name, part in method.parts if name in leaves}
        return {name: part for name, part in parts.items() if part}
    kept = {name for name in leaves if name in own and name in call.reads}
    if ADDED in leaves and method.goes_around(inputs, call.outputs, leaves[ADDED]):
        kept.add(ADDED)
    # What is no parameter's, such as a static setting, goes with the rest.
    return {name: part for name, part in leaves.items() if name in kept or (kept and name not in own and name != ADDED)}


def _trace(module: nn.Module, name: str, own: Mapping[str, Any], inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Traced:
    """Trace one call abstractly, on an unbound copy of the module."""
    unbound = module.clone(parent=None, name=None)
    assert module.scope is not None, "Only bound modules are intercepted."
    others = {collection: tree for collection, tree in module.variables.items() if collection != "params"}
    rngs = dict.fromkeys(module.scope.rngs, jax.random.key(0))  # which numbers are drawn does not matter

    def run(params: Mapping[str, Any]) -> Any:
        mutable = DenyList(("params",))
        return unbound.apply({**others, "params": params}, *inputs, rngs=rngs, mutable=mutable, method=name, **keywords)[0]

    try:
        used, outputs = inputs_used(run, dict(own))
    except Exception:
        return Traced(set(own), None)
    return Traced({path.partition("/")[0] for path in used}, outputs)
