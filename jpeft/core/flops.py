"""The floating point operations of a traced function, with every loop counted as often as it runs.

XLA counts the body of a loop once, however often it runs, and knows nothing of what a GPU's libraries compute. So the operations are
counted on the program as JAX traced it, once dead code is gone, by the rules that XLA has: 2 for each multiplication with its addition in a
matrix product or a convolution, 1 for each element of a sum, a product, a comparison or a conversion, none for moving data or for an
exponential or another transcendental function. Attention that a kernel computes counts as its matrix products, with the masked half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval


class Flops(NamedTuple):
    """Operations of one call.

    Attributes:
      all: With the body of each loop as often as it runs.
      once: With the body of each loop once, as XLA counts.
    """

    all: float
    once: float

    def __add__(self, other: Any) -> Flops:
        """The operations of both."""
        return Flops(self.all + other.all, self.once + other.once)

    def times(self, number: int, seen: int | None = None) -> Flops:
        """A loop of so many passes, of which XLA sees `seen`."""
        return Flops(self.all * number, self.once * (number if seen is None else seen))


NONE = Flops(0.0, 0.0)

# Operations for each element of the result. Those of random numbers and of the error function are what XLA makes of them.
_ARITHMETIC = (
    "add",
    "add_any",
    "sub",
    "mul",
    "div",
    "rem",
    "max",
    "min",
    "neg",
    "abs",
    "sign",
    "floor",
    "ceil",
    "round",
    "clamp",
    "square",
)
_LOGIC = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "is_finite", "convert_element_type")
_SHIFTS = ("shift_left", "shift_right_logical", "shift_right_arithmetic")
_RANDOM = ("random_bits", "threefry2x32", "random_fold_in")
_ELEMENTS = dict.fromkeys((*_ARITHMETIC, *_LOGIC, *_SHIFTS), 1.0) | dict.fromkeys(_RANDOM, 45.0)
_ELEMENTS |= {"logistic": 3.0, "erfc": 60.0, "erf_inv": 40.0}
# Operations for each element that is read.
_READ = dict.fromkeys([f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or", "xor")], 1.0)
_READ |= {"argmax": 9.0, "argmin": 9.0} | dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), 16.0)


def count_flops(jaxpr: ClosedJaxpr) -> Flops:
    """Count the operations of a traced function, such as `jax.jit(fn).trace(...).jaxpr`, over all devices.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> looped = lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=10)[0]
    >>> count_flops(jax.jit(looped).trace(x).jaxpr)
    Flops(all=10240.0, once=1024.0)
    """
    alive, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _of_jaxpr(alive)


def _of_jaxpr(jaxpr: Any) -> Flops:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), NONE)


def _of_equation(equation: Any) -> Flops:
    name = equation.primitive.name
    if name in _SPECIAL:
        return _SPECIAL[name](equation)
    if name in _ELEMENTS:
        return _plain(_ELEMENTS[name] * _size(equation.outvars[0]))
    if name in _READ:
        return _plain(_READ[name] * (_size(equation.invars[0]) - _size(equation.outvars[0])))
    if "dot_product_attention" in name:
        return _attention(equation)
    return sum((_of_jaxpr(inner) for value in equation.params.values() for inner in _jaxprs(value)), NONE)


def _dot(equation: Any) -> Flops:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return _plain(2.0 * _size(equation.outvars[0]) * math.prod(shape[axis] for axis in contracted))


def _convolution(equation: Any) -> Flops:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return _plain(2.0 * _size(equation.outvars[0]) * math.prod(kernel) / max(outputs, 1))


def _power(equation: Any) -> Flops:
    exponent = abs(equation.params["y"])
    # Squarings, and a multiplication for each further bit.
    return _plain((exponent.bit_length() - 1 + exponent.bit_count() - 1) * _size(equation.outvars[0]) if exponent else 0.0)


def _scatter_add(equation: Any) -> Flops:
    return _plain(float(_size(equation.invars[2])))


def _sort(equation: Any) -> Flops:
    size = _size(equation.invars[0])
    axis = equation.invars[0].aval.shape[equation.params["dimension"]] if size else 1
    return _plain(2.0 * size * max(axis, 1).bit_length())


def _scan(equation: Any) -> Flops:
    length, unroll = equation.params["length"], max(int(equation.params.get("unroll", 1)), 1)
    body = _of_jaxpr(equation.params["jaxpr"].jaxpr)
    # An unrolled loop is compiled as a loop of longer bodies, and what is left behind it.
    return body.times(length, length if length <= unroll else unroll + length % unroll)


def _while(equation: Any) -> Flops:
    body = _of_jaxpr(equation.params["body_jaxpr"].jaxpr)
    return body.times(_passes(equation), 1)


def _passes(equation: Any) -> int:
    """Return how often a loop runs that counts up by one to a known number; 1 if that is not known."""
    condition, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    constants, skipped = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    carried = equation.invars[constants + skipped :]
    outer = dict(zip(condition.jaxpr.invars, [*equation.invars[:constants], *carried], strict=True))
    if len(condition.jaxpr.eqns) != 1 or condition.jaxpr.eqns[0].primitive.name != "lt":
        return 1
    counter, bound = condition.jaxpr.eqns[0].invars
    if isinstance(counter, Literal) or counter not in condition.jaxpr.invars[constants:]:
        return 1
    step = body.jaxpr.outvars[condition.jaxpr.invars.index(counter) - constants]
    counts = any(step in e.outvars and e.primitive.name == "add" and _number(e.invars[1]) == 1 for e in body.jaxpr.eqns)
    start, end = _number(outer[counter]), _number(bound if isinstance(bound, Literal) else outer.get(bound))
    return max(end - start, 0) if counts and start is not None and end is not None else 1


def _number(value: Any) -> int | None:
    return int(value.val) if isinstance(value, Literal) and not getattr(value.val, "shape", ()) else None


def _branches(equation: Any) -> Flops:
    return max((_of_jaxpr(branch.jaxpr) for branch in equation.params["branches"]), key=lambda found: found.all)


def _on_devices(equation: Any) -> Flops:
    """Count what every device of a mesh computes for itself."""
    mesh, manual = equation.params["mesh"], equation.params.get("manual_axes", equation.params["mesh"].axis_names)
    return _of_jaxpr(_jaxprs(equation.params["jaxpr"])[0]).times(math.prod(mesh.shape[axis] for axis in manual))


def _kernel(equation: Any) -> Flops:
    """Count a kernel written in Pallas: its program runs at every place of a grid, which XLA does not look into."""
    grid = [size for size in equation.params["grid_mapping"].grid if isinstance(size, int)]
    return _of_jaxpr(equation.params["jaxpr"]).times(math.prod(grid), 0)


def _attention(equation: Any) -> Flops:
    """Count attention that a library computes: two products in the forward pass, five in the backward pass."""
    query, key = (each.aval.shape for each in equation.invars[:2])  # [batch, queries, heads, size], [batch, keys, heads, size]
    products = 5 if "bwd" in equation.primitive.name else 2
    return Flops(2.0 * products * math.prod(query) * key[1], 0.0)


def _none(equation: Any) -> Flops:
    del equation
    return NONE


_SPECIAL: dict[str, Callable[[Any], Flops]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "integer_pow": _power,
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
    "sort": _sort,
    "scan": _scan,
    "while": _while,
    "cond": _branches,
    "shard_map": _on_devices,
    "pallas_call": _kernel,
    # Their parameters hold functions that are not run.
    "scatter": _none,
}


def _jaxprs(value: Any) -> list[Any]:
    """Return the programs among the parameters of an equation."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values if isinstance(v, (ClosedJaxpr, Jaxpr))]


def _plain(number: float | int) -> Flops:
    return Flops(float(number), float(number))


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))
