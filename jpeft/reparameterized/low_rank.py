"""Low-rank factors: how ``a`` and ``b`` of an update ``s a b`` begin, and the scale s."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.initializers import kaiming_uniform
from jpeft.core.options import Count, PerPath, Positive
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS
from jpeft.tree.kernels import KernelAxes
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
    """``W + s a b``, of one kernel or of a stack."""
    return kernel + scale * (leaves["a"] @ leaves["b"])
