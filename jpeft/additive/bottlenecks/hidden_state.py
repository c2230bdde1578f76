"""The hidden state among what a module takes and returns.

A block may return its hidden state alone, or beside a cache, attention weights or sums for the loss, in a tuple, a list or a dict, in any
order. The hidden state is the array of floating-point numbers that is as wide as the bottleneck. Where several are, it is the one that is
shaped like the module's input; where still several are, nobody but the user can tell.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.tree.paths import path_str


def change_hidden(
    outputs: Any, change: Callable[[jax.Array], jax.Array], *, width: int, inputs: Sequence[Any], chosen: str | None, where: str
) -> Any:
    """A module's outputs with ``change(h)`` in place of the hidden state h.

    Args:
      outputs: What the module returned.
      change: The change.
      width: Size of the hidden state's last axis.
      inputs: What the module was given.
      chosen: The option `hidden_state`.
      where: The method and the module, for messages.

    Raises:
      ValueError: if no output can be the hidden state, or several can be.

    >>> cache, h = {"k": jnp.ones((2, 4, 4))}, jnp.zeros((2, 4, 8))
    >>> new = change_hidden((cache, h), lambda h: h + 1, width=8, inputs=(h,), chosen=None, where="adapter: 'layer_0'")
    >>> float(new[1].max()), new[0] is cache
    (1.0, False)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(outputs)
    named = {path_str(keys): leaf for keys, leaf in leaves}
    found = find_hidden(named, width=width, inputs=inputs, chosen=chosen, where=where)
    # A block may return one array at two places, as the carry of a loop and to be collected: both are the hidden state.
    h = named[found]
    new = change(h)
    return jax.tree_util.tree_unflatten(structure, [new if leaf is h else leaf for leaf in named.values()])


def find_hidden(named: dict[str, Any], *, width: int, inputs: Sequence[Any], chosen: str | None, where: str) -> str:
    """The path of the hidden state among a module's outputs, which are given by path; see `change_hidden`."""
    fitting = {path: leaf for path, leaf in named.items() if is_hidden(leaf, width)}
    if chosen is not None:
        matching = [path for path in named if re.fullmatch(chosen, path)]
        if len(matching) != 1 or matching[0] not in fitting:
            what = "one array" if list(named) == [""] else _listed(named)
            raise ValueError(f"{where}: hidden_state={chosen!r} should name one output that is {width} wide; it returns {what}.")
        return matching[0]
    if not fitting:
        raise ValueError(
            f"{where} returns nothing that is {width} wide, as its bottleneck is, but {_listed(named)}. Choose others: target=."
        )
    given = next((x for x in inputs if is_hidden(x, None)), None)
    rules = (
        lambda leaf: given is None or leaf.shape[:-1] == given.shape[:-1],
        lambda leaf: given is None or leaf.shape == given.shape,
        lambda leaf: given is None or leaf.dtype == given.dtype,
    )
    for rule in rules:
        if len({id(leaf) for leaf in fitting.values()}) > 1:
            fitting = {path: leaf for path, leaf in fitting.items() if rule(leaf)} or fitting
    if len({id(leaf) for leaf in fitting.values()}) > 1:
        raise ValueError(
            f"{where} returns several arrays that may be the hidden state: {_listed(fitting)}. Say which: hidden_state={[*fitting][-1]!r}."
        )
    return next(iter(fitting))


def is_hidden(x: Any, width: int | None) -> bool:
    """Whether something is an array of activations, and of this width."""
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
    return dtype is not None and len(shape) > 0 and jnp.issubdtype(dtype, jnp.floating) and width in (None, shape[-1])


def _listed(named: dict[str, Any]) -> str:
    described = [
        f"{path!r} {x.dtype}{list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else f"{path!r} {type(x).__name__}"
        for path, x in named.items()
    ]
    return ", ".join(described[:8]) + (", ..." if len(described) > 8 else "") or "nothing"
