"""All uses of what flax keeps private. No other file of jpeft reaches below flax's public interface.

`tests/test_flax_internals.py` checks each function of this file against the installed flax. A version of flax that changes what the
functions rely on fails there, with a message that names the function.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import DenyList, lift
from flax.linen import module as linen_module
from flax.linen import transforms


def collection(module: nn.Module, name: str) -> Mapping[str, Any]:
    """The variables of one collection in a bound module's own scope; empty if there are none.

    flax's public `nn.Module.variables` copies all collections, at every layer. `Scope._collection` gives one of them as it is.
    """
    assert module.scope is not None, "Only a bound module, one that runs in `apply` or `init`, has variables."
    return module.scope._collection(name)


def enters_transform(module: nn.Module, method_name: str) -> bool:
    """Whether calling this method of a module enters a lifted class, as made by ``nn.remat(Block)`` or ``nn.scan(Block)``.

    Inside, a module of the class that was lifted runs under the same path. It sees the parameters of one layer, where the module around a
    scan sees those of all layers. flax shows interceptors the inner call alone, except where a subclass of the lifted class has a method
    of that name. A module whose method is *decorated* (``@nn.remat`` above ``def __call__``) runs once and has no module inside.
    """
    return _class_enters_transform(type(module), method_name)


@functools.cache
def _class_enters_transform(cls: type, method_name: str) -> bool:
    # flax marks lifted classes nowhere. Their methods are closures of two functions in flax's file of transforms,
    # `module_class_lift_transform` and `module_class_lift_transform_cached`. Decorated methods are closures of `decorator_lift_transform`.
    codes = [getattr(vars(base).get(method_name), "__code__", None) for base in cls.__mro__]
    lifted = "module_class_lift_transform"
    return any(code is not None and code.co_filename == transforms.__file__ and code.co_qualname.startswith(lifted) for code in codes)


def is_method(module: nn.Module, name: str, function: Callable[..., Any]) -> bool:
    """Whether a function that interceptors see is the method of that name of the module's class."""
    method = getattr(type(module), name, None)
    while method is not None and method is not function:  # flax wraps methods, and so do transforms that decorate them
        method = getattr(method, "__wrapped__", None)
    return method is not None


def holds_nnx(module: nn.Module) -> bool:
    """Whether a module is an `nnx.bridge.ToLinen`, which reads all of its parameters, and fails if it finds others among them."""
    return _is_bridge(type(module))


@functools.cache
def _is_bridge(cls: type) -> bool:
    # By name, for importing NNX takes as long as importing linen.
    return any(base.__name__ == "ToLinen" and base.__module__.startswith("flax.nnx.bridge") for base in cls.__mro__)


def origin(scope: Any) -> Any:
    """The scope that `call_as_function` has copied; the scope itself, if it is no copy."""
    return getattr(scope, "jpeft_origin", scope)


def call_as_function(
    module: nn.Module,
    method: Callable[..., Any],
    use: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    hide: str | None = None,
) -> Any:
    """Call a method of a bound module by ``use(pure, *args)``, where ``pure(params, *args)`` is the call as a function of its parameters.

    `pure` returns the outputs and the state that the call writes: what it sows, its other collections. `use` returns the same, and the
    state goes where the module would have written it. The module draws the random numbers that it would draw by itself.

    This is what flax's own lifted transforms do, with `use` for the transform. Entries of the name `hide`, at any depth, are not shown to
    the module.
    """
    state, counters = module._state.export(), dict(_scope(module).rng_counters)

    def transform(core_fn: Callable[..., Any], scopes: Any, *args: Any) -> Any:
        def inner(scope_fn: Any, repack_fn: Any, variable_groups: Any, rng_groups: Any, *args: Any) -> Any:
            before, variable_groups = _without(hide, collection(module, "params")), _without(hide, variable_groups)

            def pure(params: Mapping[str, Any], *args: Any) -> Any:
                # The very arrays of the scope are exchanged, inside of metadata boxes, too.
                pairs = zip(*(jax.tree.leaves({name: tree[name] for name in params}) for tree in (before, params)), strict=True)
                changed = {id(old): new for old, new in pairs if new is not old}
                groups = jax.tree.map(lambda leaf: changed.get(id(leaf), leaf), variable_groups)
                # Parameters are not written: what is returned as the model's parameters must be those without the change.
                scopes = scope_fn(groups, rng_groups, DenyList("params"))
                return core_fn(scopes, *args), repack_fn(scopes)

            return use(pure, *args)

        return lift.pack(inner, (True,), (True,), (True,))(scopes, *args)

    def call(copy: nn.Module, *args: Any) -> Any:
        _scope(copy).jpeft_origin = _scope(module)
        with _captured_once(copy, method.__name__):
            return linen_module.wrap_method_once(method)(copy, *args, **kwargs)

    call.method_wrapped = True  # pyright: ignore[reportFunctionMemberAccess]  # it is no method of the module's own
    try:
        return transforms.lift_direct_transform(transform, (call,), module, *args)
    except BaseException:
        # The caller may run the module in another way, as if nothing had been tried.
        module._state.reimport(state)
        _scope(module).rng_counters.update(counters)
        raise


def _without(name: str | None, tree: Any) -> Any:
    """A tree without the entries of a name."""
    if name is None:
        return tree
    if isinstance(tree, Mapping):
        return {key: _without(name, value) for key, value in tree.items() if key != name}
    return type(tree)(_without(name, each) for each in tree) if type(tree) in (tuple, list) else tree


def function_of(context: nn.module.InterceptorContext) -> Callable[..., Any]:
    """The function that an intercepted call runs: the method as its class defines it, inside of transforms that decorate it."""
    return context.orig_method.func  # pyright: ignore[reportFunctionMemberAccess]  # a partial application to the module


@contextlib.contextmanager
def _captured_once(module: nn.Module, method_name: str) -> Iterator[None]:
    """Let ``capture_intermediates`` leave out this call, which runs inside another one that it captures."""
    stack = linen_module._context.capture_stack
    outer = stack[-1] if stack else None
    stack.append(outer and (lambda other, name: bool(outer(other, name)) and not (other is module and name == method_name)))
    try:
        yield
    finally:
        stack.pop()


def _scope(module: nn.Module) -> Any:
    assert module.scope is not None, "Only a bound module has a scope."
    return module.scope
