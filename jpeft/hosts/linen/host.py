"""The linen host: graft and read.

`Method.bind` puts the adapter's leaves beside the parameters they belong to, inside the ``params`` collection. One interceptor then reads,
at every layer, the leaves in that layer's own scope and runs `Method.call` around the layer. The model is not modified.

Why an interceptor: linen calls it around every method of every module, so a layer can be changed without a new class, a new field, or
access to the code that builds the model.

Why leaves in the scope, and not a lookup by the module's path: lifted transforms trace a module once and run it many times. Under `nn.jit`
equal blocks share one trace, so each would get the first block's adapter, and under `nn.scan` all layers have one path. Leaves in the
scope are sliced and passed along like any other parameter, so `nn.scan`, `nn.remat`, `nn.jit` and `nn.vmap` need no special case.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors
from flax import linen as nn
from flax.core import meta

from jpeft.core.method import Method
from jpeft.hosts import base
from jpeft.hosts.call_stack import with_room
from jpeft.hosts.linen import callables, reading
from jpeft.hosts.linen.calls import LAYER_METHODS
from jpeft.hosts.linen.elsewhere import refuse_leaves_met
from jpeft.hosts.linen.interceptor import Interceptor, narrower, tag_grafts
from jpeft.hosts.linen.unread import Known, UnreadLeaves
from jpeft.hosts.linen.variables import params_of, split_variables
from jpeft.hosts.products.costly import CostlyKernels
from jpeft.tree.adapters import pop_grafts
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, Path


class LinenHost(base.Host):
    """Models of `flax.linen`."""

    name = "linen"

    def recognises(self, target: Any) -> bool:
        """Whether the target is a linen module, an object around one that takes ``params=``, a method, or a partial application."""
        return callables.is_linen(target)

    def callable_of(self, target: Any) -> Callable[..., Any]:
        """``model.apply``, with the method that was given."""
        return callables.as_apply(target)

    def form_inside(
        self, fn: Callable[..., Any], params: Params, collections: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[..., Any] | None:
        """A function of variables, if linen modules with parameters run inside."""
        return callables.form_inside(fn, self.unwrap(params), collections, args, kwargs)

    def unwrap(self, params: Params) -> Params:
        """Return the parameters of a model's variables, without metadata boxes such as `nn.Partitioned`."""
        params = params_of(params)
        # Methods look at shapes, and a box has none. Without a box the very same tree is returned, for callers compare bases by identity.
        is_box = lambda node: isinstance(node, meta.AxisMetadata)
        return meta.unbox(params) if any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))) else params

    def wrap(self, fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
        """Return ``forward(variables, *args, **kwargs)`` with the method's leaves bound and its `call` around every layer with leaves."""
        unread, costly = UnreadLeaves(method, Known.of(fn)), CostlyKernels(method.name)

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
            def run(params: Params, tags: Mapping[Path, str]) -> tuple[Any, set[Path]]:
                paths = {tag: None if tag == usual else path for path, tag in tags.items()}
                interceptor = Interceptor(method, paths, narrow, marks=usual not in paths)
                with nn.intercept_methods(interceptor):
                    try:
                        out = fn({**others, "params": tag_grafts(params, tags)}, *args, **kwargs)
                    except errors.FlaxError as error:
                        refuse_leaves_met(method, error)
                        raise
                costly.warn(interceptor.costly, stacklevel=4)
                return _without_grafts(out) if kwargs.get("mutable", False) is not False else out, set(interceptor.ran)

            grafts, usual = pop_grafts(bound)[1], f"{hash(method):x}"
            out, ran = with_room(lambda: run(bound, dict.fromkeys(grafts, usual)))
            # 3. A method that no module has read would be lost without a word.
            unread.refuse(bound, grafts, ran, (others, args, kwargs), run)
            return out

        return forward

    def kernel_axes(self, model: Any, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
        """Return the geometry of all parameters that act as kernels."""
        params, collections = split_variables(params)
        return reading.kernel_axes(callables.module_of(model), self.unwrap(params), collections, *args, **kwargs)

    def inputs_of(self, model: Any, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        """Return the inputs of the modules called `name`."""
        params, collections = split_variables(params)
        return reading.inputs_of(callables.module_of(model), self.unwrap(params), collections, name, *args, **kwargs)

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


def _without_grafts(out: Any) -> Any:
    """What ``apply(..., mutable=...)`` returns, without leaves of a method among the parameters: ``(outputs, variables)``."""
    if isinstance(out, tuple) and isinstance(out[-1], Mapping) and "params" in out[-1]:
        return (*out[:-1], {**out[-1], "params": pop_grafts(out[-1]["params"])[0]})
    return out
