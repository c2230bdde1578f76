"""The geometry of kernels: which axes are inputs, which are outputs, and which stack several kernels."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jpeft.layouts.geometry import CONVOLUTION, KERNEL_AXES, NAMED_CONVOLUTION
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
        # `jnp.einsum` would say this in one line, and take longer to trace than all else that a layer with an update does.
        kernel = range(len(self.stack) + len(self.inputs) + len(self.outputs))
        left, right = self.factors(kernel, -1)  # the kernel's axes in a and b; -1 is the rank's
        stack = [tuple(side.index(axis) for axis in self.stack) for side in (left, right)]
        a, b = (x.astype(jnp.promote_types(a.dtype, b.dtype)) for x in (a, b))
        out = jax.lax.dot_general(a, b, (((left.index(-1),), (right.index(-1),)), (stack[0], stack[1])))
        order = [*self.stack, *(axis for side in (left, right) for axis in side if axis != -1 and axis not in self.stack)]
        return out if order == list(kernel) else out.transpose([order.index(axis) for axis in kernel])


def _collapsed(values: Sequence[T], axes: tuple[int, ...], by: T) -> list[T]:
    """`values` with those of `axes` removed and `by` in the place of the first."""
    return [by if i == axes[0] else v for i, v in enumerate(values) if i == axes[0] or i not in axes]


def _axes(letters: str) -> KernelAxes:
    """The geometry of a kernel without a stack from one letter for each axis, i for inputs and o for outputs."""
    inputs, outputs = (tuple(i for i, letter in enumerate(letters) if letter == kind) for kind in "io")
    return KernelAxes((), inputs, outputs)


# (regex on the path, number of axes, geometry) of the known layouts.
DEFAULT_AXES = tuple((pattern, len(letters), _axes(letters)) for pattern, letters in KERNEL_AXES)

# No convolution has a larger window.
_LARGEST_WINDOW = 32

AxesRules = tuple[tuple[str, KernelAxes], ...]


def axes_rules(axes: Any) -> AxesRules:
    """The option ``axes`` of a method as rules: pairs of a regex and `KernelAxes`, which a configuration file holds as plain lists."""
    return tuple((pattern, KernelAxes(*map(tuple, geometry))) for pattern, geometry in axes or ())


def axes_of(
    path: Path, shape: tuple[int, ...], rules: AxesRules = (), *, layers: Mapping[Path, int | None] = MappingProxyType({})
) -> KernelAxes:
    """The geometry of one kernel: from the caller's rules, else from the known layouts, else from the window of a convolution.

    Nothing is guessed from the number of axes alone. Names and windows can mislead (two models may both call a kernel ``query``), so every
    host compares the answer with the real layer at the first call and refuses a wrong one.

    Args:
      path: Of the kernel.
      shape: Its shape.
      rules: The caller's.
      layers: The axis of the layers of each leaf of a stack (`jpeft.layouts.layer_axes`), where the whole tree is known. Otherwise the
        name of the container tells whether layers are stacked, on the first axis.

    >>> axes_of("decoder/decoder/query/kernel", (16, 3, 2, 8), layers={"decoder/decoder/query/kernel": 1})
    KernelAxes(stack=(1,), inputs=(0,), outputs=(2, 3))

    Raises:
      ValueError: if no rule covers the kernel.
    """
    for pattern, axes in rules:
        if re.fullmatch(pattern, path):
            if sorted(axes.stack + axes.inputs + axes.outputs) != list(range(len(shape))):
                raise ValueError(f"axes rule '{pattern}': {axes} does not name each of the {len(shape)} axes of '{path}' {shape} once.")
            return axes
    known = path in layers
    at = layers[path] if known else 0 if re.fullmatch(STACKED, path) is not None and len(shape) > 2 else None
    inside = without_axis(shape, at)
    named = [(pattern, axes) for pattern, ndim, axes in DEFAULT_AXES if ndim == len(inside) and re.fullmatch(pattern, path)]
    # A module called `block` may be one block or a stack of them: a square window tells that a convolution in it is not stacked.
    kernel, stacked = (inside, False) if known else (shape, at is not None)
    if _has_window(path, kernel, stacked) and all(pattern in (CONVOLUTION, ".*") for pattern, _ in named):
        axes = KernelAxes((), tuple(range(len(kernel) - 1)), (len(kernel) - 1,))
        return axes if at is None or not known else _with_stack(axes, at % len(shape))
    if not named:
        raise _unknown(path, shape)
    return named[0][1] if at is None else _with_stack(named[0][1], at % len(shape))


def without_axis(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """A shape without one of its axes, or whole for None."""
    if axis is None:
        return shape
    at = axis % len(shape)
    return shape[:at] + shape[at + 1 :]


def _with_stack(axes: KernelAxes, at: int) -> KernelAxes:
    """The geometry of a kernel with an axis of layers put in at a place."""
    return KernelAxes((at,), *(tuple(i + (i >= at) for i in part) for part in axes[1:]))


def _unknown(path: Path, shape: tuple[int, ...]) -> ValueError:
    inputs = (0,) if len(shape) == 3 else tuple(range(len(shape) - 1))
    example = KernelAxes((), inputs, tuple(range(len(inputs), len(shape))))
    return ValueError(
        f"The geometry of '{path}' with shape {shape} is not known: which axes are inputs and which outputs? "
        f"Say it with a rule, such as axes=(('{re.escape(path)}', jpeft.{example}),), "
        "or let the model tell: axes=jpeft.kernel_axes(model, params, *example_inputs)."
    )


def window_of(path: Path, shape: tuple[int, ...], axes: KernelAxes) -> int:
    """How many places the window of a convolution's kernel has; 1 for any other kernel.

    >>> window_of("stem/kernel", (3, 3, 16, 32), KernelAxes((), (0, 1, 2), (3,))), window_of("query/kernel", (16, 32), _axes("io"))
    (9, 1)
    """
    inside = tuple(shape[i] for i in sorted(axes.inputs + axes.outputs))
    is_window = len(inside) > 2 and len(axes.outputs) == 1 and _has_window(path, inside, False)
    return math.prod(inside[:-2]) if is_window else 1


def _has_window(path: Path, shape: tuple[int, ...], stacked: bool) -> bool:
    """Whether a leaf has the shape of a convolution, [*window, channels, width], and is not a stack of kernels.

    In two or three dimensions a window is square, or a line of odd length. In a container that may be a stack, an even number may be that
    of the layers. With three axes only a name tells.

    >>> _has_window("stem/kernel", (3, 3, 16, 32), False), _has_window("qkv/kernel", (16, 3, 4, 4), False)
    (True, False)
    """
    if len(shape) == 3:
        return re.fullmatch(NAMED_CONVOLUTION, path) is not None
    if path.rpartition("/")[2] != "kernel" or len(shape) not in (4, 5) or (stacked and len(shape) == 5):
        return False
    sizes = set(shape[:-2])
    odd = all(size % 2 for size in sizes)
    return max(sizes) <= _LARGEST_WINDOW and (odd if stacked else len(sizes) == 1 or odd) and len(sizes - {1}) <= 1


def axes_inside(path: Path, shape: tuple[int, ...], rules: AxesRules = ()) -> list[KernelAxes]:
    """What the geometry of a kernel may be inside its layer, where `nn.scan` may have sliced stack axes away.

    Rules and known layouts are about the kernel as it stands in the parameters. A kernel with fewer axes has lost its first stack axes.
    """
    named = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
    known = named[:1] or [axes for pattern, ndim, axes in DEFAULT_AXES if ndim <= len(shape) and re.fullmatch(pattern, path)]
    lost = [axes.without_stack(len(axes.stack) + len(axes.inputs) + len(axes.outputs) - len(shape)) for axes in known]
    return [axes for axes in lost if axes is not None]
