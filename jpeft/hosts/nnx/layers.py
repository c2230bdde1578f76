"""What is linear about each layer class of NNX.

A layer runs on other parameters as a *twin*: a module of the same class with the same attributes and other arrays. A low-rank branch is run
by twins with another number of features, so strides, padding, dtypes, precision and custom products are the layer's own.
"""

# Annotations of the functions that are made for each call of a layer would be evaluated each time.
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft.core.layer import Linear
from jpeft.hosts import linear, vectors
from jpeft.hosts.nnx.outputs import INNER
from jpeft.tree.kernels import KernelAxes

TABLE = (nnx.Embed, nnx.Einsum, nnx.LinearGeneral, nnx.Linear, nnx.Conv)


def linear_of(
    module: nnx.Module, method_name: str, own: Mapping[str, Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Linear | None:
    """The geometry of a layer, by its class; None for a layer that is not known to be linear in one parameter.

    Args:
      module: The layer.
      method_name: The method that is called.
      own: The layer's own parameters, or their shapes.
      args: The positional arguments of the call.
      kwargs: Its keyword arguments.
    """
    if not is_known(module, method_name):
        return None
    if isinstance(module, nnx.Embed):
        if "embedding" not in own or module.num_embeddings == 1:  # a table of one row is not looked up
            return None
        return linear.attend(_promote(module)) if method_name == "attend" else linear.lookup(_promote(module, inexact=False))
    if "kernel" not in own or method_name != "__call__":
        return None
    if isinstance(module, nnx.Einsum):
        contract = functools.partial(_contract, module)
        equation = (args[1] if len(args) > 1 else None) or (kwargs or {}).get("einsum_str") or module.einsum_str
        return linear.einsum(equation, _promote(module), contract)
    if isinstance(module, nnx.LinearGeneral):
        return _linear_general(module, own["kernel"].ndim)
    if isinstance(module, nnx.Linear):
        return _linear(module)
    # Groups or a mask leave parts of the kernel unused.
    if isinstance(module, nnx.Conv) and module.feature_group_count == 1 and module.mask is None:
        return _conv(module, own["kernel"].ndim)
    return None


def is_known(module: nnx.Module, method_name: str) -> bool:
    """Whether a module runs as a layer of the table does. A subclass with a method of its own may do anything."""
    own = getattr(type(module), method_name, None)
    own = getattr(own, INNER, own)
    return any(isinstance(module, cls) and own is getattr(cls, method_name, ...) for cls in TABLE)


def twin(module: nnx.Module, arrays: Mapping[str, Any], **attributes: Any) -> Any:
    """A module like another, with other arrays in its variables, without submodules or state of its own.

    Attributes are copied one by one, which takes a small part of the time that `nnx.split` and `nnx.merge` take.
    """
    new = object.__new__(type(module))
    variables = {name: None if array is None else nnx.Param(array) for name, array in arrays.items()}
    vars(new).update({**vars(module), **variables, **attributes})
    return new


def run_known(module: nnx.Module, method_name: str, params: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
    """A layer of the table on other parameters."""
    return getattr(twin(module, params), method_name)(*inputs, **kwargs)


def _linear(module: nnx.Linear) -> Linear:
    """``x [..., d] @ kernel [d, f]``."""

    def apply_columns(x: jax.Array, kernel: Float[Array, "d columns"]) -> jax.Array:
        return _without_bias(module, kernel)(x)

    def apply_low_rank(x: jax.Array, a: Float[Array, "d r"], b: Float[Array, "r f"]) -> jax.Array:
        return apply_columns(apply_columns(x, a), b)

    def apply_joined(params: Mapping[str, Any], x: jax.Array, h: Float[Array, "*rows r"], b: Float[Array, "r f"]) -> jax.Array:
        kernel = jnp.concatenate([params["kernel"], b.astype(params["kernel"].dtype)])
        return twin(module, {**params, "kernel": kernel})(jnp.concatenate([x, h.astype(x.dtype)], axis=-1))

    return Linear(
        "kernel",
        linear.MATRIX,
        functools.partial(linear.on_rows, apply_low_rank, 1),
        apply_columns=functools.partial(linear.on_rows, apply_columns, 1),
        apply_joined=apply_joined,
        scale_outputs=linear.scale((-1,)),
        scale_inputs=linear.scale((-1,)),
        add_bias=linear.add((-1,)),
        map_inputs=vectors.map_inputs(vectors.dense),
        apply_vectors=vectors.apply_vectors(vectors.dense),
        reads_once=True,
    )


def _linear_general(module: nnx.LinearGeneral, ndim: int) -> Linear:
    """``x`` contracted over any axes, as in ``x [b, t, d] . kernel [d, n, h] -> [b, t, n, h]``, for each entry of the batch axes.

    The kernel is [*batch axes, *contracted axes, *features]. In the result batch axes come first and features last.
    """
    stack, outputs, axis = len(module.batch_axis), len(module.out_features), tuple(module.axis)
    at_outputs = (*range(stack), *range(-outputs, 0))

    def scale_inputs(x: jax.Array, g: jax.Array) -> jax.Array:
        # The kernel has the contracted axes in the order of x, in whatever order `axis` names them.
        return linear.scale((*range(stack), *sorted(i % x.ndim for i in axis)))(x, g)

    def apply_low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # [b, t, d] . a [d, r] -> [b, t, r], then [b, t, r] . b [r, n, h] -> [b, t, n, h]
        return _without_bias(module, b, axis=(-1,))(_without_bias(module, a, out_features=(a.shape[-1],))(x))

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


def _conv(module: nnx.Conv, ndim: int) -> Linear:
    """A convolution with kernel [*window, inputs, outputs]: linear in patches of the window."""

    def apply_low_rank(x: jax.Array, a: jax.Array, b: Float[Array, "r outputs"]) -> jax.Array:
        hidden = _without_bias(module, a)(x)  # [..., r]: strides and padding act here
        return jnp.tensordot(hidden, b.astype(hidden.dtype), 1)

    axes = KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,))
    # No `scale_inputs`: the kernel has inputs for each place in the window, and one value of x stands at several of them.
    return Linear("kernel", axes, apply_low_rank, scale_outputs=linear.scale((-1,)), add_bias=linear.add((-1,)))


def _without_bias(module: nnx.Module, kernel: jax.Array, **attributes: Any) -> Any:
    """The layer on another kernel, without its bias."""
    return twin(module, {"kernel": kernel, "bias": None}, use_bias=False, **attributes)


def _contract(module: nnx.Einsum, equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `nnx.Einsum` computes between promotion and bias."""
    preferred = getattr(module, "preferred_element_type", None)
    options = {} if preferred is None else {"preferred_element_type": preferred}
    return module.einsum_op(equation, x, kernel, precision=module.precision, **options)


def _promote(module: Any, **options: Any) -> Callable[..., tuple[Any, ...]]:
    """The arrays in the dtype that the layer computes in, by the layer's own rule."""
    return lambda *arrays: tuple(module.promote_dtype(arrays, dtype=module.dtype, **options))
