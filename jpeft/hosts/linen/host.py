"""The linen host: graft and read.

`Method.bind` puts the adapter's leaves beside the parameters they belong to, inside the ``params`` collection. One interceptor then reads,
at every layer, the leaves in that layer's own scope and runs `Method.call` around the layer. The model is not modified.

Why an interceptor: linen calls it around every method of every module, so a layer can be changed without a new class, a new field, or
access to the code that builds the model.

Why leaves in the scope, and not a lookup by the module's path: lifted transforms trace a module once and run it many times. Under `nn.jit`
equal blocks share one trace, so each would get the first block's adapter, and under `nn.scan` all layers have one path. Leaves in the
scope are sliced and passed along like any other parameter, so `nn.scan`, `nn.remat`, `nn.jit` and `nn.vmap` need no special case.
"""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from jpeft.core.method import Method
from jpeft.hosts import base
from jpeft.hosts.call_stack import with_room
from jpeft.hosts.linen import flax_internals, reading
from jpeft.hosts.linen.calls import LAYER_METHODS, as_layer, bind_by_position, dropout_key, dtypes_of, is_layer_call
from jpeft.hosts.linen.unread import UnreadLeaves
from jpeft.hosts.linen.variables import params_of, split_variables
from jpeft.tree.adapters import GRAFT, pop_grafts, put_grafts
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, Path, flatten


