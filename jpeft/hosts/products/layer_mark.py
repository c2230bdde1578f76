"""A mark that layers put on their own parameters while a model is traced: which axes a layer sees.

`nn.vmap` and the like give each layer a part of a parameter. Where they map over the parameters but not over the inputs, the product looks
like one kernel with more outputs; the mark tells that it is a stack of kernels.
"""

from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching

MARK = core.Primitive("jpeft_layer_parameter")
MARK.def_impl(lambda x, **params: x)
MARK.def_abstract_eval(lambda x, **params: x)


def mark(x: jax.Array) -> None:
    """Say that a layer sees all axes of an array."""
    MARK.bind(x, axes=tuple(range(x.ndim)))


def _batched(args: tuple[Any, ...], dims: tuple[Any, ...], *, axes: tuple[int, ...]) -> tuple[Any, Any]:
    (x,), (dim,) = args, dims
    # The array has one more axis here than inside; those from `dim` on have moved.
    return MARK.bind(x, axes=tuple(axis + (axis >= dim) for axis in axes)), dim


batching.primitive_batchers[MARK] = _batched


def _differentiated(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, axes: tuple[int, ...]) -> tuple[Any, Any]:
    return MARK.bind(*primals, axes=axes), tangents[0]


ad.primitive_jvps[MARK] = _differentiated
