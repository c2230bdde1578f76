"""Parameters with leaves that a model also reads elsewhere: refused, because there the change would be lost without a word.

A parent may use its child's table for its scores, by `variables`, by an attribute that `setup` has made, or by a property. No interceptor
sees that. So the wrapped call is traced abstractly, with a mark around all middleware, and each use of an adapted parameter is looked up:
those that stand in middleware are right, and any other is an error. A transform such as `nn.map_variables` may hand a layer other values
than those that were bound. Leaves and parameter would then mean something else than the merged parameter: an error, too.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import jax

from jpeft.core.method import Method
from jpeft.hosts.linen.ways_out import way_out
from jpeft.hosts.products.find import Use, walk, whole_views
from jpeft.hosts.products.layer_mark import MARK, mark
from jpeft.hosts.products.traced import trace
from jpeft.tree.adapters import GRAFT
from jpeft.tree.paths import Params, Path

MIDDLEWARE = "jpeft_middleware"  # name of the scopes in which middleware runs, while reads are looked up


def marked(mark: bool) -> AbstractContextManager[Any]:
    """A scope that tells middleware from the rest of the model."""
    return jax.named_scope(MIDDLEWARE) if mark else contextlib.nullcontext()


def mark_leaves(own: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Say in the trace that a layer takes its parameters and leaves here."""
    for value in jax.tree.leaves(({name: own[name] for name in own if not isinstance(own[name], Mapping)}, leaves)):
        if isinstance(value, jax.Array):
            mark(value)


def refuse_reads_elsewhere(method: Method, adapted: Collection[Path], outputs: Callable[[Params], Any], bound: Params) -> None:
    """Refuse a parameter that a call uses outside of middleware, or that reaches its layer as something else.

    Args:
      method: The method that adapts the parameters.
      adapted: Their paths.
      outputs: Runs the call with marks around middleware.
      bound: The parameters with leaves.

    Raises:
      ValueError: with the parameter, and where it is used.
    """
    try:
        traced = trace(outputs, bound)
    except Exception:  # a model that looks at the values of its parameters cannot be traced, and runs all the same
        return
    leaves = {path for path in traced.paths if path is not None and GRAFT in path.split("/")}

    def visit(use: Use, scopes: str) -> None:
        path = use.view.path
        at = f"'{path}'" if path in adapted else f"the module '{path.partition(GRAFT)[0].rstrip('/')}'"
        if use.eqn.primitive is MARK:
            if not _as_it_stands(use):
                _refuse(method, f"{at}, which is changed on its way to its layer, as `nn.map_variables` does")
        elif MIDDLEWARE not in scopes:
            where = f"in '{scopes}'" if scopes else "outside of all modules"
            _refuse(method, f"{at}, which this call also uses {where} (`{use.eqn.primitive.name}`), past the module that holds it")

    walk(traced.closed.jaxpr, whole_views(traced, leaves | set(adapted)), visit)


def refuse_leaves_met(method: Method, error: Exception) -> None:
    """Refuse a model that goes over the parameters of its modules, as `nn.WeightNorm` does, and takes the leaves for some of them.

    Args:
      method: The method.
      error: What flax has raised.

    Raises:
      ValueError: if the error is about leaves of the method.
    """
    met = re.search(rf'"([^"]*)/{GRAFT}/', str(error))
    if met is not None:
        reason = "whose parameters this model goes over by itself, as `nn.WeightNorm` does, and meets what was added"
        raise ValueError(f"{method.name} adds to the module '{met[1].lstrip('/')}', {reason}. {way_out(method)}.") from error


def _as_it_stands(use: Use) -> bool:
    """Whether a layer takes a parameter, or the part that a loop gives it, in the form in which it was bound."""
    view, inside = use.view, use.eqn.params["axes"]
    atoms = [view.parts[i] for i in inside]
    # Each axis is a whole one of the parameter's, in their order; axes of one entry have no atom of their own to be told by.
    whole = all(len(part) <= 1 and all(atom.stride == 1 and atom.size == view.shape[atom.axis] for atom in part) for part in atoms)
    order = [atom.axis for part in atoms for atom in part]
    return whole and order == sorted(order) and not view.factors


def _refuse(method: Method, what: str) -> NoReturn:
    raise ValueError(f"{method.name} adds to {what}: there the change would be silently lost. {way_out(method)}.")