class LinenHost(base.Host):
    """Models of `flax.linen`."""

    name = "linen"

    def recognises(self, target: Any) -> bool:
        """Whether the target is a linen module, or a bound method of one, or a partial application of such a method."""
        return any(isinstance(each, nn.Module) for each in (target, getattr(base.innermost(target), "__self__", None)))

    def unwrap(self, params: Params) -> Params:
        """Return the parameters of a model's variables, without metadata boxes such as `nn.Partitioned`."""
        params = params_of(params)
        # Methods look at shapes, and a box has none. Without a box the very same tree is returned, for callers compare bases by identity.
        is_box = lambda node: isinstance(node, meta.AxisMetadata)
        return meta.unbox(params) if any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))) else params

    def wrap(self, fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
        """Return ``forward(variables, *args, **kwargs)`` with the method's leaves bound and its `call` around every layer with leaves."""
        if isinstance(fn, nn.Module):
            raise ValueError(f"wrap takes a function that runs the model, and was given a {type(fn).__name__}: pass its `apply`.")
        unread = UnreadLeaves(method)

        @functools.wraps(base.innermost(fn))
        def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            # 1. Graft: {"params": base, "lora": adapter} becomes one `params`, with leaves beside the kernels. No array is copied.
            adapter = method.from_collections(variables)
            own = method.to_collections(adapter)
            # The model's own collections, such as running means or a cache, go to `fn` as they are.
            others = {name: tree for name, tree in variables.items() if name not in own}
            params = self.unwrap(others["params"])
            bound = method.bind(params, adapter, rng=base.dropout_key(kwargs.get("rngs")))
            narrow = narrower(params, bound)

            # 2. Read: the interceptor must be entered in here, inside of whatever `jit` or `grad` traces this function.
            def run(params: Params, tag: str) -> tuple[Any, set[str]]:
                interceptor = Interceptor(method, tag, narrow)
                with nn.intercept_methods(interceptor):
                    out = fn({**others, "params": tag_grafts(params, tag)}, *args, **kwargs)
                return out, interceptor.ran

            def trace_anew() -> set[str]:
                # No trace under a tag that was never used before can be in the cache of `nn.jit`.
                ran: set[str] = set()
                fresh = f"{tag}-{secrets.token_hex(8)}"
                jax.eval_shape(lambda params: ran.update(run(params, fresh)[1]), bound)
                return ran

            tag = f"{hash(method):x}"
            out, ran = with_room(lambda: run(bound, tag))
            # 3. A method that no module has read would be lost without a word.
            unread.refuse(bound, ran, (others, args, kwargs), trace_anew)
            return _without_grafts(out) if kwargs.get("mutable", False) is not False else out

        return forward

    def kernel_axes(self, model: Any, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
        """Return the geometry of all parameters that act as kernels."""
        params, collections = split_variables(params)
        return reading.kernel_axes(model, self.unwrap(params), collections, *args, **kwargs)

    def inputs_of(self, model: Any, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        """Return the inputs of the modules called `name`."""
        params, collections = split_variables(params)
        return reading.inputs_of(model, self.unwrap(params), collections, name, *args, **kwargs)

    def map_outputs(self, fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return `fn` with `change` applied to what every module's `__call__` or `attend` returns."""

        # Interceptors also see `setup` and the module's other methods, whose results are no activations.
        def after(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            out = next_fun(*args, **kwargs)
            return change(out) if context.method_name in LAYER_METHODS else out

        @functools.wraps(base.innermost(fn))
        def run(*args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(after):
                return fn(*args, **kwargs)

        return run


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """Runs a method's `call` around every module that finds leaves of the method in its scope.

    Attributes:
      method: The method.
      tag: The key under which the leaves stand, see `tag_grafts`.
      narrow: For leaves of the base that a wider one replaces, the base's dtype, by path.
      ran: The paths of the modules that found leaves, filled while the model is traced.
      active: The scopes of the modules that are being run with the method around them.
    """

    method: Method
    tag: str
    narrow: Mapping[Path, Any] = dataclasses.field(default_factory=dict)
    ran: set[str] = dataclasses.field(default_factory=set)
    active: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """Run one method of one module."""
        if not self.narrow or not is_layer_call(context):
            return self._run(next_fun, args, kwargs, context)
        # A trained float32 leaf in place of one in half precision widens the outputs of a layer that declares no dtype of its own.
        wide, narrow = dtypes_of(context.module, self.narrow, args)
        out = self._run(next_fun, args, kwargs, context)
        if wide == narrow:
            return out
        return jax.tree.map(lambda y: y.astype(narrow) if getattr(y, "dtype", None) == wide else y, out)

    def _run(self, next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """Run it, with the method around it if it has leaves of the method."""
        module, name = context.module, context.method_name
        if not is_layer_call(context) or not module.scope.has_variable("params", GRAFT):
            return next_fun(*args, **kwargs)
        # Inside a scan these are the leaves of one layer: linen has sliced them with the kernel.
        tagged = module.scope.get_variable("params", GRAFT)
        if self.tag not in tagged:
            return next_fun(*args, **kwargs)  # the leaves of another wrap: a wrapped model inside a wrapped model
        # A layer's method may call another method in the same scope, as a subclass of Dense calls `super().__call__`. Count leaves once.
        if any(scope is flax_internals.origin(module.scope) for scope in self.active):
            return next_fun(*args, **kwargs)
        self.ran.add("/".join(module.path))
        # The method sees arguments in one form, however the model spells the call.
        args, kwargs = bind_by_position(module, name, args, kwargs)
        layer = as_layer(context, next_fun, args, kwargs)
        self.active.append(module.scope)
        # A random key is drawn only where the model draws some, so a method is random exactly when the model's dropout is.
        try:
            return self.method.call(layer, args, tagged[self.tag], dropout_key(module))
        finally:
            self.active.pop()


def narrower(params: Params, bound: Params) -> dict[Path, Any]:
    """The dtypes of the base's leaves that are wider where a method is bound, by path."""
    leaves = flatten(bound)
    dtypes = {path: leaf.dtype for path, leaf in flatten(params).items() if path in leaves and hasattr(leaf, "dtype")}
    return {path: dtype for path, dtype in dtypes.items() if leaves[path].dtype != dtype}


def tag_grafts(params: Params, tag: str) -> Params:
    """Put all leaves that were added to parameters under one more key: the identity of the method.

    `nn.jit` looks its traces up by the *structure* of what it is given. Two methods with equal leaves but another alpha must not share a
    trace, so their trees must differ in structure.
    """
    # {"dense": {"jpeft": leaves}} becomes {"dense": {"jpeft": {tag: leaves}}}.
    clean, grafts = pop_grafts(params)
    return put_grafts(clean, {path: {tag: leaves} for path, leaves in grafts.items()})


def _without_grafts(out: Any) -> Any:
    """What ``apply(..., mutable=...)`` returns, without leaves of a method among the parameters: ``(outputs, variables)``."""
    if isinstance(out, tuple) and isinstance(out[-1], Mapping) and "params" in out[-1]:
        return (*out[:-1], {**out[-1], "params": pop_grafts(out[-1]["params"])[0]})
    return out
