"""A kernel and the leaves beside it as matrices.

A kernel may have several input axes, several output axes, and axes that stack kernels of many layers or experts, in any order. Seen as a
matrix it is ``[inputs, outputs]``, once for each kernel in the stack. A leaf beside it is described by the axes that it has as a matrix:
``("inputs", "rank")`` for LoRA's ``a``, ``("outputs",)`` for one number an output. In the adapter the leaf keeps the kernel's own axes in
their order, so that `nn.scan` slices it like the kernel and a mesh shards it like the kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from jpeft.tree.kernels import KernelAxes

if TYPE_CHECKING:  # what goes in comes out: a checker must not take every result for either of them
    Array = Any
else:
    Array = jax.Array | np.ndarray
INPUTS, OUTPUTS = "inputs", "outputs"
LeafAxes = tuple[str, ...]  # of a leaf as a matrix: INPUTS, OUTPUTS or any other name for each axis


class MatrixForm(NamedTuple):
    """One kernel's way into matrix form and back.

    Attributes:
      shape: Shape of the kernel.
      axes: Which axes of the kernel are which.

    >>> form = MatrixForm((32, 4, 8), KernelAxes((), (0,), (1, 2)))    # a query kernel: 32 inputs, 4 heads of 8
    >>> form.sizes, form.leaf_shape(("rank", "outputs"), {"rank": 2})
    ((32, 32), (2, 4, 8))
    """

    shape: tuple[int, ...]
    axes: KernelAxes

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of inputs and of outputs."""
        return self.axes.fan_in(self.shape), self.axes.fan_out(self.shape)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return tuple(self.shape[i] for i in self.axes.stack)

    # --- the kernel -----------------------------------------------------------------------------------------------------------------

    def to_matrix(self, kernel: Shaped[Array, "..."]) -> Shaped[Array, "*stack inputs outputs"]:
        """The kernel as matrices."""
        # For the usual order of axes the transposition is the identity and the reshape moves no data.
        order = self.axes.stack + self.axes.inputs + self.axes.outputs
        return kernel.transpose(order).reshape(*self.stack, *self.sizes)

    def from_matrix(self, matrix: Shaped[Array, "*stack inputs outputs"]) -> Shaped[Array, "..."]:
        """The inverse of `to_matrix`."""
        order = self.axes.stack + self.axes.inputs + self.axes.outputs
        inverse = tuple(order.index(i) for i in range(len(order)))  # axis i of the kernel is axis inverse[i] of the split matrix
        return matrix.reshape([self.shape[i] for i in order]).transpose(inverse)

    # --- the leaves beside it ---------------------------------------------------------------------------------------------------------

    def leaf_shape(self, leaf_axes: LeafAxes, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape of a leaf in the adapter; `sizes` has those of its axes other than inputs and outputs."""
        return tuple(self.shape[axis] if isinstance(axis, int) else sizes[axis] for axis in self.stored_axes(leaf_axes))

    def leaf_to_matrix(self, leaf: Shaped[Array, "..."], leaf_axes: LeafAxes) -> Shaped[Array, "..."]:
        """A leaf of the adapter as [*stack, *leaf_axes]."""
        stored = self.stored_axes(leaf_axes)
        # The stack axes, then the kernel's axes of each matrix axis: (0, 1, "rank") for the `a` of a kernel [heads, head_dim, width].
        order = [*self.axes.stack, *(axis for name in leaf_axes for axis in self._axes_of(name))]
        leaf = leaf.transpose([stored.index(axis) for axis in order])
        return leaf.reshape(*self.stack, *self._matrix_sizes(leaf_axes, leaf.shape))

    def leaf_from_matrix(self, leaf: Shaped[Array, "..."], leaf_axes: LeafAxes) -> Shaped[Array, "..."]:
        """The inverse of `leaf_to_matrix`."""
        stored = self.stored_axes(leaf_axes)
        order = [*self.axes.stack, *(axis for name in leaf_axes for axis in self._axes_of(name))]
        names = dict(zip(leaf_axes, leaf.shape[len(self.stack) :], strict=True))
        split = leaf.reshape([self.shape[axis] if isinstance(axis, int) else names[axis] for axis in order])
        return split.transpose([order.index(axis) for axis in stored])

    def each(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, which takes one kernel's matrices, for all kernels in the stack at once."""
        return functools.reduce(lambda mapped, _: jax.vmap(mapped), self.stack, fn)

    def keys(self, key: jax.Array) -> jax.Array:
        """A random key for each kernel in the stack, to be given to a function that `each` made."""
        return jax.random.split(key, math.prod(self.stack)).reshape(self.stack) if self.stack else key

    # --- where the axes are -----------------------------------------------------------------------------------------------------------

    def _axes_of(self, name: str) -> tuple[Any, ...]:
        """The kernel's axes that a matrix axis stands for; the name itself for an axis that the kernel does not have."""
        return {INPUTS: self.axes.inputs, OUTPUTS: self.axes.outputs}.get(name, (name,))

    def stored_axes(self, leaf_axes: LeafAxes) -> list[Any]:
        """The axes of a leaf in the adapter, in order: numbers of kernel axes, and names of axes that the kernel does not have.

        The kernel's axes keep their order. Where the leaf has no inputs (or no outputs), its own axes stand in their place. The axes of
        the stack have the places that they have in the kernel, or the last one, so `nn.scan` slices the leaf as it slices the kernel.
        """
        stored = self._in_order_of_kernel(leaf_axes)
        placed = [axis for axis in stored if axis not in self.axes.stack]
        for axis in sorted(axis for axis in stored if axis in self.axes.stack):
            placed.insert(len(placed) if axis == len(self.shape) - 1 else axis, axis)
        return placed

    def _in_order_of_kernel(self, leaf_axes: LeafAxes) -> list[Any]:
        extra = [name for name in leaf_axes if name not in (INPUTS, OUTPUTS)]
        absent = {self.axes.inputs if name == INPUTS else self.axes.outputs for name in (INPUTS, OUTPUTS) if name not in leaf_axes}
        if len(absent) != 1:  # a leaf of the kernel's own shape, or one without any of its inputs and outputs
            kept = [i for i in range(len(self.shape)) if not any(i in axes for axes in absent)]
            return [*kept, *extra]
        (gone,) = absent
        stored: list[Any] = []
        for i in range(len(self.shape)):
            # The leaf's own axes take the place of the first absent axis; the other absent axes vanish.
            stored += extra if i == gone[0] else [] if i in gone else [i]
        return stored

    def _matrix_sizes(self, leaf_axes: LeafAxes, shape: tuple[int, ...]) -> list[int]:
        """Sizes of the matrix axes of a leaf whose axes are in the order of `leaf_axes`, split into the kernel's axes."""
        sizes, at = [], len(self.stack)
        for name in leaf_axes:
            count = len(self._axes_of(name))
            sizes.append(math.prod(shape[at : at + count]))
            at += count
        return sizes
