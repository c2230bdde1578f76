"""A product as a `Linear`: what methods can do with it.

Every axis of an array gets letters, one for each `Atom` of the kernel and one for each axis that the kernel does not have, as in an einsum.
A low-rank branch is then two einsums, whichever way the product goes: with ``a`` first where it contracts the kernel's inputs, with ``b``
first where it contracts the outputs, as the scores of tied embeddings do.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jpeft.core.layer import Layer, Linear
from jpeft.hosts import vectors
from jpeft.hosts.products.find import Use, all_atoms, axis_roles, looked_up_axis
from jpeft.hosts.products.view import Atom, View
from jpeft.tree.kernels import KernelAxes

Letter = Hashable  # an Atom, or what stands for an axis that the kernel does not have
RANK = "rank"


class NotLinear(ValueError):
    """A use of a parameter that cannot be changed by itself."""


def layer_of(use: Use, kernel: jax.Array, axes: KernelAxes) -> Layer:
    """The layer that consists of one product.

    Args:
      use: The product.
      kernel: The parameter, as it stands in the parameters.
      axes: Its geometry in the adapter, which may be another than this product's: a table may be used in both directions.

    Raises:
      NotLinear: if the product has no low-rank form.
    """
    name = use.view.path
    operands = use.eqn.primitive.bind
    place = use.position

    def run(params: Any, x: jax.Array) -> jax.Array:
        value = use.view(params[name])
        return operands(*((value, x) if place == 0 else (x, value)), **use.eqn.params)

    linear = linear_of(use, axes)
    dtype = use.eqn.outvars[0].aval.dtype
    return Layer(run=run, params={name: kernel}, path="", linear=linear, dtype=dtype)


def linear_of(use: Use, axes: KernelAxes) -> Linear:
    """What is linear about a product."""
    roles = axis_roles(use)
    assert roles is not None
    kind, inputs, _ = roles
    view = use.view
    contracted = {atom.axis for i in inputs for atom in view.parts[i]}
    forward = contracted <= set(axes.inputs)  # and not from the kernel's outputs to its inputs
    # A kernel that is rounded and then widened again moves in steps: only a layer on its new kernel does what the merged one will do.
    rounds = view.bits < jnp.finfo(use.eqn.invars[use.position].aval.dtype).bits
    closed = not any(isinstance(factor.value, Tracer) for factor in view.factors)
    scale_outputs = scale_inputs = add = map_inputs = apply_vectors = None
    if kind == "convolution":
        apply_low_rank, y_axes = _convolution(use, axes)
    elif kind == "lookup":
        apply_low_rank, y_axes = _lookup(use, axes)
    else:
        apply_low_rank, x_axes, y_axes = _dot(use, axes)
        scale_inputs = _times(use, (*axes.stack, *axes.inputs), x_axes) if forward and not rounds else None
        sides = _sides(use, axes, x_axes, y_axes) if forward and not rounds else None
        if sides is not None:
            map_inputs = _reshaping_x(vectors.map_inputs(lambda ndim: sides), x_axes)
            apply_vectors = _reshaping_x(vectors.apply_vectors(lambda ndim: sides), x_axes, use)
    if forward and not rounds:
        outputs = (*axes.stack, *axes.outputs)
        scale_outputs, add = _times(use, outputs, y_axes), _plus(use, outputs, y_axes)
    return Linear(
        view.path,
        axes,
        apply_low_rank,
        scale_outputs=scale_outputs,
        scale_inputs=scale_inputs,
        add_bias=add,
        map_inputs=map_inputs,
        apply_vectors=apply_vectors,
        reads_once=kind == "dot" and forward,
        views=("merged",) if rounds and closed else ("factored", "merged") if closed else ("factored",),
    )


# --- the low-rank branch ---------------------------------------------------------------------------------------------------------------

Branch = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Axes = list[list[Letter]]  # the letters of each axis of an array


def _dot(use: Use, axes: KernelAxes) -> tuple[Branch, Axes, Axes]:
    """The branch of a `dot_general`, and the letters of its other operand and of its result."""
    view, params, side = use.view, use.eqn.params, use.position
    contracted, batch = params["dimension_numbers"]
    other = use.eqn.invars[1 - side].aval
    x_axes: Axes = [[("x", i)] for i in range(other.ndim)]
    for mine, others in ((contracted[side], contracted[1 - side]), (batch[side], batch[1 - side])):
        for i, j in zip(mine, others, strict=True):
            x_axes[j] = list(view.parts[i])
    gone = {*contracted[side], *batch[side]}
    kernel_free: Axes = [list(part) for i, part in enumerate(view.parts) if i not in gone]
    x_free: Axes = [part for j, part in enumerate(x_axes) if j not in {*contracted[1 - side], *batch[1 - side]}]
    y_axes = [list(view.parts[i]) for i in batch[side]] + (kernel_free + x_free if side == 0 else x_free + kernel_free)
    precision, shape = params["precision"], use.eqn.outvars[0].aval.shape

    def apply_low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        first, second = _ordered(use, axes, a, b, {atom for i in contracted[side] for atom in view.parts[i]})
        letters = [letter for part in x_axes for letter in part]
        x = x.reshape(_sizes(x_axes, x.shape))
        return _two_steps((x, letters), first, second, [letter for part in y_axes for letter in part], precision).reshape(shape)

    return apply_low_rank, x_axes, y_axes


def _lookup(use: Use, axes: KernelAxes) -> tuple[Branch, Axes]:
    """The branch of a lookup: rows of one factor, times the other factor. An index beyond the table has no row to update."""
    view, eqn = use.view, use.eqn
    place = looked_up_axis(eqn, view)
    assert place is not None
    (table,) = view.parts[place]
    offsets = eqn.params["dimension_numbers"].offset_dims
    others: Axes = [list(part) for i, part in enumerate(view.parts) if i != place]
    rest = iter(others)
    y_axes: Axes = [next(rest) if i in offsets else _own(i) for i in range(eqn.outvars[0].aval.ndim)]
    ids = [letter for part in y_axes for letter in part if not isinstance(letter, Atom)]
    clips = "CLIP" in str(eqn.params["mode"])
    shape = eqn.outvars[0].aval.shape

    def apply_low_rank(indices: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        (rows, letters), second = _ordered(use, axes, a, b, {table})
        if table not in letters:
            raise NotLinear("its rows have no low-rank form")
        taken = jnp.take(rows, indices[..., 0], axis=letters.index(table), mode="clip" if clips else "fill", fill_value=0)
        i = letters.index(table)
        done = [*letters[:i], *ids, *letters[i + 1 :]]
        flat = [letter for part in y_axes for letter in part]
        return _einsum((taken, done), second, flat, None).reshape(shape)

    return apply_low_rank, y_axes


def _own(axis: int) -> list[Letter]:
    """The letters of an axis that the kernel does not have."""
    return [("y", axis)]


def _convolution(use: Use, axes: KernelAxes) -> tuple[Branch, Axes]:
    """The branch of a convolution: one with r outputs for each of its groups, whose result is a product away from the outputs."""
    view, params = use.view, use.eqn.params
    spec = params["dimension_numbers"]
    whole = all(len(part) == 1 and part[0] == Atom(part[0].axis, 1, view.shape[part[0].axis]) for part in view.parts)
    order = [part[0].axis for part in view.parts] if whole else []
    if not whole or view.factors or set(axes.inputs) != {order[i] for i in spec.rhs_spec[1:]}:
        raise NotLinear("it is a convolution whose kernel is made of parts of the parameter")
    (out,), groups = axes.outputs, params["feature_group_count"]
    y_axes: Axes = [[("y", i)] for i in range(use.eqn.outvars[0].aval.ndim)]
    channel = spec.out_spec[1]
    y_axes[channel] = [view.parts[spec.rhs_spec[0]][0]]

    def apply_low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        left, _ = axes.factors(range(len(view.shape)), RANK)
        kernel = a.transpose([left.index(RANK if axis == out else axis) for axis in order])
        kernel = jnp.concatenate([kernel] * groups, axis=spec.rhs_spec[0])
        hidden = jnp.moveaxis(use.eqn.primitive.bind(x, kernel.astype(x.dtype), **params), channel, -1)
        hidden = hidden.reshape(*hidden.shape[:-1], groups, -1)  # [..., groups, r]
        up = b.astype(hidden.dtype).reshape(b.shape[0], groups, -1)  # [r, groups, outputs of a group]
        y = jnp.einsum("...gr,rgo->...go", hidden, up)
        return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, channel)

    return apply_low_rank, y_axes


Lettered = tuple[jax.Array, list[Letter]]


def _ordered(use: Use, axes: KernelAxes, a: jax.Array, b: jax.Array, contracted: set[Atom]) -> tuple[Lettered, Lettered]:
    """The two factors with letters, the one that meets the activations first."""
    left, right = axes.factors(range(len(use.view.shape)), RANK)
    factors = [lettered(use.view, value, of) for value, of in ((a, left), (b, right))]
    for factor in use.view.factors:
        atoms = [atom for part in factor.parts for atom in part]
        fits = next((i for i in (1, 0) if set(atoms) <= set(factors[i][1])), None)
        if fits is None:
            raise NotLinear("it is multiplied by an array that varies along its inputs and along its outputs")
        value, letters = factors[fits]
        scaled = spread(jnp.asarray(factor.value).reshape([atom.size for atom in atoms]), atoms, [[letter] for letter in letters])
        factors[fits] = (value / scaled if factor.divides else value * scaled, letters)
    meets = [len(contracted & set(letters)) for _, letters in factors]
    return (factors[0], factors[1]) if meets[0] >= meets[1] else (factors[1], factors[0])


def lettered(view: View, leaf: jax.Array, axes: Sequence[Any]) -> Lettered:
    """A leaf as the product sees it: only the part that the product uses, with an axis for each atom.

    Args:
      view: Of the kernel.
      leaf: An array with axes of the kernel, and perhaps others.
      axes: For each of its axes that of the kernel, or a name.
    """
    letters: list[Letter] = []
    index: list[Any] = []
    shape: list[int] = []
    for i, axis in enumerate(axes):
        if not isinstance(axis, int):
            letters.append(axis)
            index.append(slice(None))
            shape.append(leaf.shape[i])
            continue
        start, limit = view.slices.get(axis, (0, view.shape[axis]))
        atoms = all_atoms(view, axis)
        index.append(slice(start, limit) if atoms else start)  # an axis of which one entry is taken is gone
        letters += atoms
        shape += [atom.size for atom in atoms]
    return leaf[tuple(index)].reshape(shape), letters


def _two_steps(x: Lettered, first: Lettered, second: Lettered, out: list[Letter], precision: Any) -> jax.Array:
    needed = {*second[1], *out}
    hidden = [letter for letter in dict.fromkeys([*x[1], *first[1]]) if letter in needed]
    return _einsum((_einsum(x, first, hidden, precision), hidden), second, out, precision)


def _einsum(x: Lettered, y: Lettered, out: list[Letter], precision: Any) -> jax.Array:
    numbers = {letter: i for i, letter in enumerate(dict.fromkeys([*x[1], *y[1]]))}
    dtype = jnp.result_type(x[0], y[0])
    operands = [part for value, letters in (x, y) for part in (value.astype(dtype), [numbers[letter] for letter in letters])]
    return jnp.einsum(*operands, [numbers[letter] for letter in out], precision=precision)


# --- vectors ---------------------------------------------------------------------------------------------------------------------------


def _sides(use: Use, axes: KernelAxes, x_axes: Axes, y_axes: Axes) -> vectors.Sides | None:
    """The letters of a product that uses all of the kernel as it is; None for any other."""
    view = use.view
    if view.slices or view.factors or any(len(all_atoms(view, axis)) != 1 for axis in axes.stack):
        return None
    stack, inputs, outputs = ([atom for axis in part for atom in all_atoms(view, axis)] for part in axes)
    x, y = ([letter for part in side for letter in part] for side in (x_axes, y_axes))
    known = {*stack, *inputs} <= set(x) and {*stack, *outputs} <= set(y)
    return vectors.Sides(x, stack, inputs, outputs, y, tuple(atom.size for atom in outputs)) if known else None


def _reshaping_x(run: vectors.MapInputs, x_axes: Axes, use: Use | None = None) -> vectors.MapInputs:
    """A function on x with an axis for each letter as one on x itself; with the axes of the use's result where a use is given."""

    def reshaping(x: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        shape = x.shape if use is None else use.eqn.outvars[0].aval.shape
        return run(x.reshape(_sizes(x_axes, x.shape)), fn).reshape(shape)

    return reshaping


# --- scaling ---------------------------------------------------------------------------------------------------------------------------


def _times(use: Use, kernel_axes: Sequence[int], axes: Axes) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(value, g) -> value g`` for g with axes of the kernel, in their order."""

    def times(value: jax.Array, g: jax.Array) -> jax.Array:
        return (value * spread(*lettered(use.view, g, sorted(kernel_axes)), axes)).astype(value.dtype)

    return times


def _plus(use: Use, kernel_axes: Sequence[int], axes: Axes) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def plus(value: jax.Array, bias: jax.Array) -> jax.Array:
        return value + spread(*lettered(use.view, bias, sorted(kernel_axes)), axes).astype(value.dtype)

    return plus


def spread(value: jax.Array, letters: Sequence[Letter], axes: Axes) -> jax.Array:
    """A value with letters, in a form that broadcasts against an array whose axes have letters.

    >>> spread(jnp.arange(3), ["h"], [["b"], ["h"]]).shape
    (1, 3)
    """
    order = [letter for part in axes for letter in part if letter in letters]
    value = value.transpose([letters.index(letter) for letter in order])
    sizes = dict(zip(order, value.shape, strict=True))
    partly = any(0 < sum(letter in sizes for letter in part) < len(part) for part in axes)
    if partly:  # an axis of the array is made of several, of which the value has some
        full = [[sizes.get(letter, letter.size if isinstance(letter, Atom) else 1) for letter in part] for part in axes]
        value = value.reshape([sizes.get(letter, 1) for part in axes for letter in part])
        value = jnp.broadcast_to(value, [size for part in full for size in part])
        return value.reshape([math.prod(part) for part in full])
    return value.reshape([math.prod(sizes.get(letter, 1) for letter in part) for part in axes])


def _sizes(axes: Axes, shape: Sequence[int]) -> list[int]:
    """The sizes of the letters of an array."""
    return [letter.size if isinstance(letter, Atom) else size for part, size in zip(axes, shape, strict=True) for letter in part]
