"""What reaches the outputs, found in one abstract trace: no number is computed."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from jpeft.tree.adapters import Adapter
from jpeft.tree.paths import Params, first_few, flatten


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


def check_reach(closed: ClosedJaxpr, output: int, adapter: Adapter, trained: Collection[str], method: str) -> None:
    """Check that what is trained moves an output of a program that was traced already: the cheap part of `jpeft.check`.

    Args:
      closed: The program. Its first inputs are the leaves of the adapter.
      output: The number of the output, such as the loss.
      adapter: The adapter, or its structure.
      trained: The paths of the leaves that are trained.
      method: Name of the method.

    Raises:
      ValueError: if no trained leaf reaches the output. A warning names leaves that do not, where others do.

    >>> program = jax.make_jaxpr(lambda adapter, x: (adapter["a"] * x).sum())({"a": 1.0, "b": 2.0}, jax.numpy.ones(3))
    >>> check_reach(program, 0, {"a": 1.0, "b": 2.0}, ["a"], "lora")
    """
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [i == output for i in range(len(closed.jaxpr.outvars))])
    dead = [path for path, is_used in zip(flatten(adapter), used, strict=False) if path in trained and not is_used]
    if dead and len(dead) == len(trained):
        raise ValueError(
            f"{method}: no trained leaf moves the loss, so nothing would be learned: {first_few(dead)}. The model does not use what they "
            "stand at for these inputs: choose another target, or train the head. jpeft.check says what the method reaches."
        )
    if dead:
        warnings.warn(f"{method}: {len(dead)} of {len(trained)} trained leaves do not move the loss: {first_few(dead)}.", stacklevel=2)


def reach_of(closed: ClosedJaxpr, adapter: Adapter, params: Params) -> Reach:
    """The same of a program that was traced already."""
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    names = list(flatten(adapter)), list(flatten(params))
    count = len(names[0])
    unused = lambda names, used: tuple(name for name, is_used in zip(names, used, strict=True) if not is_used)
    return Reach(unused(names[0], used[:count]), unused(names[1], used[count:]))
