"""What reaches the outputs, found in one abstract trace: no number is computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from jpeft.tree.adapters import Adapter
from jpeft.tree.paths import Params, flatten


class Reach(NamedTuple):
    """What a model does not read for given inputs.

    Attributes:
      dead: Leaves of the adapter that no output depends on: training cannot move them.
      unread: Parameters of the base that no output depends on, with the method in it.
    """

    dead: tuple[str, ...]
    unread: tuple[str, ...]


def reach(run: Callable[[Adapter, Params], Any], adapter: Adapter, params: Params) -> Reach:
    """Trace ``run(adapter, params)`` on shapes, and follow its outputs back.

    >>> import jax.numpy as jnp
    >>> reach(lambda adapter, params: adapter["a"] * params["w"], {"a": jnp.ones(2), "b": jnp.ones(2)}, {"w": jnp.ones(2)})
    Reach(dead=('b',), unread=())
    """
    return reach_of(jax.make_jaxpr(run)(adapter, params), adapter, params)


def reach_of(closed: ClosedJaxpr, adapter: Adapter, params: Params) -> Reach:
    """The same of a program that was traced already."""
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    names = list(flatten(adapter)), list(flatten(params))
    count = len(names[0])
    unused = lambda names, used: tuple(name for name, is_used in zip(names, used, strict=True) if not is_used)
    return Reach(unused(names[0], used[:count]), unused(names[1], used[count:]))
