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
from jaxtyping import Array, Float, Int, Shaped

from jpeft.core.layer import Linear
from jpeft.hosts.taught import linear_of as linear_of_taught
from jpeft.tree.kernels import KernelAxes

MATRIX = KernelAxes((), (0,), (1,))


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
        return _attend(module) if method_name == "attend" else _lookup(module)
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
    declared = getattr(module, "dtype", None)
    if declared is not None:
        return jnp.dtype(declared)
    arrays = [*jax.tree.leaves(own), *(a for a in args if hasattr(a, "dtype"))]
    floats = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.result_type(*floats) if floats else jnp.dtype(jnp.float32)


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
        MATRIX,
        functools.partial(_on_rows, apply_low_rank, 1),
        apply_columns=functools.partial(_on_rows, apply_columns, 1),
        apply_joined=None if run is None else apply_joined,
        scale_outputs=_scale((-1,)),
        scale_inputs=_scale((-1,)),
        add_bias=_add((-1,)),
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
    stack, outputs = _length(module.batch_dims), _length(module.features)
    axis = tuple(module.axis) if isinstance(module.axis, Sequence) else (module.axis,)
    at_outputs = (*range(stack), *range(-outputs, 0))

    def scale_inputs(x: jax.Array, g: jax.Array) -> jax.Array:
        # The kernel has the contracted axes in the order of x, in whatever order `axis` names them.
        return _scale((*range(stack), *sorted(i % x.ndim for i in axis)))(x, g)

    def apply_low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # [b, t, d] . a [d, r] -> [b, t, r], then [b, t, r] . b [r, n, h] -> [b, t, n, h]
        down, up = module.clone(use_bias=False, features=(a.shape[-1],)), module.clone(use_bias=False, axis=-1)
        return _run(up, b, _run(down, a, x))

    # Rows can be made of the leading axes only if the last axes are contracted, in their order.
    rows = not stack and axis == tuple(range(-len(axis), 0))
    return Linear(
        "kernel",
        KernelAxes(tuple(range(stack)), tuple(range(stack, ndim - outputs)), tuple(range(ndim - outputs, ndim))),
        functools.partial(_on_rows, apply_low_rank, len(axis)) if rows else apply_low_rank,
        scale_outputs=_scale(at_outputs),
        scale_inputs=scale_inputs,
        add_bias=_add(at_outputs),
        reads_once=True,
    )


def _conv(module: nn.Conv, ndim: int) -> Linear:
    """A convolution with kernel [*window, inputs, outputs]: linear in patches of the window."""

    def apply_low_rank(x: jax.Array, a: jax.Array, b: Float[Array, "r outputs"]) -> jax.Array:
        hidden = _run(module.clone(use_bias=False, features=a.shape[-1]), a, x)  # [..., r]: strides and padding act here
        return jnp.tensordot(hidden, b.astype(hidden.dtype), 1)

    axes = KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,))
    # No `scale_inputs`: the kernel has inputs for each place in the window, and one value of x stands at several of them.
    return Linear("kernel", axes, apply_low_rank, scale_outputs=_scale((-1,)), add_bias=_add((-1,)))


# --- embeddings -----------------------------------------------------------------------------------------------------------------------


def _lookup(module: nn.Embed) -> Linear:
    """Rows of a table [vocab, d]: the product of one-hot ids with the table."""

    def apply_low_rank(ids: Int[Array, "*rows"], a: Float[Array, "vocab r"], b: Float[Array, "r d"]) -> jax.Array:
        a, b = _promoted(module, a, b, inexact=False)
        # An id beyond the table is a virtual token of another method: it has no row to update.
        return jnp.take(a, ids, axis=0, mode="fill", fill_value=0) @ b

    # No `scale_inputs`: inputs are ids, whose one-hot form never exists.
    return Linear("embedding", MATRIX, apply_low_rank, scale_outputs=_scale((-1,)), add_bias=_add((-1,)))


