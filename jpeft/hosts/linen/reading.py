"""Reading a linen model: the inputs of its modules, and the geometry of its kernels."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import DenyList

from jpeft.hosts.arguments import bind_by_position
from jpeft.hosts.linen import flax_internals
from jpeft.hosts.linen.calls import is_layer_call, own_params
from jpeft.hosts.products.find import find_products, geometry
from jpeft.hosts.products.layer_mark import mark
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, flatten

INTERMEDIATES = "intermediates"
PREFIX = "jpeft_input_"  # of the names under which inputs are recorded


def inputs_of(
    model: nn.Module, params: Params, collections: Mapping[str, Any], name: str, *args: Any, **kwargs: Any
) -> dict[str, list[Any]]:
    """The arrays that each module called `name` is given when it first runs; see `jpeft.hosts.base.Host.inputs_of`."""

    def record(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.name == name and context.method_name == "__call__" and is_layer_call(context):
            for i, x in enumerate(bind_by_position(module, "__call__", args, kwargs)[0]):
                if isinstance(x, jax.Array):
                    # `sow` and not a list in Python: inside `nn.scan` x is one layer's tracer, and linen stacks what is sown.
                    module.sow(INTERMEDIATES, f"{PREFIX}{i}", x)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        _, state = model.apply({**collections, "params": params}, *args, **{"mutable": _writable(collections), **kwargs})
    found: dict[str, list[Any]] = {}
    for path, leaf in flatten(state.get(INTERMEDIATES, {})).items():
        module, _, rest = path.rpartition(f"/{PREFIX}")
        if module and rest.endswith("/0"):  # linen numbers the calls of a module; 0 is the first
            found.setdefault(module, []).append(leaf)
    return found


def kernel_axes(
    model: nn.Module, params: Params, collections: Mapping[str, Any], *args: Any, **kwargs: Any
) -> tuple[tuple[str, KernelAxes], ...]:
    """The geometry of every kernel, read off the products of the model in one abstract pass; see `jpeft.hosts.base.Host.kernel_axes`."""

    def mark_own(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.scope is not None and not flax_internals.enters_transform(module, context.method_name):
            for value in own_params(module).values():
                if isinstance(value, jax.Array):
                    mark(value)
        return next_fun(*args, **kwargs)

    def apply(params: Params, *args: Any) -> Any:
        with nn.intercept_methods(mark_own):
            return model.apply({**collections, "params": params}, *args, **{"mutable": _writable(collections), **kwargs})

    return tuple((re.escape(path), axes) for path, axes in geometry(find_products(apply, params, *args)).items())


def _writable(collections: Mapping[str, Any]) -> DenyList:
    """Which collections a model may write: all but its parameters. Running means that are not given are made; a cache is not."""
    return DenyList(tuple({"params", "cache"} - collections.keys()))
