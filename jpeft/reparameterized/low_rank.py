"""Low-rank factors: how ``a`` and ``b`` of an update ``s a b`` begin, and the scale s."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.initializers import kaiming_uniform
from jpeft.core.options import Count, PerPath, Positive
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, LeafAxes, MatrixForm
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Path
from jpeft.tree.select import first_match

RANK = "rank"
MATRIX = KernelAxes((), (0,), (1,))  # a kernel in matrix form
LEAF_AXES = {"a": (INPUTS, RANK), "b": (RANK, OUTPUTS)}
Initializer = Literal["kaiming", "gaussian"]


def scale(path: str, rank: PerPath[Count], alpha: PerPath[Positive], rslora: bool) -> float:
    """``s = alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA, of the kernel at a path."""
    r = first_match(path, rank, "rank")
    return first_match(path, alpha, "alpha") / (math.sqrt(r) if rslora else r)


def factors(
    key: jax.Array, path: str, shape: tuple[int, ...], axes: KernelAxes, rank: int, initializer: Initializer
) -> dict[str, Float[Array, "..."]]:
    """The factors at the start, in the kernel's own axes: ``a`` is random and ``b`` zero, so the update is zero.

    For an embedding it is ``b`` that is random, because a row of ``a`` is fetched where the kernel's row would be.
    """
    shape_a, shape_b = axes.factor_shapes(shape, rank)
    if path.rpartition("/")[2] == "embedding":
        return {"a": jnp.zeros(shape_a), "b": jax.random.normal(key, shape_b)}
    uniform = initializer == "kaiming"
    a = kaiming_uniform(key, shape_a, fan_in=axes.fan_in(shape)) if uniform else jax.random.normal(key, shape_a) / rank
    return {"a": a, "b": jnp.zeros(shape_b)}


def update(kernel: Float[Array, "*stack inputs outputs"], leaves: dict[str, Any], scale: float) -> Float[Array, "*stack inputs outputs"]:
    """``W + s a b``, or ``W + s (a b - a0 b0)`` with the factors of the start; of one kernel or of a stack."""
    product = leaves["a"] @ leaves["b"]
    if "a0" in leaves:
        product = product - jax.lax.stop_gradient(leaves["a0"] @ leaves["b0"])
    return kernel + scale * product


def stored_ranks(
    shapes: Mapping[Path, Any],
    held: Mapping[Path, Any],
    forms: Mapping[Path, MatrixForm],
    leaf_axes: Mapping[str, LeafAxes],
    most: Callable[[Path], int],
) -> dict[Path, Any]:
    """The shapes of an adapter whose kernels may have other ranks than at the start, or none: those that it holds.

    Args:
      shapes: Of all leaves at the start.
      held: The adapter; for an empty one the shapes are those of the start.
      forms: The form of each kernel.
      leaf_axes: The axes of each leaf as a matrix.
      most: The largest rank that a kernel may have.

    Raises:
      ValueError: for a rank above it.
    """
    out = dict(shapes)
    for path, form in forms.items() if held else ():
        own = {name: axes for name, axes in leaf_axes.items() if f"{path}/{name}" in shapes}
        found = [
            held[f"{path}/{name}"].shape[form.stored_axes(axes).index(RANK)]
            for name, axes in own.items()
            if RANK in axes and f"{path}/{name}" in held
        ]
        rank = found[0] if found else 0
        if rank > most(path):
            raise ValueError(f"The factors at '{path}' have rank {rank}, and the method's options allow {most(path)}.")
        for name, axes in own.items():
            shape = out.pop(f"{path}/{name}")
            if rank:
                out[f"{path}/{name}"] = jax.ShapeDtypeStruct(form.leaf_shape(axes, {RANK: rank}), shape.dtype)
    return out
