"""A parameter on its way through a jaxpr: which axes of a value are which axes of the parameter.

Layers seldom use a kernel as it stands. They cast it, transpose it, reshape head axes away, take one row of it, multiply it by a constant.
As long as each number of a value is a number of the parameter, times a factor, the value is a `View` of the parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.tree.paths import Path


class Atom(NamedTuple):
    """A part of one axis of a parameter: an axis of 12 that is reshaped to 3 x 4 has two."""

    axis: int
    stride: int  # how far two neighbours lie apart on the axis
    size: int


Parts = tuple[tuple[Atom, ...], ...]  # the atoms of each axis of a value, the slowest first


class Factor(NamedTuple):
    """An array that a view is multiplied by.

    Attributes:
      value: The array, without the axes along which it does not vary; None while only shapes are known.
      parts: The atoms of its axes.
      divides: Whether the view is divided by it.
    """

    value: Any
    parts: Parts
    divides: bool


@dataclasses.dataclass(frozen=True)
class View:
    """A value that holds a parameter's numbers.

    Attributes:
      path: Of the parameter.
      shape: Of the parameter.
      parts: The atoms of each axis of the value.
      slices: Start and limit on the axes of the parameter of which the value has a part.
      stack: Axes of the parameter over which a loop goes: the value is one slice.
      steps: What was done to the parameter, as functions of the value so far.
      factors: What it was multiplied by.
      bits: Of the narrowest type on the way.
    """

    path: Path
    shape: tuple[int, ...]
    parts: Parts
    slices: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    stack: frozenset[int] = frozenset()
    steps: tuple[Callable[[jax.Array], jax.Array], ...] = ()
    factors: tuple[Factor, ...] = ()
    bits: int = 64

    @classmethod
    def whole(cls, path: Path, shape: Sequence[int], bits: int) -> "View":
        """The parameter itself."""
        return cls(path, tuple(shape), tuple((Atom(i, 1, size),) for i, size in enumerate(shape)), bits=bits)

    def __call__(self, parameter: jax.Array) -> jax.Array:
        """The value, made from the parameter."""
        for step in self.steps:
            parameter = step(parameter)
        return parameter

    def atoms(self) -> list[Atom]:
        """All atoms of the value."""
        return [atom for part in self.parts for atom in part]

    def sliced(self) -> "View":
        """One entry of the value's first axis, as a loop over it sees it."""
        return dataclasses.replace(self, parts=self.parts[1:], stack=self.stack | {atom.axis for atom in self.parts[0]})


def through(eqn: Any, position: int, view: View, spread: Mapping[Any, tuple[int, ...]], read: Callable[[Any], Any] | None) -> View | None:
    """The view after one operation on it, or None where the result is no view.

    Args:
      eqn: The equation.
      position: Which of its inputs the view is.
      view: The view.
      spread: For results of `broadcast_in_dim`, the axes along which they vary.
      read: Returns the value of a variable; None while only shapes are known.
    """
    primitive, params = eqn.primitive.name, eqn.params
    step = lambda value: eqn.primitive.bind(value, **params)
    moved: Parts | None = None
    changes: dict[str, Any] = {}
    if primitive in ("convert_element_type", "reduce_precision"):
        if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return None
        moved, changes = view.parts, {"bits": min(view.bits, _bits(eqn))}
    elif primitive in ("copy", "copy_p", "neg", "sharding_constraint", "name", "optimization_barrier", "stop_gradient"):
        moved = view.parts if len(eqn.invars) == 1 else None
    elif primitive == "transpose":
        moved = tuple(view.parts[i] for i in params["permutation"])
    elif primitive == "squeeze":
        gone = {i % len(view.parts) for i in params["dimensions"]}
        moved = tuple(part for i, part in enumerate(view.parts) if i not in gone)
    elif primitive == "reshape" and params["dimensions"] is None:
        moved = _reshaped(view.parts, params["new_sizes"])
    elif primitive == "broadcast_in_dim":
        places = dict(zip(params["broadcast_dimensions"], view.parts, strict=True))
        if math.prod(params["shape"]) == math.prod(eqn.invars[position].aval.shape):
            moved = tuple(places.get(i, ()) for i in range(len(params["shape"])))
    elif primitive == "slice" and params["strides"] is None:
        return _part_of(view, params["start_indices"], params["limit_indices"], step)
    elif primitive == "mul" or (primitive == "div" and position == 0):
        return _multiplied(eqn, position, view, spread, read)
    return None if moved is None else dataclasses.replace(view, parts=moved, steps=(*view.steps, step), **changes)


def _bits(eqn: Any) -> int:
    """Of the type that a cast rounds to."""
    if eqn.primitive.name == "reduce_precision":
        return eqn.params["exponent_bits"] + eqn.params["mantissa_bits"] + 1
    return jnp.finfo(eqn.outvars[0].aval.dtype).bits


def _reshaped(parts: Parts, sizes: Sequence[int]) -> Parts | None:
    """The atoms of each axis after a reshape; None if an axis would hold a part of an atom that does not divide it."""
    waiting = [atom for part in parts for atom in part if atom.size > 1]
    out: list[tuple[Atom, ...]] = []
    for size in sizes:
        mine: list[Atom] = []
        while size > 1:
            if not waiting:
                return None
            atom = waiting.pop(0)
            if atom.size <= size:
                if size % atom.size:
                    return None
                size //= atom.size
            else:
                if atom.size % size:
                    return None
                inner = atom.size // size
                waiting.insert(0, Atom(atom.axis, atom.stride, inner))
                atom, size = Atom(atom.axis, atom.stride * inner, size), 1
            mine.append(atom)
        out.append(tuple(mine))
    return tuple(out)


def _part_of(view: View, starts: Sequence[int], limits: Sequence[int], step: Callable[[jax.Array], jax.Array]) -> View | None:
    """A slice of a view, if it is a slice of whole axes of the parameter."""
    parts, slices = list(view.parts), dict(view.slices)
    for i, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        size = math.prod(atom.size for atom in view.parts[i])
        if (start, limit) == (0, size):
            continue
        # Part of a part could be said as well, if a layer did it.
        if len(view.parts[i]) != 1 or view.parts[i][0] != Atom(view.parts[i][0].axis, 1, view.shape[view.parts[i][0].axis]):
            return None
        axis = view.parts[i][0].axis
        slices[axis] = (start, limit)
        parts[i] = (Atom(axis, 1, limit - start),)
    return dataclasses.replace(view, parts=tuple(parts), slices=slices, steps=(*view.steps, step))


def _multiplied(
    eqn: Any, position: int, view: View, spread: Mapping[Any, tuple[int, ...]], read: Callable[[Any], Any] | None
) -> View | None:
    """A view times an array of its shape, or divided by one."""
    other, divides = eqn.invars[1 - position], eqn.primitive.name == "div"
    ndim = len(view.parts)
    if not jnp.issubdtype(other.aval.dtype, jnp.floating) or eqn.outvars[0].aval.shape != eqn.invars[position].aval.shape:
        return None
    along = () if hasattr(other, "val") or not other.aval.shape else spread.get(other, tuple(range(ndim)))
    value = None if read is None else read(other)
    varying = None if value is None else value[tuple(slice(None) if i in along else 0 for i in range(jnp.ndim(value)))]
    factor = Factor(varying, tuple(view.parts[i] for i in along), divides)

    def step(x: jax.Array) -> jax.Array:
        return eqn.primitive.bind(*((x, value) if position == 0 else (value, x)), **eqn.params)

    return dataclasses.replace(view, factors=(*view.factors, factor), steps=(*view.steps, step))
