"""The linen host: graft and read.

`bind` has put the adapter's leaves beside the parameters they belong to, inside the ``params`` collection. One interceptor then reads, at
every layer, the leaves in that layer's own scope and runs the method's `call` around the layer. The model is not modified.

Why not simply look the leaves up by the module's path? Because lifted transforms trace a module once and run it many times: under
`nn.jit` equal blocks share one trace, so each would get the first block's adapter, and under `nn.scan` all layers have one path. Leaves in
the scope are sliced and passed along like any other parameter, so `nn.scan`, `nn.remat`, `nn.jit` and `nn.vmap` need no special case.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen import transforms as _transforms

from jpeft.core.layer import Layer, Linear
from jpeft.core.method import Method
from jpeft.tree.adapters import GRAFT, pop_grafts, put_grafts
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, flatten

_DROPOUT = "dropout"  # the rng stream of models; a method is random exactly when the model is


def is_linen(fn: Callable[..., Any]) -> bool:
    """Whether a function is, or partially applies, a bound method of a linen module."""
    fn = _innermost(fn)
    return isinstance(getattr(fn, "__self__", None), nn.Module)


def wrap(fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
    """``fn(variables, *args, **kwargs)`` with the method's leaves bound and its `call` around every layer that has some."""

    @functools.wraps(_innermost(fn))
    def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        adapter = method.from_collections(variables)
        others = {name: tree for name, tree in variables.items() if name not in method.to_collections(adapter)}
        rngs = kwargs.get("rngs")
        rng = rngs.get(_DROPOUT) if isinstance(rngs, Mapping) else rngs
        params = tag(method.bind(unbox(others["params"]), adapter, rng=rng), method)
        ran: set[str] = set()
        with nn.intercept_methods(functools.partial(_intercept, method, ran)):
            out = fn({**others, "params": params}, *args, **kwargs)
        _check_met(params, method, ran)
        if kwargs.get("mutable", False) is not False and isinstance(out, tuple) and isinstance(out[-1], Mapping) and "params" in out[-1]:
            out = (*out[:-1], {**out[-1], "params": pop_grafts(out[-1]["params"])[0]})
        return out

    return forward


def mapped(fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`fn` with `change` applied to the outputs of every linen module that runs inside it."""

    def after(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        return change(out) if context.method_name in ("__call__", "attend") else out

    @functools.wraps(_innermost(fn))
    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(after):
            return fn(*args, **kwargs)

    return run


def unbox(params: Params) -> Params:
    """Parameters without linen's metadata boxes (`nn.Partitioned`)."""
    boxed = any(isinstance(leaf, meta.AxisMetadata) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)))
    return meta.unbox(params) if boxed else params


def tag(params: Params, method: Method) -> Params:
    """Write the method's identity into the tree's *structure*.

    `nn.jit` keys its cache on the structure of what it is given. Two methods with equal leaves but another alpha must not share a trace.
    """
    clean, grafts = pop_grafts(params)
    return put_grafts(clean, {path: {f"{hash(method):x}": leaves} for path, leaves in grafts.items()})


