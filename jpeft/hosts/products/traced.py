"""A call as a jaxpr, whatever else than arrays its arguments and its result hold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jpeft.tree.paths import Path, flatten


class Traced(NamedTuple):
    """A traced call ``fn(params, *args)``.

    Attributes:
      closed: The jaxpr.
      arrays: Its inputs: the arrays among parameters and arguments, in the order of the tree.
      paths: Of each input that is a parameter, None for the others.
      rebuild: Makes the call's result of the outputs.
    """

    closed: Any
    arrays: list[Any]
    paths: list[Path | None]
    rebuild: Callable[[list[Any]], Any]


def trace(fn: Callable[..., Any], params: Any, *args: Any) -> Traced:
    """Trace a call on arrays or on their shapes; values of other types are passed as they are.

    >>> traced = trace(lambda params, x, name: (x @ params["w"], name), {"w": jax.numpy.ones((2, 2))}, jax.numpy.ones((1, 2)), "relu")
    >>> traced.paths, traced.rebuild([1])
    (['w', None], (1, 'relu'))
    """
    leaves, tree = jax.tree.flatten((params, args))
    dynamic = list(map(_is_array, leaves))
    result: list[Any] = []

    def of_arrays(*arrays: Any) -> list[Any]:
        given = iter(arrays)
        merged = [next(given) if is_array else leaf for leaf, is_array in zip(leaves, dynamic, strict=True)]
        params, args = jax.tree.unflatten(tree, merged)
        out, structure = jax.tree.flatten(fn(params, *args))
        result[:] = [structure, [(not _is_array(each), None if _is_array(each) else each) for each in out]]
        return [each for each in out if _is_array(each)]

    arrays = [leaf for leaf, is_array in zip(leaves, dynamic, strict=True) if is_array]
    closed = jax.make_jaxpr(of_arrays)(*arrays)
    structure, outs = result

    def rebuild(values: list[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(structure, [value if static else next(rest) for static, value in outs])

    of_params = list(flatten(params))
    paths = [*of_params, *[None] * (len(leaves) - len(of_params))]
    return Traced(closed, arrays, [path for path, is_array in zip(paths, dynamic, strict=True) if is_array], rebuild)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
