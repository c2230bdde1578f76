"""The geometry of kernels: which axes are inputs, which are outputs, and which stack several kernels."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jpeft.layouts.geometry import KERNEL_AXES
from jpeft.layouts.stacks import STACKED as STACKED
from jpeft.tree.paths import Path

T = TypeVar("T")


class KernelAxes(NamedTuple):
    """Which axes of a kernel are which: the geometry that a low-rank factorisation needs.

    ``stack`` are batch axes (layers of an `nn.scan`, experts), ``inputs`` are contracted with the layer's input, ``outputs`` are produced.

    >>> KernelAxes((), (0,), (1, 2)).factor_shapes((768, 12, 64), rank=8)      # DenseGeneral query
    ((768, 8), (8, 12, 64))
    >>> KernelAxes((0,), (1,), (2,)).factor_shapes((24, 768, 3072), rank=8)    # 24 scanned layers
    ((24, 768, 8), (24, 8, 3072))
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``a`` (outputs collapsed to the rank) and ``b`` (inputs collapsed to the rank); the stack axes keep their places."""
        return self.factors(shape, rank)

    def factors(self, kernel: Sequence[T], rank: T) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """Anything that the kernel has one of for each axis (size, letter, place), as ``a`` and ``b`` have it.

        >>> KernelAxes((), (0,), (1, 2)).factors("dnh", "r")
        (('d', 'r'), ('r', 'n', 'h'))
        """
        return tuple(_collapsed(kernel, self.outputs, rank)), tuple(_collapsed(kernel, self.inputs, rank))

    def without_stack(self, count: int) -> "KernelAxes | None":
        """The geometry without its first `count` stack axes; None if it has fewer, or for a negative count.

        >>> KernelAxes((0,), (1,), (2,)).without_stack(1)
        KernelAxes(stack=(), inputs=(0,), outputs=(1,))
        """
        if not 0 <= count <= len(self.stack):
            return None
        gone = sorted(self.stack)[:count]
        moved = lambda axes: tuple(i - sum(g < i for g in gone) for i in axes if i not in gone)
        return KernelAxes(*map(moved, self))

    def fan_in(self, shape: tuple[int, ...]) -> int:
        """Number of inputs that are summed into one output."""
        return math.prod(shape[i] for i in self.inputs)

    def fan_out(self, shape: tuple[int, ...]) -> int:
        """Number of outputs."""
        return math.prod(shape[i] for i in self.outputs)

    def letters(self, kernel: str, rank: str) -> tuple[str, str]:
        """The subscripts of ``a`` and ``b``, given those of the kernel and of the rank axis.

        >>> KernelAxes((), (0,), (1, 2)).letters("dnh", "r")
        ('dr', 'rnh')
        """
        a, b = self.factors(kernel, rank)
        return "".join(a), "".join(b)

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """``a b`` in the shape of the kernel, summed over the rank axis."""
        kernel = "abcdefghijklm"[: len(self.stack) + len(self.inputs) + len(self.outputs)]
        left, right = self.letters(kernel, "r")
        return jnp.einsum(f"{left},{right}->{kernel}", a, b)


def _collapsed(values: Sequence[T], axes: tuple[int, ...], by: T) -> list[T]:
    """`values` with those of `axes` removed and `by` in the place of the first."""
    return [by if i == axes[0] else v for i, v in enumerate(values) if i == axes[0] or i not in axes]


def _axes(letters: str) -> KernelAxes:
    """The geometry of a kernel without a stack from one letter for each axis, i for inputs and o for outputs."""
    inputs, outputs = (tuple(i for i, letter in enumerate(letters) if letter == kind) for kind in "io")
    return KernelAxes((), inputs, outputs)


# (regex on the path, number of axes, geometry) of the known layouts.
DEFAULT_AXES = tuple((pattern, len(letters), _axes(letters)) for pattern, letters in KERNEL_AXES)

AxesRules = tuple[tuple[str, KernelAxes], ...]


def axes_rules(axes: Any) -> AxesRules:
    """The option ``axes`` of a method as rules: pairs of a regex and `KernelAxes`, which a configuration file holds as plain lists."""
    return tuple((pattern, KernelAxes(*map(tuple, geometry))) for pattern, geometry in axes or ())


def axes_of(path: Path, shape: tuple[int, ...], rules: AxesRules = ()) -> KernelAxes:
    """The geometry of one kernel: from the caller's rules, else from the known layouts; never guessed from the number of axes.

    Names alone can mislead (two models may both call a kernel ``query``), so every host compares the answer with the real layer at the
    first call and refuses a wrong one.

    Raises:
      ValueError: if no rule covers the kernel.
    """
    for pattern, axes in rules:
        if re.fullmatch(pattern, path):
            if sorted(axes.stack + axes.inputs + axes.outputs) != list(range(len(shape))):
                raise ValueError(f"axes rule '{pattern}': {axes} does not name each of the {len(shape)} axes of '{path}' {shape} once.")
            return axes
    stacked = re.fullmatch(STACKED, path) is not None and len(shape) > 2
    for pattern, ndim, axes in DEFAULT_AXES:
        if ndim + stacked == len(shape) and re.fullmatch(pattern, path):
            return KernelAxes((0,), *(tuple(i + 1 for i in part) for part in axes[1:])) if stacked else axes
    raise ValueError(
        f"The geometry of '{path}' with shape {shape} is not known: which axes are inputs and which outputs? "
        f"Say it with a rule, axes=(('{re.escape(path)}', jpeft.KernelAxes(stack=(), inputs=(0,), outputs=(1, 2))),), "
        "or let the model tell: axes=jpeft.kernel_axes(model, params, *example_inputs)."
    )


def axes_inside(path: Path, shape: tuple[int, ...], rules: AxesRules = ()) -> list[KernelAxes]:
    """What the geometry of a kernel may be inside its layer, where `nn.scan` may have sliced stack axes away.

    Rules and known layouts are about the kernel as it stands in the parameters. A kernel with fewer axes has lost its first stack axes.
    """
    named = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
    known = named[:1] or [axes for pattern, ndim, axes in DEFAULT_AXES if ndim <= len(shape) and re.fullmatch(pattern, path)]
    lost = [axes.without_stack(len(axes.stack) + len(axes.inputs) + len(axes.outputs) - len(shape)) for axes in known]
    return [axes for axes in lost if axes is not None]
