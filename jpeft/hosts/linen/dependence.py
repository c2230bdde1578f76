"""What the outputs of a function depend on, found by tracing it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from jpeft.tree.paths import Params, Path, flatten


def inputs_used(fn: Callable[[Params], Any], params: Params) -> tuple[set[Path], Any]:
    """The leaves of a tree that the outputs of ``fn(params)`` depend on, and the outputs' shapes. Nothing is computed.

    >>> import jax.numpy as jnp
    >>> inputs_used(lambda p: (p["a"] * 2, None, "text"), {"a": jnp.ones(3), "b": jnp.ones(4)})
    ({'a'}, (ShapeDtypeStruct(shape=(3,), dtype=float32), None, 'text'))
    """
    leaves = flatten(params)
    treedef, found = jax.tree.structure(params), []

    def run(values: list[Any]) -> list[jax.Array]:
        # A model may return what is no array, such as a name or a number of Python, which no trace can hold.
        out, structure = jax.tree.flatten(fn(jax.tree.unflatten(treedef, values)))
        found.append((structure, [leaf if not _is_array(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in out]))
        return [leaf for leaf in out if _is_array(leaf)]

    jaxpr = jax.make_jaxpr(run)(jax.tree.leaves(params)).jaxpr
    needed = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
    structure, shapes = found[-1]
    return {path for path, var in zip(leaves, jaxpr.invars, strict=True) if var in needed}, jax.tree.unflatten(structure, shapes)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")
