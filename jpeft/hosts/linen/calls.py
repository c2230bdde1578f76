"""One call of a linen module as an interceptor sees it: its arguments by position, and the module as a `Layer`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from jpeft.core.layer import Change, Layer, NoProductError
from jpeft.hosts import products
from jpeft.hosts.arguments import argument_names
from jpeft.hosts.base import DROPOUT
from jpeft.hosts.linen import flax_internals
from jpeft.hosts.linen.layers import compute_dtype, direct, linear_of
from jpeft.tree.adapters import GRAFT, pop_grafts

LAYER_METHODS = ("__call__", "attend")  # the methods by which layers are run; `attend` is that of `nn.Embed`


def is_call(context: nn.module.InterceptorContext) -> bool:
    """Whether an intercepted call runs a method of a bound module, and does not enter a lifted transform around the module that will run.

    The leaves around a transform are those of all layers. The module inside sees its own, so it is the one to adapt.
    """
    module, name = context.module, context.method_name
    if module.scope is None or name == "setup" or (name.startswith("__") and name != "__call__"):
        return False
    # Transforms of functions, such as `nn.while_loop` and `nn.switch`, run them on a module as if they were its methods.
    if name not in LAYER_METHODS and not flax_internals.is_method(module, name, flax_internals.function_of(context)):
        return False
    return not flax_internals.enters_transform(module, name)


def is_layer_call(context: nn.module.InterceptorContext) -> bool:
    """Whether such a call is by one of the methods by which layers are run."""
    return context.method_name in LAYER_METHODS and is_call(context)


def own_params(module: nn.Module) -> dict[str, Any]:
    """A bound module's own parameters, as arrays, and those of its submodules, as dicts."""
    return {name: meta.unbox(value) for name, value in flax_internals.collection(module, "params").items() if name != GRAFT}


def dtypes_of(module: nn.Module, narrow: Mapping[str, Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The dtype that a layer computes in, with its parameters as they are, and with some in other dtypes, which are given by path."""
    own = own_params(module)
    narrowed = {name: narrow.get("/".join([*module.path, name])) for name in own}
    if all(dtype is None for dtype in narrowed.values()) or getattr(module, "dtype", None) is not None:
        return None, None
    like = {name: value if narrowed[name] is None else jax.ShapeDtypeStruct(value.shape, narrowed[name]) for name, value in own.items()}
    return compute_dtype(module, own, args), compute_dtype(module, like, args)


def dropout_key(module: nn.Module) -> Any:
    """A key from the module's stream for dropout; None where the call draws no random numbers."""
    return module.make_rng(DROPOUT) if module.has_rng(DROPOUT) else None


def as_layer(
    context: nn.module.InterceptorContext,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    costly: dict[str, str] | None = None,
) -> Layer:
    """A module that is about to run as a `Layer`, for middleware that may run it any number of times, on any parameters.

    linen lets a compact module run once in its scope. So the first run on the module's own parameters happens in place, by `next_fun`,
    where submodules are intercepted and variables of other collections can be written. Every other run is a pure function of its
    parameters: `apply` of an unbound copy, or for a layer of an unknown class, which may do more than return its outputs, its first run
    with a copy of its scope.

    Args:
      context: The intercepted call.
      next_fun: Runs it.
      args: Its positional arguments.
      kwargs: Its keyword arguments.
      costly: Takes the kernels that have no product to change, by their paths, with the reasons.
    """
    module, method_name = context.module, context.method_name
    own, hide = own_params(module), None
    if flax_internals.holds_nnx(module):
        own, hide = pop_grafts(own)[0], GRAFT
    # Without parent and name the copy is a model by itself, whose `apply` takes the layer's parameters alone.
    unbound = module.clone(parent=None, name=None)
    # A layer without submodules draws nothing that its own middleware does not draw.
    draws = module.has_rng(DROPOUT) and any(isinstance(value, Mapping) for value in own.values())
    rngs = {DROPOUT: module.make_rng(DROPOUT)} if draws else None
    in_place = [next_fun]  # emptied by the first run
    short = direct(unbound, method_name)
    linear = linear_of(unbound, method_name, own, args, kwargs)

    def run(params: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
        # `is`: equal parameters that went through a transformation are other arrays, which the scope does not hold.
        if params is own and in_place:
            direct_run = in_place.pop()
            return direct_run(*inputs, **{**kwargs, **keywords}) if hide is None else run_changed(params, {}, *inputs, **keywords)
        if short is not None and not keywords:
            return short(params, *inputs)
        if linear is None and in_place:  # a layer of an unknown class may do more than return its outputs
            in_place.pop()
            return run_changed(params, {}, *inputs, **keywords)
        return unbound.apply({"params": params}, *inputs, rngs=rngs, method=method_name, **{**kwargs, **keywords})

    def run_changed(params: Mapping[str, Any], changes: Mapping[str, Change], *inputs: Any, **keywords: Any) -> Any:
        def use(pure: Callable[..., Any], *inputs: Any) -> Any:
            return products.run_changed(pure, dict(params), changes, *inputs) if changes else pure(params, *inputs)

        method = flax_internals.function_of(context)
        try:
            out = flax_internals.call_as_function(module, method, use, inputs, {**kwargs, **keywords}, hide=hide)
        except NoProductError as error:
            if costly is not None:
                costly["/".join((*module.path, error.name))] = error.reason
            raise
        in_place.clear()
        return out

    return Layer(
        run=run,
        params=own,
        path="/".join(module.path),
        linear=linear,
        dtype=compute_dtype(module, own, args),
        names=argument_names(type(module), method_name),
        keywords=kwargs,
        method=method_name,
        cached=bool(flax_internals.collection(module, "cache")),
        run_changed=run_changed if linear is None else None,
    )
