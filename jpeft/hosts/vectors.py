"""The inputs and the outputs of a product as vectors, for methods that mix its inputs (a rotation) or have a way of their own through it.

The axes of x, of the kernel and of y have letters, as in an einsum. Letters may be any values that can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

Letters = Sequence[Hashable]
Vectors = Float[Array, "*stack rows inputs"]
MapInputs = Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]


class Sides(NamedTuple):
    """The letters of a product.

    Attributes:
      x: Of the layer's inputs.
      stack: Of the kernel's stack axes, which x and y have.
      inputs: Of the kernel's input axes, which x has.
      outputs: Of its output axes, which y has.
      y: Of the layer's outputs.
      sizes: Sizes of the letters in `outputs`; None where each stands for a whole axis of the kernel.
    """

    x: Letters
    stack: Letters
    inputs: Letters
    outputs: Letters
    y: Letters
    sizes: tuple[int, ...] | None = None


def dense(ndim: int) -> Sides:
    """``x [..., i] -> y [..., o]``."""
    rest = tuple(range(ndim - 1))
    return Sides((*rest, "i"), (), ("i",), ("o",), (*rest, "o"))


def contraction(stack: int, axis: Sequence[int], outputs: int) -> Callable[[int], Sides]:
    """``x`` contracted over some axes, for each entry of the first `stack` axes; the outputs are the last axes of y."""

    def sides(ndim: int) -> Sides:
        # The kernel has the contracted axes in the order of x.
        inputs = sorted(i % ndim for i in axis)
        out = tuple(("o", i) for i in range(outputs))
        y = [i for i in range(ndim) if i not in inputs]
        return Sides(tuple(range(ndim)), tuple(range(stack)), inputs, out, (*y, *out))

    return sides


def equation(x: str, stack: str, inputs: str, outputs: str, y: str) -> Callable[[int], Sides]:
    """The letters of an einsum; an ellipsis stands for as many axes as x has beyond its letters."""

    def sides(ndim: int) -> Sides:
        more = [("...", i) for i in range(ndim - len(x.replace("...", "")))]
        spelled = lambda operand: [c for part in _parts(operand) for c in (more if part == "..." else part)]
        return Sides(spelled(x), tuple(stack), tuple(inputs), tuple(outputs), spelled(y))

    return sides


def _parts(operand: str) -> list[str]:
    before, dots, after = operand.partition("...")
    return [before, dots, after] if dots else [before]


def map_inputs(sides: Callable[[int], Sides]) -> MapInputs:
    """``(x, fn) -> x``: the inputs changed by `fn`, which takes and returns vectors [*stack, rows, inputs]."""

    def run(x: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        own = sides(x.ndim)
        order, _, moved = _as_vectors(x, own)
        changed = fn(moved).reshape([x.shape[i] for i in order])
        return changed.transpose([order.index(i) for i in range(x.ndim)])

    return run


def apply_vectors(sides: Callable[[int], Sides]) -> MapInputs:
    """``(x, fn) -> y``: `fn` in the place of the product, from vectors [*stack, rows, inputs] to [*stack, rows, *outputs]."""

    def run(x: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        own = sides(x.ndim)
        summed = [i for i, c in enumerate(own.x) if c not in own.inputs and c not in own.y]
        if summed:  # the product sums these axes of x alone
            x = x.sum(axis=tuple(summed))
            own = own._replace(x=[c for i, c in enumerate(own.x) if i not in summed])
        _, rows, moved = _as_vectors(x, own)
        y = fn(moved)
        outputs = y.shape[len(own.stack) + 1 :] if own.sizes is None else own.sizes
        letters = [*own.stack, *(own.x[i] for i in rows), *own.outputs]
        y = y.reshape(*y.shape[: len(own.stack)], *(x.shape[i] for i in rows), *outputs)
        return y.transpose([letters.index(c) for c in own.y])

    return run


def _as_vectors(x: jax.Array, sides: Sides) -> tuple[list[int], list[int], Vectors]:
    """The order of x's axes as vectors, those of them that become rows, and the vectors."""
    place = {c: i for i, c in enumerate(sides.x)}
    stack, inputs = [place[c] for c in sides.stack], [place[c] for c in sides.inputs]
    rows = [i for i in range(x.ndim) if i not in stack and i not in inputs]
    order = [*stack, *rows, *inputs]
    # One axis of rows: with two, XLA for CPU transposes what the gradient of a product contracts, and computes it a second time for that.
    sizes = [*(x.shape[i] for i in stack), math.prod(x.shape[i] for i in rows), math.prod(x.shape[i] for i in inputs)]
    return order, rows, x.transpose(order).reshape(sizes)
