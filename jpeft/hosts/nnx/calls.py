"""One call of an NNX module: the module as a `Layer`, and the method around it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.core.layer import Layer
from jpeft.hosts.arguments import argument_names, bind_by_position
from jpeft.hosts.linear import compute_dtype
from jpeft.hosts.nnx.layers import is_known, linear_of, run_known, twin
from jpeft.hosts.nnx.patching import Around, current_record
from jpeft.tree.paths import flatten, replace, unflatten

LAYER_METHODS = ("__call__", "attend")  # the methods by which layers are run; `attend` is that of `nnx.Embed`
SCOPE = "jpeft"


def run_around(
    module: nnx.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], around: Around, leaves: dict[str, Any], key: Any
) -> Any:
    """Run a method of a module, whose leaves have been taken off, with the method around it."""
    args, kwargs = bind_by_position(module, name, args, kwargs)
    effects = [module]
    layer = as_layer(module, name, around, effects, args, kwargs)
    record = current_record()
    if record is not None:
        record.ran.setdefault(around.path, set()).add(name)
        record.inner[around.path] = {path: leaf.shape for path, leaf in flatten(leaves).items()}
    if leaves:
        with jax.named_scope(SCOPE):
            out = around.method.call(layer, args, leaves, key)
    else:
        out = layer(*args)
    effects.clear()  # what runs later, in a backward pass, does not change the module
    if not around.narrow:
        return out
    # A trained float32 leaf in place of one in half precision widens the outputs of a layer that declares no dtype of its own.
    narrow = compute_dtype(
        getattr(module, "dtype", None),
        {**layer.params, **{name: jax.ShapeDtypeStruct(layer.params[name].shape, dtype) for name, dtype in around.narrow}},
        args,
    )
    if narrow == layer.dtype:
        return out
    return jax.tree.map(lambda y: y.astype(narrow) if getattr(y, "dtype", None) == layer.dtype else y, out)


def as_layer(
    module: nnx.Module, name: str, around: Around, effects: list[nnx.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Layer:
    """A module that is about to run as a `Layer`, for middleware that may run it any number of times, on any parameters.

    The first run on the module's own parameters happens in place. Every other run is that of a copy, as the module was before the call, so
    that each of them draws the same random numbers. The module's state is that after the first run, whichever it was.

    Args:
      module: The module, without its leaves, which come back when the call ends. What may run later must hold a copy.
      name: The method that is called.
      around: What goes around the module.
      effects: Holds the module until its state is that after the call.
      args: The positional arguments of the call.
      kwargs: Its keyword arguments.
    """
    if is_known(module, name):
        own = {key: value.get_value() for key, value in vars(module).items() if isinstance(value, nnx.Param)}
        bare = twin(module, own)
        run = lambda params, *inputs, **keywords: run_known(bare, name, params, *inputs, **{**kwargs, **keywords})
        linear = linear_of(bare, name, own, args, kwargs)
    else:
        own, run = _any_module(module, name, effects, kwargs)
        linear = None
    return Layer(
        run=run,
        params=own,
        path=around.path,
        linear=linear,
        dtype=compute_dtype(getattr(module, "dtype", None), own, args),
        names=_names(module, name),
        keywords=kwargs,
        method=name,
        cached=bool(jax.tree.leaves(nnx.state(module, nnx.Cache))),
    )


def _any_module(
    module: nnx.Module, name: str, effects: list[nnx.Module], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The parameters of a module and its submodules, and ``run(params, *inputs, **keywords)``."""
    graphdef, state, others = nnx.split(module, nnx.Param, ...)
    own = unflatten(flatten(state))

    def run(params: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
        keywords = {**kwargs, **keywords}
        # `is`: equal parameters that went through a transformation are other arrays, which the module does not hold.
        first = bool(effects) and _can_change(effects[0])  # the effects of the first run on the module's state are kept
        if params is own and first:
            return getattr(effects.pop(), name)(*inputs, **keywords)
        copy = nnx.merge(graphdef, replace(state, flatten(dict(params))), others, copy=True)
        out = getattr(copy, name)(*inputs, **keywords)
        if first:
            nnx.update(effects.pop(), nnx.state(copy, nnx.Not(nnx.Param)))
        return out

    return own, run


def _can_change(module: nnx.Module) -> bool:
    """Whether the module belongs to the trace that is being made. What runs in a trace inside must leave nothing of it in the module."""
    return module._pytree__state.trace_state.is_valid()  # pyright: ignore[reportAttributeAccessIssue]


def _names(module: nnx.Module, name: str) -> tuple[str, ...]:
    try:
        return argument_names(type(module), name)
    except (TypeError, ValueError):
        return ()
