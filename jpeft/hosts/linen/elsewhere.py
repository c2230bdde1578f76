"""Parameters with leaves that a model also reads elsewhere: refused, because there the change would be lost without a word.

A parent may use its child's table for its scores, by `variables`, by an attribute that `setup` has made, or by a property. No interceptor
sees that. So the wrapped call is traced abstractly, with a mark around all middleware, and each use of an adapted parameter is looked up:
those that stand in middleware are right, and any other is an error.
"""

import contextlib
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import jax

from jpeft.core.method import Method
from jpeft.hosts.linen.ways_out import way_out
from jpeft.hosts.products import reads
from jpeft.tree.paths import Params, Path

MIDDLEWARE = "jpeft_middleware"  # name of the scopes in which middleware runs, while reads are looked up


def marked(mark: bool) -> AbstractContextManager[Any]:
    """A scope that tells middleware from the rest of the model."""
    return jax.named_scope(MIDDLEWARE) if mark else contextlib.nullcontext()


def refuse_reads_elsewhere(method: Method, adapted: Collection[Path], outputs: Callable[[Params], Any], bound: Params) -> None:
    """Refuse a parameter that a call uses outside of middleware.

    Args:
      method: The method that adapts the parameters.
      adapted: Their paths.
      outputs: Runs the call with marks around middleware.
      bound: The parameters with leaves.

    Raises:
      ValueError: with the parameter, and where it is used.
    """
    try:
        found = reads(outputs, bound)
    except Exception:  # a model that looks at the values of its parameters cannot be traced, and runs all the same
        return
    for read in found:
        if read.path in adapted and MIDDLEWARE not in read.scopes:
            where = f"in '{read.scopes}'" if read.scopes else "outside of all modules"
            raise ValueError(
                f"{method.name} adds to '{read.path}', which this call also uses {where} (`{read.primitive}`), past the module that holds "
                f"it: there the change would be silently lost. {way_out(method)}."
            )