def _attend(module: nn.Embed) -> Linear:
    """Scores of all rows: ``query [..., d] @ table.T``, as the output layer of a model with tied embeddings."""

    def apply_low_rank(query: Float[Array, "*rows d"], a: Float[Array, "vocab r"], b: Float[Array, "r d"]) -> Float[Array, "*rows vocab"]:
        query, a, b = _promoted(module, query, a, b)
        return (query @ b.T) @ a.T

    # The table's inputs are this call's outputs, and the reverse, so none of the functions that go by inputs and outputs apply.
    return Linear("embedding", MATRIX, apply_low_rank)


# --- einsum ---------------------------------------------------------------------------------------------------------------------------


def _einsum(module: nn.Einsum, equation: str | None) -> Linear | None:
    """A contraction by equation. Its low-rank branch is the equation split in two through a rank axis.

    ``btd,dnh->btnh`` (queries) becomes ``btd,dr->btr`` and ``btr,rnh->btnh``: from x [b, t, d] through [b, t, r] to [b, t, n, h].
    ``btnh,nhd->btd`` (the attention's output) becomes ``btnh,nhr->btr`` and ``btr,rd->btd``.
    ``bted,edf->btef`` (experts) becomes ``bted,edr->bter`` and ``bter,erf->btef``: e stays, because each expert has its own kernel.
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
        x_, a, b = _promoted(module, x_, a, b)
        einsum = functools.partial(jnp.einsum, precision=module.precision, preferred_element_type=module.preferred_element_type)
        return einsum(f"{hidden},{eq_b}->{result}", einsum(f"{x},{eq_a}->{hidden}", x_, a).astype(b.dtype), b)

    # Numbers for outputs stand in the kernel's order, as adapters store them. nn.Einsum stores its bias in the order of the result.
    without = lambda axes: [c for i, c in enumerate(kernel) if i not in axes]
    return Linear(
        "kernel",
        axes,
        apply_low_rank,
        scale_outputs=_scale(_places(without(inputs), result)),
        scale_inputs=_scale(_places(without(outputs), x)) if set(without(outputs)) <= set(x) else None,
        add_bias=_add(_places([c for c in result if c in kernel], result)),
    )


def _places(letters: Sequence[str], operand: str) -> tuple[int, ...]:
    """The axes of these letters in an operand; counted from the end behind an ellipsis, which may stand for any number of axes.

    >>> _places("nh", "btnh"), _places("nh", "...nh")
    ((2, 3), (-2, -1))
    """
    before, _, after = operand.partition("...")
    return tuple(before.index(c) if c in before else after.index(c) - len(after) for c in letters)


# --- parts of the above -----------------------------------------------------------------------------------------------------------------


def _scale(places: Sequence[int]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(x, g) -> x * g``, with the axes of g at these places among those of x, in the dtype of x."""
    return lambda x, g: x * _spread(g, places, x.ndim).astype(x.dtype)


def _add(places: Sequence[int]) -> Callable[[jax.Array, jax.Array], jax.Array]:
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


def _length(value: Any) -> int:
    """How many entries an option has that may be a single number."""
    return len(value) if isinstance(value, Sequence) else 1


def _run(module: nn.Module, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A layer without a bias on another kernel."""
    out = module.apply({"params": {"kernel": kernel}}, x)
    assert isinstance(out, jax.Array)
    return out


def _on_rows(branch: Callable[..., jax.Array], contracted: int, x: jax.Array, *kernels: jax.Array) -> jax.Array:
    """The branch on the input as a matrix of rows: x [b, t, d] becomes [b t, d], and the result [b t, f] becomes [b, t, f].

    With two leading axes, XLA for CPU transposes what the gradients of ``a`` and ``b`` contract, and computes it a second time for that.
    """
    leading = x.shape[: x.ndim - contracted]
    rows = branch(x.reshape(-1, *x.shape[x.ndim - contracted :]), *kernels)
    return rows.reshape(*leading, *rows.shape[1:])


def _promoted(module: Any, *arrays: Any, **options: Any) -> tuple[Any, ...]:
    """The arrays in the dtype that the layer computes in, by the layer's own rule."""
    return tuple(module.promote_dtype(*arrays, dtype=module.dtype, **options))
