"""What is linear about layers of any framework: the parts that do not depend on the module which holds the kernel.

The letters of shapes in the comments: b batch, t positions, d width, n heads, h size of a head, e experts, r rank.
"""

# Annotations of the functions that are made for each call of a layer would be evaluated each time.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jpeft.core.layer import Linear
from jpeft.hosts import vectors
from jpeft.tree.kernels import KernelAxes

MATRIX = KernelAxes((), (0,), (1,))
Promote = Callable[..., Sequence[Any]]  # arrays in the dtype that a layer computes in, by the layer's own rule


def compute_dtype(declared: Any, own: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
    """The dtype that a layer computes in: the one it declares, or what its parameters and inputs promote to."""
    if declared is not None:
        return jnp.dtype(declared)
    arrays = [*jax.tree.leaves(own), *(a for a in args if hasattr(a, "dtype"))]
    floats = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.result_type(*floats) if floats else jnp.dtype(jnp.float32)


def lookup(promote: Promote) -> Linear:
    """Rows of a table [vocab, d]: the product of one-hot ids with the table."""

    def apply_low_rank(ids: Int[Array, "*rows"], a: Float[Array, "vocab r"], b: Float[Array, "r d"]) -> jax.Array:
        a, b = promote(a, b)
        # An id beyond the table is a virtual token of another method: it has no row to update.
        return jnp.take(a, ids, axis=0, mode="fill", fill_value=0) @ b

    # No `scale_inputs`: inputs are ids, whose one-hot form never exists.
    return Linear("embedding", MATRIX, apply_low_rank, scale_outputs=scale((-1,)), add_bias=add((-1,)))


def attend(promote: Promote) -> Linear:
    """Scores of all rows: ``query [..., d] @ table.T``, as the output layer of a model with tied embeddings."""

    def apply_low_rank(query: Float[Array, "*rows d"], a: Float[Array, "vocab r"], b: Float[Array, "r d"]) -> Float[Array, "*rows vocab"]:
        query, a, b = promote(query, a, b)
        return (query @ b.T) @ a.T

    # The table's inputs are this call's outputs, and the reverse, so none of the functions that go by inputs and outputs apply.
    return Linear("embedding", MATRIX, apply_low_rank)


def einsum(equation: str | None, promote: Promote, contract: Callable[..., jax.Array]) -> Linear | None:
    """A contraction by equation. Its low-rank branch is the equation split in two through a rank axis.

    ``btd,dnh->btnh`` (queries) becomes ``btd,dr->btr`` and ``btr,rnh->btnh``: from x [b, t, d] through [b, t, r] to [b, t, n, h].
    ``btnh,nhd->btd`` (the attention's output) becomes ``btnh,nhr->btr`` and ``btr,rd->btd``.
    ``bted,edf->btef`` (experts) becomes ``bted,edr->bter`` and ``bter,erf->btef``: e stays, because each expert has its own kernel.

    Args:
      equation: The equation; None is given back for one that is no product of an input with a kernel.
      promote: As for all layers.
      contract: ``(equation, x, kernel) -> y`` with the layer's own precision.
    """
    equation = (equation or "").replace(" ", "")
    if equation.count(",") != 1 or "->" not in equation:
        return None
    operands, result = equation.split("->")
    x, kernel = operands.split(",")
    place = {letter: i for i, letter in enumerate(kernel)}
    stack = tuple(place[c] for c in kernel if c in x and c in result)
    outputs = tuple(place[c] for c in kernel if c in result and c not in x)
    inputs = tuple(place[c] for c in kernel if c not in result)
    # A letter that repeats within an operand takes a diagonal; what is linear about it would need its own rules.
    repeats = any(len(set(part.replace("...", ""))) != len(part.replace("...", "")) for part in (x, kernel, result))
    if "..." in kernel or repeats or not outputs or not inputs:
        return None
    axes = KernelAxes(stack, inputs, outputs)
    rank = next(c for c in "rzyxwvutsq" if c not in equation)
    eq_a, eq_b = axes.letters(kernel, rank)
    # The branch between its two products: the result's letters, with the rank where the first output stood. For "btnh": "btr".
    letters_out = {kernel[i] for i in outputs}
    first_out = min(result.index(c) for c in letters_out)
    hidden = "".join(rank if i == first_out else c for i, c in enumerate(result) if i == first_out or c not in letters_out)

    def apply_low_rank(x_: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        x_, a, b = promote(x_, a, b)
        return contract(f"{hidden},{eq_b}->{result}", contract(f"{x},{eq_a}->{hidden}", x_, a).astype(b.dtype), b)

    # Numbers for outputs stand in the kernel's order, as adapters store them. nn.Einsum stores its bias in the order of the result.
    without = lambda axes: [c for i, c in enumerate(kernel) if i not in axes]
    spelled = lambda part: "".join(kernel[i] for i in part)
    sides = vectors.equation(x, spelled(stack), spelled(inputs), spelled(outputs), result)
    reads = set(without(outputs)) <= set(x)
    return Linear(
        "kernel",
        axes,
        apply_low_rank,
        scale_outputs=scale(places_of(without(inputs), result)),
        scale_inputs=scale(places_of(without(outputs), x)) if reads else None,
        add_bias=add(places_of([c for c in result if c in kernel], result)),
        map_inputs=vectors.map_inputs(sides) if reads else None,
        apply_vectors=vectors.apply_vectors(sides) if reads else None,
    )


def places_of(letters: Sequence[str], operand: str) -> tuple[int, ...]:
    """The axes of these letters in an operand; counted from the end behind an ellipsis, which may stand for any number of axes.

    >>> places_of("nh", "btnh"), places_of("nh", "...nh")
    ((2, 3), (-2, -1))
    """
    before, _, after = operand.partition("...")
    return tuple(before.index(c) if c in before else after.index(c) - len(after) for c in letters)


def scale(places: Sequence[int]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(x, g) -> x * g``, with the axes of g at these places among those of x, in the dtype of x."""
    return lambda x, g: x * _spread(g, places, x.ndim).astype(x.dtype)


def add(places: Sequence[int]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(y, bias) -> y + bias``, with the axes of the bias at these places among those of y, in the dtype of y."""
    return lambda y, bias: y + _spread(bias, places, y.ndim).astype(y.dtype)


def _spread(v: Shaped[Array, "*shape"], places: Sequence[int], ndim: int) -> Shaped[Array, "*spread"]:
    """An array with its axes at these places among `ndim` axes, all others of size one.

    >>> _spread(jnp.ones((4, 8)), (3, 2), 4).shape
    (1, 1, 8, 4)
    """
    places = [place % ndim for place in places]
    order = sorted(range(len(places)), key=places.__getitem__)
    shape = [1] * ndim
    for i in order:
        shape[places[i]] = v.shape[i]
    return v.transpose(order).reshape(shape)


def length(value: Any) -> int:
    """How many entries an option has that may be a single number."""
    return len(value) if isinstance(value, Sequence) else 1


def on_rows(branch: Callable[..., jax.Array], contracted: int, x: jax.Array, *kernels: jax.Array) -> jax.Array:
    """The branch on the input as a matrix of rows: x [b, t, d] becomes [b t, d], and the result [b t, f] becomes [b, t, f].

    With two leading axes, XLA for CPU transposes what the gradients of ``a`` and ``b`` contract, and computes it a second time for that.
    """
    leading = x.shape[: x.ndim - contracted]
    rows = branch(x.reshape(-1, *x.shape[x.ndim - contracted :]), *kernels)
    return rows.reshape(*leading, *rows.shape[1:])