def _innermost(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _intercept(
    method: Method, ran: set[str], next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
) -> Any:
    module = context.module
    if module.scope is None or context.method_name not in ("__call__", "attend") or not module.scope.has_variable("params", GRAFT):
        return next_fun(*args, **kwargs)
    if _is_lifted(module, context.method_name):
        return next_fun(*args, **kwargs)  # the module inside the transform is the one to adapt: it sees sliced leaves
    tagged = module.scope.get_variable("params", GRAFT)
    if f"{hash(method):x}" not in tagged:
        return next_fun(*args, **kwargs)  # another wrap's leaves: a wrapped model inside a wrapped model
    _met.add((method, module.path[-1] if module.path else ""))
    ran.add("/".join(module.path))
    args, kwargs = _positional(module, context.method_name, args, kwargs)
    layer = _layer(module, context.method_name, next_fun, kwargs, args)
    rng = module.make_rng(_DROPOUT) if module.has_rng(_DROPOUT) else None
    return method.call(layer, args, tagged[f"{hash(method):x}"], rng)


# (method, name of a module) that met. By name, not by path: `nn.jit` traces one of many equal blocks, and none at all the second time.
_met: set[tuple[Method, str]] = set()


def _check_met(params: Params, method: Method, ran: set[str]) -> None:
    """Refuse leaves on a module that did not run, which we know in two cases.

    A module with parameters is taken to exist; one without may be a mere guess. And a module was passed by if one inside it ran in this
    very call and it did not itself: by paths, for a cached trace of `nn.jit` tells of neither.
    """
    clean, grafts = pop_grafts(params)
    owners = flatten(clean)
    for path in grafts:
        inside = f"{path}/" if path else ""
        if path and (method, path.rpartition("/")[2]) not in _met and not any(name.startswith(inside) for name in owners):
            raise ValueError(
                f"{method.name} adds to the module '{path}', but no such module ran. Putting keys in front of a layer's own needs "
                "a model with parameterless modules there, as those of jpeft.models have: `AttentionCore` in attention.py, `Positions` in "
                "bert_encoder.py and decoder.py."
            )
        entered = sorted(other for other in ran if other.startswith(inside)) if path not in ran else []
        if entered:
            what = f"the module '{path}'" if path else "the model as a whole"
            raise ValueError(
                f"{method.name} adds to {what}, which this call passed by: '{entered[0]}' ran, but not the `__call__` around it, so the "
                "change would be silently lost. Enter by `__call__`, or let the method add to a module that is entered so; where a prompt "
                "is put in, body= says."
            )


@functools.cache
def _lifted_class(cls: type, method_name: str) -> bool:
    fn = getattr(cls, method_name)
    while fn is not None:
        if getattr(fn, "__code__", None) is not None and fn.__code__.co_filename == _transforms.__file__:
            return True
        fn = getattr(fn, "__wrapped__", None)
    return False


def _is_lifted(module: nn.Module, method_name: str) -> bool:
    """Whether this call only enters a lifted transform (`nn.remat(Block)`, ...), whose inner module is intercepted once more."""
    return _lifted_class(type(module), method_name)


def _positional(
    module: nn.Module, method_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments that could have been positional moved there, so that `call` need not know how a model spells its calls."""
    if not kwargs:
        return args, kwargs
    signature = inspect.signature(getattr(type(module), method_name))
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError:
        return args, kwargs
    # One left out in front of one that is given would keep the latter from its place.
    names = _names(type(module), method_name)
    given = [i for i, name in enumerate(names) if name in bound.arguments]
    for name in names[: max(given, default=0)]:
        bound.arguments.setdefault(name, signature.parameters[name].default)
    return bound.args[1:], bound.kwargs


@functools.cache
def _names(cls: type, method_name: str) -> tuple[str, ...]:
    """What a method calls its positional arguments, without self."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(getattr(cls, method_name)).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)[1:]


def _layer(module: nn.Module, method_name: str, next_fun: Callable[..., Any], kwargs: dict[str, Any], args: tuple[Any, ...]) -> Layer:
    scope = module.scope
    assert scope is not None
    own = {name: meta.unbox(value) for name, value in scope._collection("params").items() if name != GRAFT}
    unbound = module.clone(parent=None, name=None)
    rngs = {_DROPOUT: module.make_rng(_DROPOUT)} if module.has_rng(_DROPOUT) and any(isinstance(v, Mapping) for v in own.values()) else None

    in_place = [next_fun]  # linen lets a compact module run once in its scope; a second run is a pure one

    def run(params: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
        if params is own and in_place:
            return in_place.pop()(*inputs, **{**kwargs, **keywords})
        return unbound.apply({"params": params}, *inputs, rngs=rngs, method=method_name, **{**kwargs, **keywords})

    return Layer(
        run=run,
        params=own,
        path="/".join(module.path),
        linear=_linear(unbound, method_name, own, args, kwargs),
        dtype=_dtype(module, own, args),
        names=_names(type(module), method_name),
        keywords=kwargs,
        method=method_name,
        cached=bool(scope._collection("cache")),
    )


def _dtype(module: nn.Module, own: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
    given = getattr(module, "dtype", None)
    if given is not None:
        return jnp.dtype(given)
    arrays = [*jax.tree.leaves(own), *(a for a in args if hasattr(a, "dtype"))]
    floats = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.result_type(*floats) if floats else jnp.dtype(jnp.float32)


# --- what is linear about each layer class ------------------------------------------------------------------------------------------


def _linear(module: nn.Module, method_name: str, own: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Linear | None:
    """The geometry of a layer, by its class: the one table of layer classes in jpeft.

    Low-rank branches are run by clones of the layer with another number of features, so strides, padding, dtypes, precision and custom
    contractions are the layer's own.
    """
    if isinstance(module, nn.Embed):
        return _embed(module, method_name)
    if "kernel" not in own or method_name != "__call__":
        return None
    ndim = own["kernel"].ndim
    if isinstance(module, nn.Einsum):
        return _einsum(module, args, kwargs)
    if isinstance(module, nn.DenseGeneral):
        stack, outputs = (len(v) if isinstance(v, (tuple, list)) else 1 for v in (module.batch_dims, module.features))
        axes = KernelAxes(tuple(range(stack)), tuple(range(stack, ndim - outputs)), tuple(range(ndim - outputs, ndim)))
        down, up = (lambda r: module.clone(use_bias=False, features=(r,))), module.clone(use_bias=False, axis=-1)
        trailing = _trailing(module.axis)
        low_rank = lambda x, a, b: _run(up, b, _run(down(a.shape[-1]), a, x))
        if stack or not trailing:
            return Linear("kernel", axes, low_rank)
        return Linear(
            "kernel",
            axes,
            functools.partial(_by_rows, low_rank, trailing),
            scale_outputs=_scale_last,
            scale_inputs=_scale_last,
            add_bias=_add_last,
        )
    if isinstance(module, nn.Dense):
        down, up = (lambda r: module.clone(use_bias=False, features=r)), module.clone(use_bias=False)
        low_rank = lambda x, a, b: _run(up, b, _run(down(a.shape[-1]), a, x))
        columns = lambda x, kernel: _run(down(kernel.shape[-1]), kernel, x)
        return Linear(
            "kernel",
            KernelAxes((), (0,), (1,)),
            functools.partial(_by_rows, low_rank, 1),
            apply_columns=functools.partial(_by_rows, columns, 1),
            scale_outputs=_scale_last,
            scale_inputs=_scale_last,
            add_bias=_add_last,
        )
    if type(module) is nn.Conv and module.feature_group_count == 1 and module.mask is None:
        axes = KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,))
        low_rank = lambda x, a, b: _mix(_run(module.clone(use_bias=False, features=a.shape[-1]), a, x), b)
        return Linear("kernel", axes, low_rank, scale_outputs=_scale_last, add_bias=_add_last)
    return None


def _scale_last(x: jax.Array, g: jax.Array) -> jax.Array:
    """``x * g`` over the last axes of x, which are those of g, in the dtype of x."""
    return x * g.astype(x.dtype).reshape((1,) * (x.ndim - g.ndim) + g.shape)


def _add_last(y: jax.Array, bias: jax.Array) -> jax.Array:
    """``y + bias`` over the last axes of y, which are those of the bias, in the dtype of y."""
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _run(module: nn.Module, kernel: jax.Array, x: jax.Array) -> jax.Array:
    out = module.apply({"params": {"kernel": kernel}}, x)
    assert isinstance(out, jax.Array)
    return out


def _trailing(axis: int | Sequence[int]) -> int:
    """How many axes a DenseGeneral contracts if they are the last ones, in order; 0 otherwise."""
    axes = list(axis) if isinstance(axis, Sequence) else [axis]
    return len(axes) if axes == list(range(-len(axes), 0)) else 0


def _by_rows(branch: Callable[..., jax.Array], trailing: int, x: jax.Array, *kernels: jax.Array) -> jax.Array:
    """The branch on the input as a matrix of rows.

    With two leading axes, XLA for CPU transposes what the gradients of ``a`` and ``b`` contract, and computes it a second time for that.
    """
    rows = branch(x.reshape(-1, *x.shape[x.ndim - trailing :]), *kernels)
    return rows.reshape(*x.shape[: x.ndim - trailing], *rows.shape[1:])


def _mix(h: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tensordot(h, b.astype(h.dtype), 1)


def _promoted(module: Any, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
    """The arrays in the dtype that the layer computes in, by the layer's own rule."""
    return tuple(module.promote_dtype(*arrays, dtype=module.dtype, **options))


def _embed(module: nn.Embed, method_name: str) -> Linear:
    def lookup(ids: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = _promoted(module, a, b, inexact=False)
        # An id beyond the table is a virtual token of another method: it has no row to update.
        return jnp.take(a, ids, axis=0, mode="fill", fill_value=0) @ b

    def attend(query: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        query, a, b = _promoted(module, query, a, b)
        return (query @ b.T) @ a.T

    axes = KernelAxes((), (0,), (1,))
    if method_name == "attend":
        return Linear("embedding", axes, attend, scale_inputs=None, scale_outputs=None)
    return Linear("embedding", axes, lookup, scale_outputs=_scale_last)


def _einsum(module: nn.Einsum, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Linear | None:
    """Split an equation in two through a rank axis: ``btd,dnh->btnh`` becomes ``btd,dr->btr`` and ``btr,rnh->btnh``."""
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    equation = (given or module.einsum_str or "").replace(" ", "")
    if equation.count(",") != 1 or "->" not in equation:
        return None
    operands, result = equation.split("->")
    x, kernel = operands.split(",")
    place = {letter: i for i, letter in enumerate(kernel)}
    stack = tuple(place[c] for c in kernel if c in x and c in result)
    outputs = tuple(place[c] for c in kernel if c in result and c not in x)
    inputs = tuple(place[c] for c in kernel if c not in result)
    if "..." in kernel or not outputs or not inputs:
        return None
    axes = KernelAxes(stack, inputs, outputs)
    rank = next(c for c in "rzyxwvutsq" if c not in equation)
    eq_a, eq_b = axes.letters(kernel, rank)
    first_out = min(result.index(kernel[i]) for i in outputs)
    hidden = "".join(rank if i == first_out else c for i, c in enumerate(result) if i == first_out or c not in {kernel[o] for o in outputs})

    def branch(x_: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        x_, a, b = _promoted(module, x_, a, b)
        einsum = functools.partial(jnp.einsum, precision=module.precision, preferred_element_type=module.preferred_element_type)
        return einsum(f"{hidden},{eq_b}->{result}", einsum(f"{x},{eq_a}->{hidden}", x_, a).astype(b.dtype), b)

    def scale_outputs(y: jax.Array, g: jax.Array) -> jax.Array:
        # g has the kernel's output axes in the kernel's order; y has all axes of the result.
        order = [result.index(kernel[i]) for i in outputs]
        shape = [1] * len(result)
        for i in order:
            shape[i] = y.shape[i]
        return y * g.transpose(sorted(range(len(order)), key=order.__getitem__)).astype(y.dtype).reshape(shape)

    def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
        # nn.Einsum keeps its bias in the order of the result's axes.
        return y + bias.astype(y.dtype).reshape([size if letter in kernel else 1 for letter, size in zip(result, y.shape, strict=True)])

    if "..." in equation or stack:
        return Linear("kernel", axes, branch)
    return Linear("kernel", axes, branch, scale_outputs=scale_outputs, add_bias=add_bias)


# --- watching a model -----------------------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    """What every module called `name` is given in one forward pass, by the module's path; stacked where `nn.scan` runs it.

    >>> from jpeft.hosts.linen import inputs_of
    >>> from flax import linen as nn
    >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((1, 8))
    >>> {path: inputs[0].shape for path, inputs in inputs_of(model, model.init(key, x)["params"], "layers_2", x).items()}
    {'layers_2': (1, 4)}
    """

    def record(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.name == name and context.method_name == "__call__" and not _is_lifted(module, "__call__"):
            for i, x in enumerate(_positional(module, "__call__", args, kwargs)[0]):
                if isinstance(x, jax.Array):
                    module.sow("intermediates", f"{_INPUT}{i}", x)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        _, state = model.apply({"params": params}, *args, mutable=["intermediates"], **kwargs)
    found: dict[str, list[Any]] = {}
    for path, leaf in flatten(state.get("intermediates", {})).items():
        module, _, rest = path.rpartition(f"/{_INPUT}")
        if module and rest.endswith("/0"):  # what a module was given when it ran first
            found.setdefault(module, []).append(leaf)
    return found


_INPUT = "jpeft_input_"


# --- asking a model for its geometry --------------------------------------------------------------------------------------------------


def kernel_axes(model: nn.Module, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
    """The geometry of every kernel of a linen model, read off its layers in one abstract forward pass.

    Args:
      model: The module.
      params: Its parameters, or their shapes.
      *args: Example inputs, or their shapes; as for ``model.apply`` after the variables.
      **kwargs: Passed on to ``model.apply``.

    Returns:
      Rules for the option `axes` of any method that factorises kernels, one for each kernel, stack axes of `nn.scan` included.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> model = nn.DenseGeneral((4, 8))
    >>> x = jnp.ones((2, 32))
    >>> jpeft.kernel_axes(model, model.init(jax.random.key(0), x)["params"], x)
    (('kernel', KernelAxes(stack=(), inputs=(0,), outputs=(1, 2))),)
    """
    params = unbox(params)
    outer = flatten(params)
    found: dict[str, KernelAxes] = {}

    def record(next_fun: Callable[..., Any], args: tuple[Any, ...], kw: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.scope is not None and not _is_lifted(module, context.method_name) and context.method_name in ("__call__", "attend"):
            own = {name: meta.unbox(value) for name, value in module.scope._collection("params").items()}
            inputs, rest = _positional(module, context.method_name, args, kw)
            linear = _linear(module.clone(parent=None, name=None), context.method_name, own, inputs, rest)
            if linear is not None:
                path = "/".join((*module.path, linear.name))
                found[path] = _restack(linear.axes, own[linear.name].shape, outer[path].shape)
        return next_fun(*args, **kw)

    def apply(p: Params, *a: Any) -> Any:
        with nn.intercept_methods(record):
            return model.apply({"params": p}, *a, **kwargs)

    jax.eval_shape(apply, params, *args)
    return tuple((re.escape(path), axes) for path, axes in found.items())


def _restack(axes: KernelAxes, inner: tuple[int, ...], outer: tuple[int, ...]) -> KernelAxes:
    """Add the axes that a scan has sliced away: those whose removal from the outer shape leaves the inner one, leading ones first."""
    if len(inner) == len(outer):
        return axes
    stack = (
        [i for i in range(len(outer)) if outer[:i] + outer[i + 1 :] == inner]
        if len(outer) - len(inner) == 1
        else list(range(len(outer) - len(inner)))
    )
    at = set(stack[:1] if len(outer) - len(inner) == 1 else stack)
    places = [i for i in range(len(outer)) if i not in at]
    moved = (tuple(places[i] for i in part) for part in axes)
    old_stack, inputs, outputs = moved
    return KernelAxes(tuple(sorted(at)) + old_stack, inputs, outputs)
