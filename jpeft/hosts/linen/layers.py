"""What is linear about each layer class of linen: the one table of layer classes in jpeft.

Low-rank branches are run by clones of the layer with another number of features, so strides, padding, dtypes, precision and custom
contractions are the layer's own.

The letters of shapes in the comments: b batch, t positions, d width, n heads, h size of a head, e experts, r rank.
"""

# Annotations of the functions that are made for each call of a layer would be evaluated each time.
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jpeft.core.layer import Linear
from jpeft.hosts import linear, vectors
from jpeft.hosts.taught import linear_of as linear_of_taught
from jpeft.tree.kernels import KernelAxes


def linear_of(
    module: nn.Module, method_name: str, own: Mapping[str, Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Linear | None:
    """The geometry of a layer, by its class; None for a layer that is not known to be linear in one parameter.

    What a user has taught comes first.

    Args:
      module: The layer, unbound.
      method_name: The method that is called.
      own: The layer's own parameters, or their shapes.
      args: The positional arguments of the call.
      kwargs: Its keyword arguments.
    """
    taught = linear_of_taught(module, own, args, method_name)
    if taught is not None:
        return taught
    if not any(_runs_as(module, cls, method_name) for cls in (nn.Embed, nn.Einsum, nn.DenseGeneral, nn.Dense, nn.Conv)):
        return None
    if isinstance(module, nn.Embed):
        if method_name == "attend":
            return linear.attend(functools.partial(_promoted, module))
        return linear.lookup(functools.partial(_promoted, module, inexact=False))
    if "kernel" not in own or method_name != "__call__":
        return None
    ndim = own["kernel"].ndim
    if isinstance(module, nn.Einsum):
        return _einsum(module, (args[1] if len(args) > 1 else None) or (kwargs or {}).get("einsum_str") or module.einsum_str)
    if isinstance(module, nn.DenseGeneral):
        return _dense_general(module, ndim)
    if isinstance(module, nn.Dense):
        return _dense(module)
    # Groups or a mask leave parts of the kernel unused.
    if isinstance(module, nn.Conv) and module.feature_group_count == 1 and module.mask is None:
        return _conv(module, ndim)
    return None


def _runs_as(module: nn.Module, cls: type, method_name: str) -> bool:
    """Whether a module runs as a layer class does. A subclass with a method of its own may do anything, such as apply an activation."""
    return isinstance(module, cls) and getattr(type(module), method_name, None) is getattr(cls, method_name, ...)


def direct(module: nn.Module, method_name: str) -> Callable[..., jax.Array] | None:
    """``(params, x) -> y``: what `apply` of a dense layer computes, without the scopes of linen; None for other layers.

    Methods run layers on other parameters, and most of the time that tracing a dense layer takes is linen's.
    """
    if not isinstance(module, nn.Dense) or not _runs_as(module, nn.Dense, method_name):
        return None
    if module.dot_general_cls is not None:  # which makes a module in the layer's scope
        return None

    def run(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return _product(module, x, params["kernel"], params["bias"] if module.use_bias else None)

    return run


def compute_dtype(module: nn.Module, own: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
    """The dtype that a layer computes in: the one it declares, or what its parameters and inputs promote to."""
    return linear.compute_dtype(getattr(module, "dtype", None), own, args)


# --- dense layers ---------------------------------------------------------------------------------------------------------------------


def _dense(module: nn.Dense) -> Linear:
    """``x [..., d] @ kernel [d, f]``."""

    def apply_columns(x: jax.Array, kernel: Float[Array, "d columns"]) -> jax.Array:
        if direct(module, "__call__") is not None:
            return _product(module, x, kernel, None)
        return _run(module.clone(use_bias=False, features=kernel.shape[-1]), kernel, x)

    def apply_low_rank(x: jax.Array, a: Float[Array, "d r"], b: Float[Array, "r f"]) -> jax.Array:
        return apply_columns(apply_columns(x, a), b)

    run = direct(module, "__call__")

    def apply_joined(params: Mapping[str, Any], x: jax.Array, h: Float[Array, "*rows r"], b: Float[Array, "r f"]) -> jax.Array:
        assert run is not None
        kernel = jnp.concatenate([params["kernel"], b.astype(params["kernel"].dtype)])
        return run({**params, "kernel": kernel}, jnp.concatenate([x, h.astype(x.dtype)], axis=-1))

    return Linear(
        "kernel",
        linear.MATRIX,
        functools.partial(linear.on_rows, apply_low_rank, 1),
        apply_columns=functools.partial(linear.on_rows, apply_columns, 1),
        apply_joined=None if run is None else apply_joined,
        scale_outputs=linear.scale((-1,)),
        scale_inputs=linear.scale((-1,)),
        add_bias=linear.add((-1,)),
        map_inputs=vectors.map_inputs(vectors.dense),
        apply_vectors=vectors.apply_vectors(vectors.dense),
        reads_once=True,
    )


def _product(module: nn.Dense, x: jax.Array, kernel: Float[Array, "d f"], bias: Float[Array, " f"] | None) -> jax.Array:
    """What `nn.Dense` computes: the same operations in the same order."""
    x, kernel, bias = _promoted(module, x, kernel, bias)
    dot_general = module.dot_general or jax.lax.dot_general
    y = dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=module.precision)
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


def _dense_general(module: nn.DenseGeneral, ndim: int) -> Linear:
    """``x`` contracted over any axes, as in ``x [b, t, d] . kernel [d, n, h] -> [b, t, n, h]``, for each entry of the batch axes.

    The kernel is [*batch axes, *contracted axes, *features]. In the result batch axes come first and features last.
    """
    stack, outputs = linear.length(module.batch_dims), linear.length(module.features)
    axis = tuple(module.axis) if isinstance(module.axis, Sequence) else (module.axis,)
    at_outputs = (*range(stack), *range(-outputs, 0))

    def scale_inputs(x: jax.Array, g: jax.Array) -> jax.Array:
        # The kernel has the contracted axes in the order of x, in whatever order `axis` names them.
        return linear.scale((*range(stack), *sorted(i % x.ndim for i in axis)))(x, g)

    def apply_low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # [b, t, d] . a [d, r] -> [b, t, r], then [b, t, r] . b [r, n, h] -> [b, t, n, h]
        down, up = module.clone(use_bias=False, features=(a.shape[-1],)), module.clone(use_bias=False, axis=-1)
        return _run(up, b, _run(down, a, x))

    sides = vectors.contraction(stack, axis, outputs)
    # Rows can be made of the leading axes only if the last axes are contracted, in their order.
    rows = not stack and axis == tuple(range(-len(axis), 0))
    return Linear(
        "kernel",
        KernelAxes(tuple(range(stack)), tuple(range(stack, ndim - outputs)), tuple(range(ndim - outputs, ndim))),
        functools.partial(linear.on_rows, apply_low_rank, len(axis)) if rows else apply_low_rank,
        scale_outputs=linear.scale(at_outputs),
        scale_inputs=scale_inputs,
        add_bias=linear.add(at_outputs),
        map_inputs=vectors.map_inputs(sides),
        apply_vectors=vectors.apply_vectors(sides),
        reads_once=True,
    )


def _conv(module: nn.Conv, ndim: int) -> Linear:
    """A convolution with kernel [*window, inputs, outputs]: linear in patches of the window."""

    def apply_low_rank(x: jax.Array, a: jax.Array, b: Float[Array, "r outputs"]) -> jax.Array:
        hidden = _run(module.clone(use_bias=False, features=a.shape[-1]), a, x)  # [..., r]: strides and padding act here
        return jnp.tensordot(hidden, b.astype(hidden.dtype), 1)

    axes = KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,))
    # No `scale_inputs`: the kernel has inputs for each place in the window, and one value of x stands at several of them.
    return Linear("kernel", axes, apply_low_rank, scale_outputs=linear.scale((-1,)), add_bias=linear.add((-1,)))


# --- other layers -----------------------------------------------------------------------------------------------------------------------


def _einsum(module: nn.Einsum, equation: str | None) -> Linear | None:
    """A contraction by equation."""
    contract = functools.partial(jnp.einsum, precision=module.precision, preferred_element_type=module.preferred_element_type)
    return linear.einsum(equation, functools.partial(_promoted, module), contract)


def _run(module: nn.Module, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A layer without a bias on another kernel."""
    out = module.apply({"params": {"kernel": kernel}}, x)
    assert isinstance(out, jax.Array)
    return out


def _promoted(module: Any, *arrays: Any, **options: Any) -> tuple[Any, ...]:
    """The arrays in the dtype that the layer computes in, by the layer's own rule."""
    return tuple(module.promote_dtype(*arrays, dtype=module.dtype, **options))
